"""kill -9 at every step, a full disk, and several at once: what is there is the old version or the new one, whole."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import verify_bundle
from export.runtime.bundle.folder import read_verified
from tests.children import finish, fork, in_forks, run, start
from tests.faults.killing import kills, run_until, unflushed
from tests.faults.writers import WRITERS, Writer, bundle_files, read_bundle, write_bundle

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [
    sys.executable, str(ROOT / "scripts" / "export.py"), "--model", "resnet8", "--image-size", "16", "--engine", "none",
    "--batch", "1:2:4",
]  # fmt: skip
OLD, NEW = 0, 1
_NEWUSER, _NEWNS, _PRIVATE, _DETACH = 0x10000000, 0x20000, 0x44000, 2
everyone = pytest.mark.parametrize("name", [*WRITERS, "export"])


@pytest.fixture
def writer(name: str, request: pytest.FixtureRequest) -> Writer:
    """By its name; `export` is all of `export_bundle` but the computing, which was done before."""
    if name != "export":
        return WRITERS[name]
    export_again: Callable[[Path], None] = request.getfixturevalue("export_again")
    contents = read_verified(request.getfixturevalue("bundle"))[1]

    def write(folder: Path, version: int) -> None:
        if version == OLD:
            write_bundle(folder / "bundle", bundle_files(OLD))
        else:
            export_again(folder / "bundle")

    def read(folder: Path) -> int | None:
        output = folder / "bundle"
        return NEW if output.exists() and read_verified(output)[1] == contents else read_bundle(folder)

    return replace(WRITERS["bundle"], write=write, read=read)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


NOTHING, OLDER, KILLED = "into nothing", "over an older one", "over an older one, beside what an earlier kill left"
# At least so many kills of each.
KILLS = {
    ("bundle", NOTHING): 33, ("bundle", KILLED): 45, ("engines", NOTHING): 20, ("engines", KILLED): 35,
    ("export", OLDER): 33, ("weights", OLDER): 5, ("weights", KILLED): 5, ("training", NOTHING): 22,
    ("served", KILLED): 20, ("tuned", OLDER): 5, ("calibration", NOTHING): 8, ("calibration", KILLED): 8,
}  # fmt: skip


def test_there_are_at_least_200_kills() -> None:
    assert sum(KILLS.values()) >= 200


class Killed:
    """A folder in which a writer is killed: how it begins, and what is found there afterwards."""

    def __init__(self, writer: Writer, folder: Path, begin: Path) -> None:
        self.found: list[int | None] = []
        self._writer, self._folder, self._begin = writer, folder, begin
        self._restore()

    def write(self) -> None:
        self._writer.write(self._folder, NEW)

    def check(self, moment: str) -> None:
        """What is there is whole; the next writer is not hindered by what else is there, and removes it."""
        try:
            self.found.append(self._writer.read(self._folder))
            self.write()
            assert self._writer.read(self._folder) == NEW
            left = names(self._folder) - self._writer.names
            assert all(re.fullmatch(self._writer.litter, name) for name in left), left
        except Exception as error:
            raise AssertionError(f"{moment}: {error!r}") from error
        self._restore()

    def _restore(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._begin, self._folder)


@pytest.mark.parametrize(("name", "begin"), KILLS)
def test_killed_at_every_step(
    name: str, writer: Writer, begin: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    template = emptied(tmp_path / "begin")
    if begin != NOTHING:
        writer.write(template, OLD)
    if begin == KILLED:
        assert run_until(lambda: writer.write(template, NEW), KILLS[name, begin] // 2), "it ended before"
        assert names(template) - writer.names, "the earlier kill left nothing"
        assert writer.read(template) == OLD
    killed = Killed(writer, tmp_path / "folder", template)
    count = kills(killed.write, killed.check)
    record_property("kills", count)
    before = None if begin == NOTHING else OLD
    assert killed.found[0] == before and killed.found[-1] == NEW
    assert killed.found == sorted(killed.found, key=(None, OLD, NEW).index)
    assert name == "training" or set(killed.found) == {before, NEW}
    assert count >= KILLS[name, begin], f"only {count} kills"


@everyone
def test_flushed_before_it_is_in_its_place(name: str, writer: Writer, tmp_path: Path) -> None:
    for version in (OLD, NEW):
        found = unflushed(functools.partial(writer.write, tmp_path, version))
        assert bool(found) == (not writer.flushes), found
        writer.write(tmp_path, version)


def refusal(writer: Writer, folder: Path, version: int) -> str:
    """With what a writer is refused, in one line that begins with the place; empty where it is not."""
    try:
        writer.write(folder, version)
    except ValueError as error:
        return str(error)
    return ""


def check_refused(writer: Writer, folder: Path, reason: str, before: int | None) -> bool:
    """Whether the new version had no room; then it says so, what was there is there, and nothing else is."""
    said, found, left = refusal(writer, folder, NEW), writer.read(folder), names(folder)
    if found == NEW:
        assert not said
        return False
    expected = "" if writer.refusal is None else writer.refusal.format(folder=folder, reason=reason)
    assert re.fullmatch(expected, said), said
    assert left <= writer.names and (left or before is None)
    return True


SIZES = (0, 1, 1000, 4096, 25_000, 52_015, 79_000, 199_999, 315_000, 1_000_000)


@pytest.mark.parametrize("before", [None, OLD], ids=["into nothing", "over an older one"])
@everyone
def test_a_limit_of_the_size_of_files(name: str, writer: Writer, before: int | None, tmp_path: Path) -> None:
    def too_small() -> tuple[list[int], int]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails instead
        found = []
        for size in SIZES:
            folder = emptied(tmp_path / "folder")
            if before is not None:
                writer.write(folder, OLD)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            refused = check_refused(writer, folder, os.strerror(errno.EFBIG), before)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            found += [size] * refused
        return found, max(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    ((found, largest),) = in_forks(too_small)
    assert found == [size for size in SIZES if size < largest] and len(found) > 4


def own_mounts() -> str:
    """Let this process mount what it alone sees; why that does not work."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(_NEWNS if uid == 0 else _NEWNS | _NEWUSER) != 0:
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return "" if libc.mount(b"none", b"/", None, _PRIVATE, None) == 0 else os.strerror(ctypes.get_errno())


