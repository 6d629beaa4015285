"""The bundle: a folder of artefacts that appears whole or not at all, and says when it was changed.

It is written beside its final place, flushed to disk, and exchanged with the old folder in one step.
`manifest.json` holds the size and sha256 of every other file and of itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from export.base.errors import ExportError

MANIFEST = "manifest.json"
FORMAT = 3
_SELF = "manifest_sha256"
_SHA256 = re.compile("[0-9a-f]{64}")
_NAME_BYTES = 255  # the longest name that file systems take
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_replaceable(output: Path) -> None:
    """Refuse a folder that holds anything but a bundle: what is replaced is deleted."""
    names = names_in(output)
    if not names:
        return
    try:
        listed = _read_manifest(output)["files"].keys()
    except ExportError as error:
        raise ExportError(f"{output} exists and is not a bundle: choose another folder ({error})") from error
    foreign = sorted(names - listed - {MANIFEST})
    if foreign:
        raise ExportError(f"{output} holds {foreign[0]}, which is not part of the bundle: choose another folder")


def names_in(output: Path) -> set[str]:
    """What a folder holds; nothing where there is none yet. Raises ExportError for what is no folder."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ExportError(f"{output} exists and is not a folder: choose another folder")
    return {path.name for path in output.iterdir()} if output.is_dir() else set()


def check_output(output: Path) -> None:
    """Raises ExportError for a folder that `staged` would refuse, as far as can be told without writing anything."""
    output = output.absolute()
    check_replaceable(output)
    parent = next(folder for folder in output.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "not a folder" if not parent.is_dir() else "no right to write there"
        raise ExportError(f"{output} cannot be written: {parent}: {reason}")


@contextmanager
def staged(output: Path, check: Callable[[Path], None] = check_replaceable) -> Iterator[Path]:
    """A private folder that becomes `output` by `publish` or `place`; removed where neither was called.

    Args:
        output: the folder.
        check: refuses one that must not be replaced.

    Raises:
        ExportError: `output` is something other than a bundle, its folder cannot be written, or another
            export is writing there.
    """
    output = output.absolute()
    check(output)
    with _in_its_folder(output), _locked(output):
        staging = output.parent / f".{output.name}.staging"
        shutil.rmtree(staging, ignore_errors=True)  # left by an export that was killed
        try:
            staging.mkdir(mode=0o755)
        except OSError as error:
            raise ExportError(f"{output} cannot be written: {error.strerror}") from error
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _in_its_folder(output: Path) -> Iterator[None]:
    """Make the folders above `output`; those made here go again where nothing came to lie in them."""
    made = [folder for folder in output.parents if not folder.exists()]  # the innermost first
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"{output} cannot be written: {error.strerror}") from error
        yield
    finally:
        with suppress(OSError):  # not empty, or never made
            for folder in made:
                folder.rmdir()


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the right to write `output`; the kernel gives it back should this process die."""
    path = output.parent / f".{output.name}.lock"
    try:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock), path.stat())  # another may have just removed the file
        except OSError:
            mine = False
        if not mine:
            raise ExportError(f"another process is writing to {output}: wait for it or choose another folder")
        try:
            yield
        finally:
            path.unlink()
    finally:
        os.close(lock)


def publish(staging: Path, output: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Write `files` and the manifest into `staging` and put it in the place of `output`.

    Raises:
        ExportError: the disk is full or the folder cannot be written; `output` is as it was.
    """
    place(staging, output, {**files, MANIFEST: _manifest_bytes(files, manifest)})


def place(
    staging: Path, output: Path, files: Mapping[str, bytes], check: Callable[[Path], None] = check_replaceable
) -> None:
    """The same without a manifest; a name may lie in a folder, as `1/model.onnx` does.

    Raises:
        ExportError: as `publish`, and what `check` does.
    """
    output = output.absolute()
    try:
        for name, content in files.items():
            _write(staging / name, content)
        for folder in {(staging / name).parent for name in files} | {staging}:
            _sync_folder(folder)
        check(output)  # the folder may have changed while the export ran
        _exchange(staging, output)
        _sync_folder(output.parent)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror}") from error


def read_verified(bundle: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest of a bundle whose every file is the one that was written, and the files that were checked.

    Should another bundle take its place meanwhile, that one is read from its beginning.

    Raises:
        ExportError: not a bundle, or a file is missing, changed, unlisted or a link; names the file.
    """
    while True:
        folder = _identity(bundle)
        try:
            return _read_verified(bundle)
        except (ExportError, OSError):
            if _identity(bundle) == folder:
                raise


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another that takes its place; None where there is none."""
    try:
        status = folder.stat()
    except (OSError, ValueError):  # a name that no file can have
        return None
    return status.st_dev, status.st_ino


def _read_verified(bundle: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = _read_manifest(bundle)
    listed, contents = manifest["files"], {}
    for path in sorted(bundle.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{path}: expected a plain file")
        if path.name != MANIFEST and path.name not in listed:
            raise ExportError(f"{path}: not listed in {MANIFEST}")
    for name, expected in listed.items():
        plain = Path(name).name == name and name.isprintable() and len(os.fsencode(name)) <= _NAME_BYTES
        if not plain or name in ("", ".", "..", MANIFEST):
            raise ExportError(f"{bundle / MANIFEST}: {name!r} is not the name of a file in the bundle")
        path = bundle / name
        if not path.is_file():
            raise ExportError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise ExportError(f"{path}: {path.stat().st_size} bytes, expected {expected['bytes']}")
        contents[name] = path.read_bytes()
        digest = _digest(contents[name])
        if digest != expected["sha256"]:
            raise ExportError(f"{path}: changed since it was written (sha256 {digest}, expected {expected['sha256']})")
    return manifest, contents


def _read_manifest(bundle: Path) -> dict[str, Any]:
    path = bundle / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise ExportError(f"{bundle}: expected a bundle, a folder with {MANIFEST}")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        if not isinstance(manifest, dict) or not isinstance(manifest["files"], dict):
            raise ValueError
        claimed = manifest.pop(_SELF)
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"{path}: changed since it was written (not a manifest)") from error
    if not all(isinstance(size, int) and _SHA256.fullmatch(str(digest)) for size, digest in files.values()):
        raise ExportError(f"{path}: changed since it was written (not a manifest)")
    if claimed != _digest(_dump(manifest)) or content != _dump({**manifest, _SELF: claimed}):
        raise ExportError(f"{path}: changed since it was written")
    return manifest


def file_entries(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file: its size in bytes and its sha256."""
    return {name: {"bytes": len(content), "sha256": _digest(content)} for name, content in files.items()}


def _manifest_bytes(files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> bytes:
    complete = {**manifest, "files": file_entries(files)}
    return _dump({**complete, _SELF: _digest(_dump(complete))})


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(staging: Path, output: Path) -> None:
    """Swap two folders in one step, or move the new one in where there is no old one."""
    if not output.exists():
        staging.rename(output)
        return
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    source, target = os.fsencode(staging), os.fsencode(output)
    if renameat2(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, "the file system cannot exchange two folders: remove the old one first")
        raise OSError(code, os.strerror(code))
