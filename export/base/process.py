"""Work in a process of its own: a crash or a lack of memory there ends as one line here."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import MappingProxyType, TracebackType
from typing import IO, Any

from export.base.errors import ExportError

log = logging.getLogger(__name__)

_ROOT = str(Path(__file__).resolve().parents[2])
# The repository root goes in place of the current folder, where anything could lie.
_START = (
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; "
    "from export.base.process_worker import main; main()"
)
_SECONDS_TO_CLOSE = 10.0
_LAST_LINES = 20
_NONE: Mapping[str, str | None] = MappingProxyType({})


class ChildFault(Exception):
    """A mistake of this project in another process; below the first line of its message, the traceback there."""


class Child:
    """A fresh interpreter that runs functions of modules, and may hold one object and run its methods.

    What it writes on stdout and stderr goes to `logging` at debug level. A context manager: the process ends with it,
    at once where the block is left by an error or by Ctrl-C.
    """

    def __init__(self, task: str, advice: str = "", variables: Mapping[str, str | None] = _NONE) -> None:
        """Nothing runs yet.

        Args:
            task: what the process does, as the subject of a sentence: `building the tensorrt engine`.
            advice: what to try where the process dies or runs out of memory.
            variables: of its environment that are not this one's; None for those that it has not.
        """
        self._task, self._advice, self._variables = task, advice, variables

    def __enter__(self) -> Child:
        level = logging.DEBUG if log.isEnabledFor(logging.DEBUG) else logging.WARNING
        environment = {**os.environ, **self._variables}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, _ROOT, str(level)],
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._reader = Thread(target=self._read_log, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError):  # it is dead, and what was left to write has no reader
                self._requests.close()  # the worker ends when nothing more can come
            if kind is None:
                self._end()
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(_SECONDS_TO_CLOSE)
            self._replies.close()

    def run(self, target: str, *arguments: Any) -> Any:
        """What `module:function` returns for the arguments.

        Raises:
            ExportError: it refuses, a library fails in it, or the process dies; one line.
            ChildFault: it raises anything else.
        """
        return self._request("run", target, arguments)

    def hold(self, target: str, *arguments: Any) -> None:
        """Make `module:class` the object whose methods `call` runs; its `close` is run at the end."""
        self._request("hold", target, arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the held object returns; raises as `run` does."""
        return self._request("call", method, arguments)

    def _request(self, *request: Any) -> Any:
        try:
            pickle.dump(request, self._requests, protocol=5)
            self._requests.flush()
            outcome, value = pickle.load(self._replies)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise ExportError(self._obituary()) from None
        if outcome == "memory":
            raise ExportError(f"{self._task} ran out of memory{self._what_to_try()}")
        if outcome == "refused":
            raise ExportError(value)
        if outcome == "failed":
            raise ExportError(f"{self._task} failed: {value}")
        if outcome == "fault":
            said, trace = value
            raise ChildFault(f"{self._task} failed: {said}\n\n{trace}")
        return value

    def _obituary(self) -> str:
        """What ended the process, in one line."""
        code = self._end()
        if code < 0:
            known = {member.value: member.name for member in signal.Signals}
            name = known.get(-code, f"signal {-code}")
            cause = " (most likely out of memory)" if name == "SIGKILL" else ""
            return f"{self._task} was ended by {name}{cause}{self._what_to_try()}"
        last = f", its last words: {self._lines[-1]}" if self._lines else ""
        return f"{self._task} ended with exit code {code}{last}{self._what_to_try()}"

    def _end(self) -> int:
        """The exit code of a process that ends by itself, or soon does not."""
        try:
            self._process.wait(_SECONDS_TO_CLOSE)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        self._reader.join(_SECONDS_TO_CLOSE)
        return code

    def _what_to_try(self) -> str:
        return f": {self._advice}" if self._advice else ""

    def _read_log(self, stream: IO[bytes]) -> None:
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                if line:
                    self._lines.append(line)
                    log.debug("%s", line)


def run_in_child(task: str, advice: str, target: str, *arguments: Any) -> Any:
    """What `module:function` returns in a process of its own.

    Raises:
        ExportError, ChildFault: as `Child.run` does.
    """
    with Child(task, advice) as child:
        return child.run(target, *arguments)