@everyone
def test_a_full_disk(name: str, writer: Writer, tmp_path: Path) -> None:
    """A file system with room for the older version and ever more pages of 4096 bytes, until the new one fits, too."""
    folder = emptied(tmp_path / "folder")
    writer.write(folder, OLD)
    used = sum(1 + -(-path.lstat().st_size // 4096) for path in (folder, *folder.rglob("*")) if not path.is_dir())

    def too_small() -> list[int] | str:
        libc, reason = ctypes.CDLL(None, use_errno=True), own_mounts()
        found: list[int] = []
        for pages in () if reason else (*range(8), *range(8, 400, 20)):
            size = f"size={(used + 1 + pages) * 4096},mode=0700".encode()
            if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, size) != 0:
                return f"mount: {os.strerror(ctypes.get_errno())}"
            refusal(writer, folder, OLD)
            if writer.read(folder) == OLD and not check_refused(writer, folder, os.strerror(errno.ENOSPC), OLD):
                break
            found += [pages] * (writer.read(folder) == OLD)
            libc.umount2(os.fsencode(folder), _DETACH)
        return reason or found

    (found,) = in_forks(too_small)
    if isinstance(found, str):
        pytest.skip(f"this system lets the tests mount no file system ({found})")
    assert len(found) >= 4, f"only {len(found)} disks were too small"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("name", "call"), [(name, call) for name in WRITERS for call in WRITERS[name].ends_with])
def test_the_last_step_fails(
    name: str, call: str, error: BaseException, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert names(folder) - writer.names, "nothing was written beside what was there"
        raise error

    folder = emptied(tmp_path / "folder")
    writer.write(folder, OLD)
    monkeypatch.setattr(os, call, fail)
    monkeypatch.setattr(Path, "replace", lambda path, target: os.replace(path, target))
    if isinstance(error, OSError):
        assert check_refused(writer, folder, str(error.strerror), OLD)
    else:
        with pytest.raises(KeyboardInterrupt):
            writer.write(folder, NEW)
        assert writer.read(folder) == OLD and names(folder) <= writer.names


RACERS, RACES = range(1, 7), 5


@pytest.mark.parametrize("name", WRITERS)
def test_writers_at_the_same_moment(name: str, writer: Writer, tmp_path: Path) -> None:
    """Each is let through or says so; what is there is one of those that were, whole."""
    met = 0
    for _ in range(RACES):
        folder, barrier = emptied(tmp_path / "folder"), fork.Barrier(len(RACERS))

        def race(version: int, folder: Path = folder, barrier: Any = barrier) -> str:
            barrier.wait()
            return refusal(writer, folder, version)

        said = dict(zip(RACERS, in_forks(*(lambda version=version: race(version) for version in RACERS)), strict=True))
        winners = [version for version, message in said.items() if not message]
        refusals = [message for message in said.values() if message]
        busy = "(?!)" if writer.busy is None else writer.busy.format(folder=folder)
        assert all(re.fullmatch(busy, message) for message in refusals), refusals
        assert writer.read(folder) in winners and names(folder) <= writer.names
        met += len(refusals)
    assert bool(met) == (writer.busy is not None), "they never met"


def test_real_exports_two_at_once_killed_and_out_of_space(bundle: Path, tmp_path: Path) -> None:
    """The script as a user runs it, over an older bundle, which stays as it was."""
    output = tmp_path / "parent" / "bundle"
    shutil.copytree(bundle, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    command = [*COMMAND, "--output", str(output)]

    first = start(command)
    while not (output.parent / ".bundle.staging").exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = run(command)
    first.kill()
    assert finish(first).returncode == -signal.SIGKILL and (output.parent / ".bundle.staging").exists()
    short = run(command, file_bytes=100_000)

    for done, reason in (
        (second, f"another process is writing to {output}: wait for it or choose another folder"),
        (short, f"{output} cannot be written: File too large"),
    ):
        refusals = [line for line in done.stderr.splitlines() if " s  " not in line]  # progress lines apart
        assert done.returncode == 2 and done.stdout == "" and refusals == [f"export.py: error: {reason}"]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert names(output.parent) == {"bundle"} and all(verify_bundle(output))
