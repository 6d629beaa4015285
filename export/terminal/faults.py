"""How a script ends that neither did its work nor refused it: a fault of this project, with its traceback kept."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from export.base.errors import ExportError, first_line
from export.base.machine import describe_machine, machine_line
from export.base.private_cache import private_folder

_FOLDER = "faults"


def say_fault(program: str, error: BaseException, show: bool) -> None:
    """Say on stderr in one line that the program is at fault; `show` prints the traceback before it, else it is kept.

    Args:
        program: what calls itself so.
        error: what nobody expected.
        show: whether to print the traceback.
    """
    text = "".join(traceback.format_exception(error))
    if show:
        sys.stderr.write(text)
        where = "its traceback is above"
    else:
        where = _kept(program, text)
    said = f"{type(error).__name__}: {first_line(error)}"
    sys.stderr.write(f"{program}: fault: {said}: this is a fault of the program, not of its input; {where}\n")


def _kept(program: str, text: str) -> str:
    """Where the traceback is now; it names files and the command line, so nobody else may read it."""
    header = f"{sys.argv!r}\n{machine_line(describe_machine(None))}\n\n"
    content = (header + text).encode(errors="backslashreplace")
    name = f"{program.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-"
    for folder in (_cache, tempfile.gettempdir):
        try:
            return f"its traceback is in {_written(Path(folder()), name, content)}"
        except (OSError, RuntimeError, ExportError):  # a full disk, no home, a cache that is open to others
            continue
    return "its traceback could not be written: --traceback prints it"


def _cache() -> Path:
    return private_folder(_FOLDER)


def _written(folder: Path, name: str, content: bytes) -> Path:
    """A new file of mode 0600 that appears whole or not at all."""
    descriptor, partial = tempfile.mkstemp(".partial", f".{name}", folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        path = folder / Path(partial).name.removeprefix(".").replace(".partial", ".txt")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return path
