"""How scripts end: what can be mended is one line and 2, a fault of this project one line, 3 and a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from export.base.errors import ExportError
from export.terminal import commands
from export.terminal.command_line import importing, run_script
from export.terminal.commands import PACKAGE

ERRORS: dict[str, tuple[BaseException, int]] = {
    "refusal": (ExportError("no"), 2),
    "refusal of another library": (LookupError("no"), 2),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 2),
    "memory": (MemoryError(), 2),
    "memory of PyTorch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2),
    "memory of a GPU": (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 2),
    "Ctrl-C": (KeyboardInterrupt(), 130),
    "ValueError": (ValueError("operands could not be broadcast\ntogether"), 3),
    "RuntimeError": (RuntimeError("shapes"), 3),
    "OSError of a library": (OSError("cannot identify image file"), 3),
}


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()


def end(error: BaseException, traceback: bool = False) -> int:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run_script("verify", argparse.Namespace(traceback=traceback), run, refusals=(LookupError,))


@pytest.mark.parametrize("case", ERRORS)
def test_codes(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error, code = ERRORS[case]
    assert end(error) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "Traceback" not in said.err
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == (code == 3)
    if code == 3:
        assert said.err.startswith(f"verify.py: fault: {type(error).__name__}: ")
        assert said.err.endswith(f"; its traceback is in {kept[0]}\n")
        assert kept[0].parent == tmp_path / "cache" / "resnet-deploy" / "faults" and kept[0].suffix == ".txt"
    elif code == 2:
        assert said.err.startswith("verify.py: error: ")


@pytest.fixture
def _signals_as_at_a_terminal() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, nohup with SIGHUP."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.usefixtures("_signals_as_at_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_tidies_up(number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is raised on the way out, and however often it comes: a shell repeats what the kernel has sent."""
    tidied, handlers = tmp_path / "tidied", [signal.getsignal(n) for n in signal.valid_signals()]

    def run(args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), number)
            raise AssertionError("the signal did not come")
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            tidied.touch()
            raise OSError(errno.EIO, "the terminal is gone")

    assert run_script("verify", argparse.Namespace(traceback=False), run) == 128 + number and tidied.exists()
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert capsys.readouterr().err == f"verify.py: interrupted{by}\n"
    assert [signal.getsignal(n) for n in signal.valid_signals()] == handlers


def test_each_fault_has_a_file_of_its_own(tmp_path: Path) -> None:
    assert [end(ValueError(str(i))) for i in range(3)] == [3, 3, 3]
    assert len(list((tmp_path / "cache" / "resnet-deploy" / "faults").iterdir())) == 3


def test_a_cache_that_others_can_read_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache" / "resnet-deploy" / "faults"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    assert end(ValueError("x")) == 3
    (path,) = (tmp_path / "temporary").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and capsys.readouterr().err.endswith(f"in {path}\n")
    assert list(folder.iterdir()) == []


def test_a_full_disk_leaves_no_half_of_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert end(ValueError("x")) == 3
    assert capsys.readouterr().err.endswith("; its traceback could not be written: --traceback prints it\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_traceback_is_printed_in_place_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(ValueError("x"), traceback=True) == 3
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)") and "in run\n" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


IMPORTED: dict[str, tuple[BaseException, int, str]] = {
    "missing": (ModuleNotFoundError("none", name="torch._C"), 2, "error: torch is not installed here: "),
    "does not load": (ImportError("libc10.so: cannot open", name="torch"), 2, "error: libc10.so: cannot open"),
    "ours": (ImportError("cannot import name 'x' from 'export.base'", name="export.base"), 3, "fault: ImportError: "),
    "a fault": (SyntaxError("invalid syntax"), 3, "fault: SyntaxError: invalid syntax"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize("case", IMPORTED)
def test_what_is_imported_ends_as_what_is_run(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, expected = IMPORTED[case]
    with pytest.raises(SystemExit) as stopped, importing("compile"):
        raise error
    said = capsys.readouterr().err
    assert stopped.value.code == code and said.startswith(f"compile_kernels.py: {expected}") and said.count("\n") == 1


def test_a_command_is_called_as_it_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands.program("compile") == "compile_kernels.py"
    assert commands.typed("compile") == "python scripts/compile_kernels.py"
    installed = ModuleType("__main__")
    installed.__package__ = PACKAGE
    monkeypatch.setitem(sys.modules, "__main__", installed)
    assert commands.program("compile") == commands.typed("compile") == "resnet-deploy compile"


LEAVING = """
import atexit
from export.terminal.command_line import leave
class Late:
    def __del__(self): print("taken apart", flush=True)
late = Late()
atexit.register(print, "tidied up")
print("done")
leave(3)
"""


@pytest.mark.parametrize(("output", "code"), [("said", 3), ("/dev/full", 120)])
def test_a_script_leaves_with_all_that_was_said(output: str, code: int, tmp_path: Path) -> None:
    """And as Python does where that cannot be written."""
    with (tmp_path / output).open("w") as stream:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        process = subprocess.run([sys.executable, "-c", LEAVING], env=buffered, stdout=stream, stderr=subprocess.PIPE)
    assert process.returncode == code, process.stderr
    assert output == "/dev/full" or (tmp_path / output).read_text() == "done\ntidied up\n"
