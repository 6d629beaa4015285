"""Published ImageNet weights: fetched once, checked completely, kept in a folder that is the user's own.

Trust is in the sha256 written here, not in the server: what does not have it never gets its name in the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import ssl
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, Request, build_opener

from resnet.errors import ResNetError

_HOSTS = frozenset({"download.pytorch.org"})
_TIMEOUT = 30.0  # seconds without a byte, also to connect
_CHUNK = 1 << 20
_USER_AGENT = "resnet-deploy"  # some servers refuse urllib's own


class DownloadError(ResNetError):
    """Published weights that cannot be had. The message is one line: what from where, why, and what to do instead."""


class _Unusable(ValueError):
    """What the server offers is not the file that was asked for: nothing of it may be kept."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights as its authors publish it.

    Attributes:
        url: https, on one of the hosts that are allowed.
        sha256: of the whole file, in hexadecimal.
        max_bytes: its size, or a little more where that is not known exactly; a longer file is refused.
    """

    url: str
    sha256: str
    max_bytes: int


def _torchvision(name: str, sha256: str, max_bytes: int) -> PublishedFile:
    """Weights "IMAGENET1K_V1" of torchvision, which puts the first eight digits of the sha256 into the name."""
    url = f"https://download.pytorch.org/models/{name}-{sha256[:8]}.pth"
    return PublishedFile(url, sha256, max_bytes)


# resnext50_32x4d, resnext101_32x8d and resnext101_64x4d are published too, but only those eight digits of their sha256
# are: too few to trust a file by.
PUBLISHED: dict[str, PublishedFile] = {
    name: _torchvision(name, sha256, max_bytes)
    for name, sha256, max_bytes in (
        ("resnet18", "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec", 46_830_571),
        ("resnet34", "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f", 87_319_819),
        ("resnet50", "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a", 102_530_333),
        ("resnet101", "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a", 179_000_000),
        ("resnet152", "394f9c45966e3651a89bbb78a48410a6755854ce4a5ab64927cf1c7247f85e58", 242_000_000),
        ("wide_resnet50_2", "95faca4d11227dddf8633dbb5ff6c8a9003c1aa5b8945c73834b8007b10950b8", 138_223_492),
        ("wide_resnet101_2", "32ee11565f95f2f07223b243ada444a6457c4b90a88e6e293922813faf6dfd06", 254_695_146),
    )
}


def download(
    name: str, cache: str | os.PathLike[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """The published weights of a model as a file whose sha256 was checked in this call; fetched only if need be.

    An interrupted download is continued by the next call. Calls at the same time wait for each other.

    Args:
        name: a key of PUBLISHED.
        cache: folder for the files, made if missing. Default: resnet-deploy/weights in $XDG_CACHE_HOME or ~/.cache.
        progress: called with the bytes that are there and the bytes of the whole file.

    Raises:
        DownloadError: no such weights; a folder that belongs to or can be written by somebody else; no connection,
            or an untrusted one; a redirect to another host or away from https; a file that is too long or has
            another sha256. Only a file that was whole and right is ever found under its name.
    """
    if name not in PUBLISHED:
        raise DownloadError(
            f"no published weights with a known sha256 for {name!r}; expected one of {', '.join(PUBLISHED)}"
        )
    published = PUBLISHED[name]
    folder = _default_cache() if cache is None else Path(cache)
    _make_private(folder)
    target = folder / published.url.rpartition("/")[2]
    try:
        with _locked(target):
            if not _is_right(target, published):
                part = target.with_name(f"{target.name}.part")
                _fetch(published, part, progress)
                part.replace(target)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(
            f"weights of {name} not fetched from {published.url}: {_reason(error)}; "
            "try again, or download that file elsewhere and give load_weights(path=...)"
        ) from error
    return target


def _default_cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # to be ignored, says the XDG specification
        base = Path.home() / ".cache"
    return base / "resnet-deploy" / "weights"


def _make_private(folder: Path) -> None:
    """Make the folder if it is missing; refuse one in which somebody else could exchange a file after the check."""
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise DownloadError(f"{folder} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise DownloadError(f"{folder} is not a folder; expected one for weights")
    if status.st_uid != os.geteuid():
        raise DownloadError(f"{folder} belongs to user {status.st_uid}; expected a folder of user {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise DownloadError(f"{folder} can be written by others (mode {mode:o}); make it private: chmod 700 {folder}")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the right to write `target`, if need be wait for it; the kernel gives it back should this process die.

    The lock file stays: once it is removed, one process can hold the old file and another a new one.
    """
    lock = os.open(target.with_name(f".{target.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_right(target: Path, published: PublishedFile) -> bool:
    if not target.exists():
        return False
    with target.open("rb") as stream:
        return _sha256(stream) == published.sha256


def _fetch(published: PublishedFile, part: Path, progress: Callable[[int, int], None] | None) -> None:
    """Complete `part`. It stays for the next call when the connection fails, and goes when the content is wrong."""
    opener = build_opener(HTTPSHandler(context=ssl.create_default_context()), _CheckedRedirects)
    with part.open("a+b") as stream:
        try:
            if _sha256(stream) == published.sha256:  # an earlier call ended between the last byte and the rename
                return
            continued = stream.tell() > 0
            _transfer(opener, published, stream, progress)
            if continued and _sha256(stream) != published.sha256:
                stream.truncate(0)  # what was there is of no use, or the server could not continue it
                _transfer(opener, published, stream, progress)
            digest = _sha256(stream)
            if digest != published.sha256:
                raise _Unusable(f"sha256 {digest}, expected {published.sha256}")
            os.fsync(stream.fileno())
        except _Unusable:
            part.unlink()
            raise


def _transfer(
    opener: OpenerDirector, published: PublishedFile, stream: BinaryIO, progress: Callable[[int, int], None] | None
) -> None:
    """Append what `stream` lacks, or write all of it again where the server says so; the caller checks the result."""
    done = stream.seek(0, os.SEEK_END)
    headers = {"User-Agent": _USER_AGENT}
    if done:
        headers["Range"] = f"bytes={done}-"
    _check_url(published.url)
    try:
        response = opener.open(Request(published.url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and done:  # the server's file ends before the place to continue at
            return
        raise
    with response:
        if response.status == 200:
            done = 0
            stream.truncate(0)
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            return
        total = published.max_bytes if response.length is None else done + response.length
        if total > published.max_bytes:
            raise _Unusable(f"{total} bytes, expected at most {published.max_bytes}")
        while chunk := response.read(_CHUNK):
            done += len(chunk)
            if done > published.max_bytes:  # only where the server did not say how many will come
                raise _Unusable(f"more bytes than the expected {published.max_bytes}")
            stream.write(chunk)
            if progress is not None:
                progress(done, total)
        if response.length:  # not read yet: a connection that was cut looks like the end of the file
            raise ConnectionError(f"the connection ended after {done} of {total} bytes")


class _CheckedRedirects(HTTPRedirectHandler):
    """Follows a redirect only to where a download may come from in the first place."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" or parts.netloc not in _HOSTS:
        raise _Unusable(f"sent to {url[:200]!r}, expected https://{' or '.join(sorted(_HOSTS))}")


def _sha256(stream: BinaryIO) -> str:
    """Of all of the stream, which is then at its end."""
    stream.seek(0)
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """Why, in one line; text that the server sent is not repeated."""
    if isinstance(error, HTTPError):
        return f"the server answered {error.code}"
    if isinstance(error, _Unusable):
        return str(error)
    if isinstance(error, HTTPException | ValueError):
        return f"the server's answer broke off or is not HTTP ({type(error).__name__})"
    cause = error.reason if isinstance(error, URLError) else error
    return getattr(cause, "strerror", None) or str(cause)
