"""What every script shares: arguments and errors in one line, steps and tables as plain text. Python alone."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from export.base.errors import ExportError, first_line, printable
from export.terminal.commands import PACKAGE, program
from export.terminal.flags import in_flags

Refusals = tuple[type[Exception], ...]
_OURS = ("export", "kernels", "resnet", "scripts", PACKAGE)


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


def run_script(
    command: str,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], int],
    refusals: Refusals = (),
    interrupted: str = "interrupted",
) -> int:
    """The exit code of a script: that of `run(args)`, else by what it raised, which one line on stderr says.

    2 is for what whoever started it can mend: a refusal, a package that is missing, what the operating system says of
    a file, too little memory. 3 is for everything else, which is a fault of this project. 130: it was stopped.

    Args:
        command: the subcommand of the console script that this is.
        args: what `Parser` made of the command line.
        run: does the work.
        refusals: what is a refusal beside ExportError.
        interrupted: what to say where it was stopped.
    """
    try:
        return run(args)
    except KeyboardInterrupt:
        sys.stderr.write(f"{program(command)}: {interrupted}\n")
        return 130
    except Exception as error:
        return _ended(command, error, refusals, args.traceback)


@contextmanager
def importing(command: str) -> Iterator[None]:
    """What a script imports: a package that is missing ends it with 2 and one line on stderr, a fault with 3."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{program(command)}: interrupted\n")
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError) or not _foreign(error):
            sys.exit(_ended(command, error, (), "--traceback" in sys.argv[1:]))
        package = (error.name or "").partition(".")[0]
        remedy = "`make export` installs all in .venv, pip install '.[export]' elsewhere; docs/deploy.md: on a device"
        sys.stderr.write(f"{program(command)}: error: {package} is not installed here: {remedy}\n")
        sys.exit(2)


def _ended(command: str, error: Exception, refusals: Refusals, show_traceback: bool) -> int:
    """Say what ended a script; its exit code."""
    if not _mendable(error, refusals):
        from export.terminal.faults import say_fault  # not for --help, which has to be quick

        say_fault(program(command), error, show_traceback)
        return 3
    sys.stderr.write(f"{program(command)}: error: {in_flags(first_line(error))}\n")
    return 2


def _mendable(error: Exception, refusals: Refusals) -> bool:
    """Whether whoever started a script can mend what ended it."""
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, ImportError):
        return _foreign(error)
    return isinstance(error, (ExportError, MemoryError, *refusals)) or _is_torch_out_of_memory(error)


def _foreign(error: ImportError) -> bool:
    """Whether what cannot be imported is a package of others."""
    return (error.name or "").partition(".")[0] not in _OURS


def _is_torch_out_of_memory(error: Exception) -> bool:
    """PyTorch has no MemoryError: on a GPU it has a type of its own, on a CPU a RuntimeError that says so."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


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
