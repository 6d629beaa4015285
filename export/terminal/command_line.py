"""What every script shares: arguments and errors in one line, steps and tables as plain text. Python alone."""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from export.base.errors import first_line, how_to_install, is_foreign, is_mendable, printable
from export.terminal.commands import program
from export.terminal.flags import in_flags

Refusals = tuple[type[Exception], ...]
_SECONDS_TO_TIDY_UP = 5.0


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line, suggests the nearest flag, and knows the flags that every script has.

    Args:
        command: the subcommand of the console script that this is.
        description: what it does.
    """

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=program(command), description=description)
        self.add_argument("--traceback", action="store_true", help="print where a fault of this program comes from")

    def add_runtime(self) -> None:
        """The flag that says what runs a bundle's files."""
        self.add_argument(
            "--runtime",
            default="",
            metavar="NAME",
            help="only what it runs: tensorrt, tensorrt-rtx, kernels, onnxruntime or openvino; default all but that",
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):  # which argparse would take for no value at all
                self.error(f"argument {argument.removesuffix('=--')}: expected a value, got '--'")
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)


class _StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at that moment: while something moves on the terminal, that puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


def show_log(informing: str = "") -> None:
    """Log warnings on stderr, one line each, and what one package has to tell."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StderrHandler()])
    if informing:
        logging.getLogger(informing).setLevel(logging.INFO)


def run_script(
    command: str,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], int],
    refusals: Refusals = (),
    interrupted: str = "interrupted",
) -> int:
    """The exit code of a script: that of `run(args)`, else by what it raised, which one line on stderr says.

    2 is for what whoever started it can mend: a refusal, a package that is missing, what the operating system says of
    a file, too little memory. 3 is for everything else, which is a fault of this project. 128 + n: signal n stopped it,
    of SIGINT, SIGTERM and SIGHUP, after it has tidied up.

    Args:
        command: the subcommand of the console script that this is.
        args: what `Parser` made of the command line.
        run: does the work.
        refusals: what is a refusal beside ExportError.
        interrupted: what to say where it was stopped.
    """
    with _Signals() as signals:
        try:
            return run(args)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, Exception) and not signals.received:
                return _ended(command, error, refusals, args.traceback)
            number = signals.received or signal.SIGINT
            said = interrupted if number == signal.SIGINT else f"{interrupted} by {number.name}"
            with suppress(OSError):  # the terminal may be gone
                sys.stderr.write(f"{program(command)}: {said}\n")
            return 128 + number


class _Signals:
    """While it is entered, what would end this process raises KeyboardInterrupt: whatever is open tidies up.

    What comes while that lasts, as a second SIGHUP from a shell whose terminal was closed, changes nothing. A signal
    that is ignored, or that somebody else handles, stays so.

    Attributes:
        received: the signal that came, None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None or now - self._since > _SECONDS_TO_TIDY_UP:
            self.received, self._since = signal.Signals(number), now
            raise KeyboardInterrupt


@contextmanager
def importing(command: str) -> Iterator[None]:
    """What a script imports: a package that is missing ends it with 2 and one line on stderr, a fault with 3.

    Garbage is not looked for meanwhile, nor later among what there is then: a million objects that stay.
    """
    gc.disable()
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{program(command)}: interrupted\n")
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError) or not is_foreign(error):
            sys.exit(_ended(command, error, (), "--traceback" in sys.argv[1:]))
        package = (error.name or "").partition(".")[0]
        remedy = f"{how_to_install('export')} brings it on a workstation; on a device see docs/deploy.md"
        if package == "PIL":  # all that a device lacks for pictures
            remedy = f"{how_to_install('pictures')} brings it"
        sys.stderr.write(f"{program(command)}: error: {package} is not installed here: {remedy}\n")
        sys.exit(2)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else Triton's bindings, at the end, say on a page what they leak
        gc.enable()


def leave(code: int) -> NoReturn:
    """End this process as sys.exit does, but do not take its modules apart one by one: of PyTorch that is a second."""
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start
            stream.flush()
    except (OSError, ValueError):  # a full disk, a pipe without a reader: Python has words and a code for it
        sys.exit(code)
    os._exit(code)


def _ended(command: str, error: Exception, refusals: Refusals, show_traceback: bool) -> int:
    """Say what ended a script; its exit code."""
    if not isinstance(error, refusals) and not is_mendable(error):
        from export.terminal.faults import say_fault  # not for --help, which has to be quick

        say_fault(program(command), error, show_traceback)
        return 3
    sys.stderr.write(f"{program(command)}: error: {in_flags(first_line(error))}\n")
    return 2


class Steps:
    """Says on stderr how long each step took."""

    def __init__(self) -> None:
        self._step: str | None = None
        self._started = 0.0

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def __call__(self, step: str) -> None:
        """Begin the next step; the one before it is done."""
        self._finish()
        self._step, self._started = step, time.perf_counter()

    def _finish(self) -> None:
        if self._step is not None:
            print(f"{time.perf_counter() - self._started:7.1f} s  {self._step}", file=sys.stderr)
        self._step = None


def print_columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text under their headings on stdout; the last column is as wide as it is."""
    rows = [[in_flags(printable(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)][:-1]
    for row in (headings, *rows):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*padded, row[-1]]).rstrip())
