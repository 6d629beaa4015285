"""The other end of `export.base.process`: reads requests on stdin and answers them until no more come."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from typing import Any

from export.base.errors import ExportError, first_line, is_mendable

_SECONDS_BETWEEN_LOOKS = 0.5


def main() -> None:
    """Serve; the arguments are the repository root, which is on the path already, and the level of the log."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which may reach every process of a terminal or a
        signal.signal(number, signal.SIG_IGN)  # service: the parent decides
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is log, not an answer
    logging.basicConfig(level=int(sys.argv[2]), format="%(message)s", stream=sys.stderr)
    held = None
    try:
        while True:
            try:
                request = pickle.load(sys.stdin.buffer)
            except EOFError:
                break
            answer, held = _answer(request, held)
            pickle.dump(answer, replies, protocol=5)
            replies.flush()
    finally:
        if held is not None:
            held.close()


def _end_with(parent: int) -> None:
    """End this process when that one is gone, killed before it could say so, whatever is being computed."""
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _answer(request: tuple[str, str, tuple[Any, ...]], held: Any) -> tuple[tuple[str, Any], Any]:
    """An outcome with its value or its reason, and the object held from now on."""
    kind, target, arguments = request
    try:
        if kind == "call":
            return ("done", getattr(held, target)(*arguments)), held
        module, name = target.split(":")
        value = getattr(importlib.import_module(module), name)(*arguments)
        return (("done", None), value) if kind == "hold" else (("done", value), held)
    except ExportError as error:
        return ("refused", str(error)), held
    except MemoryError:
        return ("memory", None), held
    except Exception as error:
        traceback.print_exc()
        if is_mendable(error):
            return ("failed", f"{type(error).__name__}: {first_line(error)}"), held
        return ("fault", (f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())), held
