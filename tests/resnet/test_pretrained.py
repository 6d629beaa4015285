"""Downloads against a real https server on this machine: what arrives whole and right, and what is refused."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from resnet import pretrained
from resnet.models import MODELS
from resnet.pretrained import PUBLISHED, DownloadError, PublishedFile, download
from tests.children import run
from tests.resnet import checks

CONTENT = os.urandom(300_000)
FILE = "weights-1234.pth"
NAME = "tiny"


class Site(ThreadingHTTPServer):
    """Serves CONTENT over https, with Range, and remembers the Range of each request; `reply` takes its place."""

    daemon_threads = True

    def __init__(self, certificate: Path) -> None:
        super().__init__(("localhost", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.requests: list[str | None] = []
        self.reply: Callable[[Handler], object] = serve
        self.host = f"localhost:{self.server_port}"
        self.url = f"https://{self.host}/{FILE}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.requests.append(self.headers["Range"])
        self.server.reply(self)

    def answer(self, status: int, body: bytes, **headers: object) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def serve(handler: Handler, content: bytes = CONTENT) -> None:
    start = re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "")
    if start is None:
        handler.answer(200, content)
    elif int(start[1]) >= len(content):
        handler.answer(416, b"", Content_Range=f"bytes */{len(content)}")
    else:
        first = int(start[1])
        handler.answer(206, content[first:], Content_Range=f"bytes {first}-{len(content) - 1}/{len(content)}")


def cut(after: int) -> Callable[[Handler], object]:
    """The connection ends before the content does."""

    def reply(handler: Handler) -> None:
        handler.answer(200, CONTENT[:after], Content_Length=len(CONTENT))
        handler.close_connection = True

    return reply


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    path = tmp_path_factory.mktemp("certificate") / "localhost.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    command += ["-keyout", str(path), "-out", str(path.with_suffix(".crt"))]
    assert run(command).returncode == 0
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def site(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site that is allowed and trusted, and publishes the weights of the model "tiny"."""
    with Site(certificate) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setattr(pretrained, "_HOSTS", frozenset({site.host}))
        publish(monkeypatch, site.url)
        yield site
        site.shutdown()
        thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes = CONTENT, max_bytes: int = len(CONTENT)) -> None:
    published = PublishedFile(url, hashlib.sha256(content).hexdigest(), max_bytes)
    monkeypatch.setitem(PUBLISHED, NAME, published)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def refusal(cache: Path, of_the_folder: bool = False) -> str:
    """The one line with which a download is refused; under the name of the file there is nothing."""
    message = checks.refusal(DownloadError, download, NAME, cache)
    begin = f"weights of {NAME} not fetched from {PUBLISHED[NAME].url}: "
    assert message.startswith(str(cache) if of_the_folder else begin)
    assert of_the_folder or message.endswith("give load_weights(path=...)")
    assert not (cache / FILE).exists()
    return message


def part(cache: Path) -> Path:
    return cache / f"{FILE}.part"


def leave(cache: Path, content: bytes) -> None:
    """What an interrupted download leaves."""
    cache.mkdir(mode=0o700)
    part(cache).write_bytes(content)


def test_complete_download_and_no_request_for_what_is_there(site: Site, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = download(NAME, cache, lambda done, total: seen.append((done, total)))
    assert path == cache / FILE and path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and sorted(seen) == seen
    assert not part(cache).exists() and site.requests == [None]
    assert download(NAME, str(cache)).read_bytes() == CONTENT and site.requests == [None]


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:9] + bytes([c[9] ^ 1]) + c[10:], lambda c: b""])
def test_changed_cache_file_is_fetched_again(site: Site, cache: Path, change: Callable[[bytes], bytes]) -> None:
    path = download(NAME, cache)
    path.write_bytes(change(CONTENT))
    assert download(NAME, cache).read_bytes() == CONTENT and site.requests == [None, None]


def test_cut_connection_is_continued_by_the_next_call(site: Site, cache: Path) -> None:
    site.reply = cut(after=100_000)
    assert "the connection ended after 100000 of 300000 bytes; try again" in refusal(cache)
    site.reply = serve
    seen: list[tuple[int, int]] = []
    assert download(NAME, cache, lambda done, total: seen.append((done, total))).read_bytes() == CONTENT
    assert site.requests == [None, "bytes=100000-"] and min(seen) > (100_000, len(CONTENT)) and not part(cache).exists()


