"""No space, and two who write: the old bundle stays, one line says why, and nothing else is left."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from export.base.errors import ExportError
from export.runtime.bundle.folder import publish, read_verified, staged

ROOT = Path(__file__).resolve().parents[2]
OLD = {"model.onnx": b"old" * 100, "parity.json": b"{}"}
COMMAND = [
    sys.executable, str(ROOT / "scripts" / "export.py"), "--model", "resnet8", "--image-size", "16", "--engine", "none",
    "--batch", "1:2:4",
]  # fmt: skip
_NEWUSER, _NEWNS, _PRIVATE = 0x10000000, 0x20000, 0x44000
fork = multiprocessing.get_context("fork")


def write(output: Path, files: dict[str, bytes]) -> None:
    with staged(output) as staging:
        publish(staging, output, files, {"format": 2})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said_by(function: Callable[[], object], prepare: Callable[[], object]) -> str:
    """What a forked child that prepares itself and then calls a function is refused with; empty where it is not."""

    def run() -> None:
        prepare()
        try:
            function()
        except ExportError as error:
            answer.put(str(error))
        else:
            answer.put("")

    answer = fork.SimpleQueue()
    child = fork.Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return answer.get()


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


SIZES = [0, 1, 2, 100, 1000, 2809, 4096, 5000, 30_000, 52_015, 65_536, 100_000, 200_000, 300_000, 315_000]


@pytest.mark.parametrize("existing", [True, False], ids=["over an older bundle", "into nothing"])
@pytest.mark.parametrize("size", SIZES)
def test_a_limit_of_the_size_of_files(
    size: int, existing: bool, export_again: Callable[[Path], None], tmp_path: Path
) -> None:
    """The ONNX file of this network has some 315000 bytes and is the first that does not fit."""
    output = tmp_path / "bundle"
    if existing:
        write(output, OLD)
    before = snapshot(tmp_path)
    message = said_by(lambda: export_again(output), lambda: limit_files(size))
    assert message == f"{output} cannot be written: File too large"
    assert snapshot(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["bundle"] * existing


def test_a_limit_that_is_large_enough(export_again: Callable[[Path], None], tmp_path: Path) -> None:
    assert said_by(lambda: export_again(tmp_path / "bundle"), lambda: limit_files(1_000_000)) == ""
    read_verified(tmp_path / "bundle")


def test_the_script_says_so_in_one_line(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    before = snapshot(tmp_path)
    command = [*COMMAND, "--output", str(tmp_path / "bundle")]
    process = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: limit_files(100_000))
    assert process.returncode == 2 and process.stdout == ""
    refusal = [line for line in process.stderr.splitlines() if " s  " not in line]  # progress lines apart
    assert refusal == [f"export.py: error: {tmp_path / 'bundle'} cannot be written: File too large"]
    assert snapshot(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["bundle"]


def mount(folder: Path, size: int) -> str:
    """Put an empty file system of so many bytes on a folder, which this process alone sees; why that does not work."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(_NEWNS if uid == 0 else _NEWNS | _NEWUSER) != 0:
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    libc.mount(b"none", b"/", None, _PRIVATE, None)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size},mode=0777".encode()) != 0:
        return f"mount: {os.strerror(ctypes.get_errno())}"
    return ""


@pytest.mark.parametrize("pages", [0, 1, 2, 5, 20, 76, 77, 90, 91])
def test_a_full_disk(pages: int, export_again: Callable[[Path], None], tmp_path: Path) -> None:
    """A file system with room for the older bundle and so many pages of 4096 bytes; the new one needs 92 or more."""

    def run() -> None:
        reason = mount(tmp_path, (len(OLD) + 1 + 1 + pages) * 4096)
        if reason:
            answer.put(("skip", reason, {}, {}))
            return
        write(tmp_path / "bundle", OLD)
        before, message = snapshot(tmp_path), ""
        try:
            export_again(tmp_path / "bundle")
        except Exception as error:  # whatever it is, the parent waits for it
            message = str(error)
        left = {path.name for path in tmp_path.iterdir()}
        answer.put((message, left, before, snapshot(tmp_path)))

    answer = fork.SimpleQueue()
    child = fork.Process(target=run)
    child.start()
    message, left, before, after = answer.get()
    child.join(60)
    if message == "skip":
        pytest.skip(f"this system lets the tests mount no file system ({left})")
    assert message == f"{tmp_path / 'bundle'} cannot be written: No space left on device"
    assert before == after and before and left == {"bundle"}


WRITERS = 6


def race(output: Path, writer: int, start: Barrier, answers: multiprocessing.SimpleQueue) -> None:
    files = {"model.onnx": bytes([writer]) * 1_000_000, "golden.safetensors": bytes([writer]) * 300_000}
    start.wait()
    try:
        write(output, files)
        answers.put((writer, ""))
    except Exception as error:  # whatever it is, the parent waits for it
        answers.put((writer, str(error)))


def test_writers_at_the_same_moment(tmp_path: Path) -> None:
    """Each is let through or says so; what is there is one of those that were, whole."""
    output, refused = tmp_path / "bundle", 0
    for _ in range(15):
        start, answers = fork.Barrier(WRITERS), fork.SimpleQueue()
        children = [fork.Process(target=race, args=(output, writer, start, answers)) for writer in range(WRITERS)]
        for child in children:
            child.start()
        said = dict(answers.get() for _ in children)
        for child in children:
            child.join(60)
        winners = [writer for writer, message in said.items() if not message]
        assert winners and len(said) == WRITERS
        assert {message for message in said.values() if message} <= {
            f"another process is writing to {output}: wait for it or choose another folder"
        }
        _, contents = read_verified(output)
        (writer,) = {byte for content in contents.values() for byte in content}
        assert writer in winners and [path.name for path in tmp_path.iterdir()] == ["bundle"]
        refused += WRITERS - len(winners)
    assert refused > 0, "they never met"


def test_two_real_exports_at_once(tmp_path: Path) -> None:
    command = [*COMMAND, "--output", str(tmp_path / "bundle")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], said
    loser = said[codes.index(2)].splitlines()[-1]
    assert loser.startswith(f"export.py: error: another process is writing to {tmp_path / 'bundle'}: wait for it")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] and read_verified(tmp_path / "bundle")
