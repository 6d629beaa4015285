"""Kill a function with SIGKILL at every step it takes on the file system.

The function runs in a forked child that this process traces with ptrace(2). The kernel stops the child at the entry of
each system call and says which one it is, so what counts as a step does not depend on how the code came to it: Python's
`os`, a buffered file, shutil or a C function called by address all look alike. A step is

  * opening a file with the right to write, create or truncate it,
  * writing to a regular file, which gives two moments: before the write, and after half of its bytes,
  * flushing a file or folder to disk,
  * making, renaming, exchanging, linking or removing a file or folder, or changing its length or mode,
  * locking a file,
  * the end of the process, when all the other steps are done.

Being killed before a step is the same as being killed after the one before it. What threads of the child do is not
seen, but they die with it. The loss of what was not flushed, as when the power fails, is not simulated.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.children import CLOCK_SECONDS, limit_cpu

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_MARK_SYSCALLS, _DIE_WITH_TRACER = 0x1, 0x100000
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ENTRY = 1
_WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range")
_OPENS = ("open", "openat", "creat", "openat2")
_END = "exit_group"
# The calls that are steps, by the number they have on x86-64 and on aarch64, where older forms do not exist.
_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "write": (1, 64), "pwrite64": (18, 68), "writev": (20, 66), "pwritev": (296, 70), "pwritev2": (328, 287),
    "sendfile": (40, 71), "copy_file_range": (326, 285),
    "open": (2, None), "creat": (85, None), "openat": (257, 56), "openat2": (437, 437),
    "fsync": (74, 82), "fdatasync": (75, 83), "sync": (162, 81), "syncfs": (306, 267), "flock": (73, 32),
    "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "unlink": (87, None), "unlinkat": (263, 35), _END: (231, 94),
}  # fmt: skip
_NAMES = {
    architecture: {numbers[column]: name for name, numbers in _NUMBERS.items() if numbers[column] is not None}
    for column, architecture in enumerate((_X86_64, _AARCH64))
}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def kills(function: Callable[[], object], check: Callable[[str], None]) -> int:
    """Kill `function` at its first moment, check, run and kill it at its second, and so on until it ends by itself.

    Args:
        function: runs in a forked child each time; must do the same steps when it starts from the same files.
        check: is told the moment of each kill; looks at what is left, and puts things back for the next run.

    Returns:
        How many kills there were. Skips the test where the system does not allow tracing.
    """
    count = 0
    while (moment := run_until(function, count + 1)) is not None:
        count += 1
        check(f"kill {count}, {moment}")
    assert count, "the function took no steps"
    return count


def unflushed(function: Callable[[], object]) -> list[str]:
    """What `function` gives its final name before its bytes are on the disk: a power failure would leave it empty.

    A file counts from its first write to its flush, and is named where it, or a folder it lies in, is renamed.
    """
    dirty: set[str] = set()
    found: list[str] = []
    with _traced(function) as child:
        for name, arguments in _entries(child):
            if name in _WRITES and _is_step(child, name, arguments):
                dirty.add(os.readlink(f"/proc/{child}/fd/{arguments[0]}"))
            elif name in ("fsync", "fdatasync"):
                dirty.discard(os.readlink(f"/proc/{child}/fd/{arguments[0]}"))
            elif name.startswith("rename"):
                source = _text(child, arguments[0 if name == "rename" else 1])
                found += [path for path in sorted(dirty) if f"{path}/".startswith(f"{source}/")]
    return found


def run_until(function: Callable[[], object], last: int) -> str | None:
    """Kill `function` at moment `last`, counted from 1; what that was, or None where it ended before."""
    seen = 0
    with _traced(function) as child:
        for name, arguments in _entries(child):
            if not _is_step(child, name, arguments):
                continue
            halves = name in ("write", "pwrite64")
            seen += 1 + halves
            if halves and seen == last:
                _write_half(child, arguments)
                return f"half-way through {name} of {arguments[2]} bytes"
            if seen >= last:
                return f"before {name}"
    return None


@contextmanager
def _traced(function: Callable[[], object]) -> Iterator[int]:
    """A forked child that is about to begin and stops at each system call; it is killed at the end of the block."""
    child = _fork(function, traced=True)
    # One that waits for a thread, which was not forked with it, would wait for ever and use no processor time.
    timer = threading.Timer(CLOCK_SECONDS, os.kill, (child, signal.SIGKILL))
    timer.start()
    try:
        os.waitpid(child, 0)
        _request(_SETOPTIONS, child, 0, _MARK_SYSCALLS | _DIE_WITH_TRACER)
        yield child
    finally:
        timer.cancel()
        with suppress(ProcessLookupError, ChildProcessError):  # it ended by itself
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fork(function: Callable[[], object], traced: bool = False) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if traced and _libc.ptrace(_TRACEME, 0, None, None) != 0:
            code = 2
        else:
            limit_cpu()
            if traced:
                os.kill(os.getpid(), signal.SIGSTOP)
            function()
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _entries(child: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and arguments of each call of interest, as the child is about to make it; until it ends."""
    entry, deliver = ctypes.create_string_buffer(88), 0
    while True:
        _request(_SYSCALL, child, 0, deliver)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            _check_ended(status)
            return
        deliver = 0
        if os.WSTOPSIG(status) != _SYSCALL_STOP:
            deliver = os.WSTOPSIG(status)
            continue
        _request(_GET_SYSCALL_INFO, child, len(entry), ctypes.addressof(entry))
        kind, architecture = struct.unpack_from("=B3xI", entry)
        if kind != _ENTRY:
            continue
        assert architecture in _NAMES, f"no table of system calls for architecture {architecture:#x}"
        number, *arguments = struct.unpack_from("=7Q", entry, 24)
        if number in _NAMES[architecture]:
            yield _NAMES[architecture][number], tuple(arguments)


def _is_step(child: int, name: str, arguments: tuple[int, ...]) -> bool:
    if name in _OPENS and name != "openat2":
        flags = {"open": 1, "openat": 2}.get(name)
        return flags is None or bool(arguments[flags] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    if name in _WRITES:
        target = arguments[2] if name == "copy_file_range" else arguments[0]
        return Path(f"/proc/{child}/fd/{target}").is_file()
    return True


def _write_half(child: int, arguments: tuple[int, ...]) -> None:
    """Do the first half of the write that the child is about to do."""
    descriptor, address, size = arguments[:3]
    with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
        content = os.pread(memory.fileno(), size // 2, address)
    position = int(Path(f"/proc/{child}/fdinfo/{descriptor}").read_text().split()[1])
    target = os.open(f"/proc/{child}/fd/{descriptor}", os.O_WRONLY)
    os.pwrite(target, content, position)
    os.close(target)


def _text(child: int, address: int) -> str:
    """The path that a call was given, as the child's memory has it."""
    with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), 4096, address).partition(b"\0")[0].decode()


def _check_ended(status: int) -> None:
    assert status == 0, f"the function failed in the child (wait status {status}), which says why on stderr"


def _request(request: int, child: int, address: int, data: int) -> None:
    if _libc.ptrace(request, child, address, data) < 0:
        pytest.skip(f"this system does not allow ptrace: {os.strerror(ctypes.get_errno())}")
