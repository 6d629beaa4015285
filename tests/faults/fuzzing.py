"""Feed one function many inputs in a child process that may do little, and say which input it could not take.

The child is a fresh interpreter with limits on memory, processor time and the size of files. An audit hook sees what
Python code asks the system for: a file opened for writing or changed outside the child's own folder, another program
and a connection are escapes. The parent watches what processor time each input takes. So a crash, a hang, an escape
and an exception that is no refusal all end as one line that names the input.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.children import CLOCK_SECONDS, CPU_SECONDS, limit_cpu
from tests.effort import TIMES

# Takes the child's folder, which starts empty, and gives the function that takes the number of an input, makes that
# input from nothing but its number, tries it, and returns a word for what happened. What it raises is a fault.
Target = Callable[[Path], Callable[[int], str]]

SECONDS = 20.0  # of processor time for one input; loading a runtime takes the first one some of it
_START_SECONDS = 300.0
_MEMORY = 3 << 30  # beyond what the imports take
_FILE_SIZE = 64 << 20
_MOST_FAULTS = 25

# What libraries keep or build goes into the child's folder.
_PLACES = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_OF_PATHS = {
    "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.mkfifo", "os.mknod", "shutil.rmtree", "shutil.move",
}  # fmt: skip
_FORBIDDEN = (
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "os.forkpty", "os.startfile",
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request",
    "ftplib.connect", "http.client.connect", "pty.spawn", "webbrowser.open",
)  # fmt: skip


@dataclass
class Outcome:
    """What became of all inputs.

    Attributes:
        words: how often the function returned each of its words.
        faults: one line for each input that it could not take.
    """

    words: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.words.values()) + len(self.faults)


def fuzz(target: Target, count: int, seconds: float = SECONDS, clock: float = CLOCK_SECONDS) -> Outcome:
    """Try inputs 0 to `count` - 1; stops early where very many are faults.

    Args:
        target: a function of a module, so that a fresh interpreter finds it.
        count: of inputs.
        seconds: of processor time that one may take.
        clock: seconds that one may take which waits for something and uses none.
    """
    outcome, start = Outcome(), 0
    context = multiprocessing.get_context("spawn")
    while start < count and len(outcome.faults) < _MOST_FAULTS:
        here, there = context.Pipe(duplex=False)
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        child = context.Process(target=_child, args=(target, folder, start, count, there), daemon=True)
        child.start()
        there.close()
        try:
            start = _watch(child, here, outcome, start, seconds, clock)
        finally:
            child.kill()
            child.join()
            shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _watch(child: Any, here: Connection, outcome: Outcome, start: int, seconds: float, clock: float) -> int:
    """Read what a child says until it ends; the first input that was not tried yet."""
    index, limits = start, (_START_SECONDS, CLOCK_SECONDS)
    try:
        while not (hangs := _hangs(child.pid, here, *limits)):
            kind, value = here.recv()
            if kind == "done":
                return int(value)
            if kind == "trying":
                index, limits = int(value), (seconds, clock)
            elif kind == "word":
                outcome.words[value] = outcome.words.get(value, 0) + 1
            else:
                outcome.faults.append(f"input {index}: {value}")
        outcome.faults.append(f"input {index}: {hangs}")
    except EOFError:
        child.join()
        ended = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit code {child.exitcode}"
        outcome.faults.append(f"input {index}: the process ended with {ended}")
    return index + 1


def _hangs(pid: int, here: Connection, seconds: float, clock: float) -> str:
    """Wait until a child says something, and return nothing; or how it hangs."""
    began, deadline = None, time.monotonic() + clock
    while not here.poll(0.5):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        began = used if began is None else began
        if used - began > seconds:
            return f"still busy after {seconds:.0f} s of processor time"
        if time.monotonic() > deadline:
            return f"still waiting after {clock:.0f} s"
    return ""


def _child(target: Target, folder: Path, start: int, stop: int, there: Connection) -> None:
    """Try the inputs and say so before and after each."""
    sys.dont_write_bytecode = True
    os.chdir(folder)
    os.environ.update(dict.fromkeys(_PLACES, str(folder)), ORT_DISABLE_TELEMETRY="1")
    tempfile.tempdir = None
    _silence()
    try_one = target(folder)
    _limit()
    escapes: list[str] = []
    sys.addaudithook(lambda event, arguments: _audit(folder, escapes, event, arguments))
    for index in range(start, stop):
        there.send(("trying", index))
        try:
            said = ("word", try_one(index))
        except BaseException as error:
            said = ("fault", _described(error))
        there.send(("fault", f"escape: {escapes[0]}") if escapes else said)
        escapes.clear()
    there.send(("done", stop))


def _silence() -> None:
    """What native code prints goes nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    limit_cpu(CPU_SECONDS * TIMES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_SIZE, _FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _audit(folder: Path, escapes: list[str], event: str, arguments: tuple[Any, ...]) -> None:
    """Note what is not allowed, and prevent it.

    Binding to itself is how urllib3 asks whether there is IPv6, lscpu how joblib counts the cores, uname how Python
    asks for the processor; clear_refs is where a process begins to measure its own peak anew.
    """
    counts = event == "subprocess.Popen" and arguments[:1] in (("lscpu",), ("uname",))
    asked = counts or (event == "socket.bind" and arguments[1][0] == "::1")
    allowed = asked or not event.startswith(_FORBIDDEN)
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) if flags else mode != "r"
        allowed = not writes or path == "/proc/self/clear_refs" or _inside(folder, path)
    elif event in _OF_PATHS:
        allowed = all(_inside(folder, value) for value in arguments if isinstance(value, str | bytes | os.PathLike))
    if not allowed:
        escapes.append(f"{event} {arguments!r:.200}")
        raise PermissionError(f"not allowed: {event}")


def _inside(folder: Path, path: str | bytes | os.PathLike[str] | int) -> bool:
    if isinstance(path, int):
        return True  # a file that is open already
    resolved = os.path.realpath(os.fsdecode(path))
    return resolved == os.devnull or resolved == str(folder) or resolved.startswith(f"{folder}{os.sep}")


def _described(error: BaseException) -> str:
    """Type, message and the place in this project, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
    place = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(ours[-3:]))
    return f"{type(error).__name__}: {str(error)[:200]!r} at {place}"