RANGE = "bytes=1000-"
# what an interrupted download left, what the server answers to a wish to go on, and the ranges it is asked for
CONTINUATIONS: dict[str, tuple[bytes, Callable[[Handler], object], list[str | None]]] = {
    "ignored-range": (CONTENT[:1000], lambda h: h.answer(200, CONTENT), [RANGE]),
    "another-place": (
        CONTENT[:1000], lambda h: h.answer(206, CONTENT[500:], Content_Range="bytes 500-299999/*"), [RANGE, None],
    ),
    "other-rest": (bytes(1000), serve, [RANGE, None]),
    "longer-rest": (CONTENT + b"more", serve, [f"bytes={len(CONTENT) + 4}-", None]),
    "full-rest": (bytes(len(CONTENT)), serve, [f"bytes={len(CONTENT)}-", None]),
    "complete-rest": (CONTENT, serve, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTINUATIONS)
def test_what_an_interrupted_download_left_is_of_use_or_not(site: Site, cache: Path, case: str) -> None:
    left, reply, requests = CONTINUATIONS[case]
    leave(cache, left)
    site.reply = lambda handler: reply(handler) if handler.headers["Range"] else serve(handler)
    assert download(NAME, cache).read_bytes() == CONTENT and site.requests == requests and not part(cache).exists()


def chunked(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(CONTENT), 50_000):
        handler.wfile.write(b"c350\r\n" + CONTENT[start : start + 50_000] + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")
    handler.close_connection = True


@pytest.mark.parametrize(("reply", "expected"), [(serve, "300000 bytes"), (chunked, "more bytes")], ids=["said", "not"])
def test_too_long_is_refused_and_nothing_kept(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, reply: Callable[[Handler], object], expected: str
) -> None:
    monkeypatch.setattr(pretrained, "_CHUNK", 1000)
    publish(monkeypatch, site.url, max_bytes=100_000)
    site.reply = reply
    seen: list[int] = []
    with pytest.raises(DownloadError, match=expected):
        download(NAME, cache, lambda done, _: seen.append(done))
    assert max(seen, default=0) <= 100_000
    assert "100000" in refusal(cache) and not part(cache).exists()


def redirect(to: str) -> Callable[[Handler], object]:
    return lambda handler: serve(handler) if handler.path == "/moved" else handler.answer(302, b"", Location=to)


@pytest.mark.parametrize("reply", [chunked, redirect("/moved")], ids=["length-unknown", "moved-on-the-same-host"])
def test_other_sound_answers(site: Site, cache: Path, reply: Callable[[Handler], object]) -> None:
    site.reply = reply
    assert download(NAME, cache).read_bytes() == CONTENT and len(site.requests) == 1 + (reply is not chunked)


REDIRECTED = "sent to '{}', expected https://{host}"
# where downloads must not come from, and the words that must say so of a redirect; of the first address, REDIRECTED
ADDRESSES = {
    **dict.fromkeys(("http://{host}/moved", "ftp://{host}/moved", "https://{host}@localhost/moved"), REDIRECTED),
    **dict.fromkeys(("https://localhost/x", "https://{host}.example.com/x", "https://{host}0/x"), REDIRECTED),
    "file:///etc/passwd": "the server",
    "https://[": "the server",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_other_addresses_are_refused(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    url = address.format(host=site.host)
    site.reply = redirect(url)
    assert ADDRESSES[address].format(url, host=site.host) in refusal(cache) and len(site.requests) == 1
    publish(monkeypatch, url)
    expected = "the server" if address == "https://[" else REDIRECTED.format(url, host=site.host)
    assert expected in refusal(cache) and len(site.requests) == 1


def test_untrusted_certificate_is_refused(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "certificate verify failed" in refusal(cache) and site.requests == []


WRONG = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
# what a server answers that goes on, the words that must say so, and whether what was there is kept
FAILURES: dict[str, tuple[Callable[[Handler], object], str, bool]] = {
    "refused": (lambda handler: handler.answer(403, b"no\x1b[31m"), "the server answered 403;", True),
    "no-http": (lambda handler: handler.wfile.write(b"\x1b[31mhello\r\n"), "not HTTP (BadStatusLine)", True),
    "silent": (lambda handler: handler.connection.recv(1), "timed out", True),  # waits until the client hangs up
    "other-content": (lambda handler: serve(handler, WRONG), hashlib.sha256(WRONG).hexdigest(), False),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(pretrained, "_TIMEOUT", 0.3 if case == "silent" else 60.0)
    leave(cache, CONTENT[:1000])
    site.reply, expected, kept = FAILURES[case]
    assert expected in refusal(cache) and part(cache).exists() == kept
    assert not kept or part(cache).read_bytes() == CONTENT[:1000]


def test_offline_is_one_line_with_a_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))  # and does not listen
        host = f"localhost:{nobody.getsockname()[1]}"
        monkeypatch.setattr(pretrained, "_HOSTS", frozenset({host}))
        publish(monkeypatch, f"https://{host}/{FILE}")
        message = refusal(cache)
    assert message.endswith(
        f"{FILE}: Connection refused; try again, or download that file elsewhere and give load_weights(path=...)"
    )


def test_downloads_at_once_fetch_once(site: Site, cache: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = [*threads.map(download, [NAME] * 4, [cache] * 4)]
    assert paths == [cache / FILE] * 4 and paths[0].read_bytes() == CONTENT and site.requests == [None]


@pytest.mark.parametrize("base", [None, "", "relative/path", "{}/xdg"])
def test_the_default_folder_is_made_private(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if base is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", base.format(tmp_path))
    folder = download(NAME).parent
    assert folder == tmp_path / ("xdg" if base and "xdg" in base else ".cache") / "resnet-deploy" / "weights"
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777, None], ids=lambda mode: oct(mode) if mode else "user")
def test_folder_of_others_is_refused(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    leave(cache, CONTENT)
    user, expected = os.getuid(), f"can be written by others (mode {mode or 0:o})"
    if mode is None:
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        expected = f"belongs to user {user}; expected a folder of user {user + 1}"
    else:
        cache.chmod(mode)
    assert expected in refusal(cache, of_the_folder=True) and site.requests == []


def test_folder_that_is_none_is_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "is not a folder" in refusal(tmp_path / "file", of_the_folder=True)
    assert "cannot be made: Not a directory" in refusal(tmp_path / "file" / "below", of_the_folder=True)
    assert site.requests == []


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnet20", "resnet51", ""])
def test_other_names_are_refused_with_those_there_are(name: str, cache: Path) -> None:
    with pytest.raises(DownloadError, match=f"for '{name}'; expected one of resnet18, .*wide_resnet101_2$"):
        download(name, cache)
    assert not cache.exists()


def test_published_files() -> None:
    assert frozenset({"download.pytorch.org"}) == pretrained._HOSTS
    for name, file in PUBLISHED.items():
        assert MODELS[name].image_size == 224 and 10**7 < file.max_bytes < 10**9
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert file.url == f"https://download.pytorch.org/models/{name}-{file.sha256[:8]}.pth"
