"""What a person at a terminal sees: arguments refused in one line, progress, and the table of rungs."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from export.parity.report import Rung


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line and suggests the nearest flag."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
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


class Progress:
    """Says on stderr which step runs and how long each took: a spinner on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status("")
        self._step: str | None = None
        self._started = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()
        self._status.stop()

    def __call__(self, step: str) -> None:
        """Begin the next step; the one before it is done."""
        self._finish()
        self._step, self._started = step, time.perf_counter()
        if self._console.is_terminal:
            self._status.update(step)
            self._status.start()

    def say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def _finish(self) -> None:
        if self._step is not None:
            self.say(f"{time.perf_counter() - self._started:7.1f} s  {self._step}")
        self._step = None


def print_rungs(rungs: Sequence[Rung], files: Mapping[str, int]) -> None:
    """Print the table of rungs on stdout; `files` gives the size in bytes of each artefact."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("form", "runtime"):
        table.add_column(heading)
    for heading in ("operators", "error", "eager error", "ratio", "top-1", "MB", "ms/image"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for rung in rungs:
        table.add_row(*_cells(rung, files.get(rung.file, 0)), style="" if rung else "red")
    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(table)


def _cells(rung: Rung, size: int) -> list[str]:
    worst = rung.worst
    measured = ["", "", "", ""]
    if worst is not None:
        agreement = "" if worst.top1_agreement is None else f"{100 * worst.top1_agreement:.0f} %"
        measured = [f"{worst.error:.2e}", f"{worst.eager_error:.2e}", f"{worst.ratio:.2f}", agreement]
    operators = ""
    if rung.operators is not None:
        operators = f"{sum(map(bool, rung.operators.checks))}/{len(rung.operators.checks)}"
    megabytes = f"{size / 1e6:.1f}" if size else ""
    milliseconds = f"{1000 * rung.seconds:.0f}" if rung.seconds else ""
    verdict = rung.verdict
    if verdict == "equal" and worst is not None and worst.decision == "no verdict":
        verdict = "equal, no verdict on top-1"
    return [rung.name, rung.runtime, operators, *measured, megabytes, milliseconds, verdict]
