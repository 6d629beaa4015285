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

from export.base.errors import first_line, printable


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line and suggests the nearest flag."""

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


def run_script(prog: str, run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of a script: `run`'s, or 2 and one line on stderr for what it refuses; 130 where it was stopped."""
    try:
        return run()
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        sys.stderr.write(f"{prog}: error: {first_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: {interrupted}\n")
        return 130


@contextmanager
def importing(prog: str) -> Iterator[None]:
    """What a script imports: a package that is missing ends it with 2 and one line on stderr."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("export", "kernels", "resnet"):
            raise
        remedy = "`make export` installs it in .venv, docs/deploy.md says what a device needs"
        sys.stderr.write(f"{prog}: error: {package} is not installed here: {remedy}\n")
        sys.exit(2)


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
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)][:-1]
    for row in (headings, *rows):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*padded, row[-1]]).rstrip())
