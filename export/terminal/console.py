"""What a person at a terminal sees: progress and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from export.base.usage import StepUsage, UsageMeter
from export.runtime.onnx_session import CPU_ONNX_FILE
from export.runtime.parity.accuracy import Accuracy
from export.runtime.parity.rungs import RUNG_HEADINGS, Quantisation
from export.terminal.flags import in_flags

if TYPE_CHECKING:
    from export.runtime.parity.rungs import Rung

_SECONDS_BETWEEN_LINES = 10.0
_BAR_WIDTH = 30
_COSTS_SHOWN = 5
_WIDTH = 132  # where there is no terminal


def stderr_console() -> Console:
    """A console on stderr; its lines, and those that others write while something moves on it, are never broken.

    What moves has to be told `redirect_stdout=sys.stdout.isatty()`: else what is printed into a file ends here.
    """
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Progress:
    """Says on stderr which step runs and how long each took: a spinner on a terminal, plain lines elsewhere.

    Attributes:
        usage: what each step used, once it is done; None where nobody asked for it.
    """

    def __init__(self, measured: bool = False) -> None:
        self.usage = UsageMeter() if measured else None
        self._console = stderr_console()
        self._spinner = Spinner("dots")
        self._live = Live(self._spinner, console=self._console, transient=True, redirect_stdout=sys.stdout.isatty())
        self._step: str | None = None
        self._started = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()
        self._live.stop()

    def __call__(self, step: str) -> None:
        """Begin the next step; the one before it is done."""
        self._finish()
        if self.usage is not None and not self.usage.steps:
            self.usage.end("start")
        self._step, self._started = step, time.perf_counter()
        if self._console.is_terminal:
            self._spinner.update(text=Text(step))
            self._live.start(refresh=True)

    def transferred(self, done: int, total: int) -> None:
        """How far a transfer is that the present step makes."""
        if self._console.is_terminal:
            self._spinner.update(text=Text(f"{self._step}: {done / 1e6:.0f} of {total / 1e6:.0f} MB"))

    def say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def _finish(self) -> None:
        if self._step is not None:
            self.say(f"{time.perf_counter() - self._started:7.1f} s  {self._step}")
            if self.usage is not None:
                self.usage.end(self._step)
        self._step = None


@contextmanager
def images_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Says on stderr how many of `total` images are done: a bar on a terminal, now and then a line elsewhere.

    What it gives is called with how many are done; whoever does not finish leaves no last line.
    """
    console = stderr_console()
    started = printed = time.perf_counter()
    if console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with RichProgress(
            *columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=sys.stdout.isatty()
        ) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:

        def line(done: int) -> None:
            nonlocal printed
            now = time.perf_counter()
            if done < total and now - printed >= _SECONDS_BETWEEN_LINES:
                printed = now
                console.print(f"{now - started:7.1f} s  {what}: {done} of {total} images", markup=False)

        yield line
    console.print(f"{time.perf_counter() - started:7.1f} s  {what}: {total} images", markup=False)


def print_usage(steps: Sequence[StepUsage]) -> None:
    """Print on stdout what each step of a run used, and what all of them did."""
    table = Table(title="where it went", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("step")
    for heading in ("CPU s", "wall s", "peak MB"):
        table.add_column(heading, justify="right")
    peaks = [step.peak_mb for step in steps if step.peak_mb is not None]
    total = StepUsage(
        "all", sum(step.cpu_s for step in steps), sum(step.wall_s for step in steps), max(peaks, default=None)
    )
    for step in (*steps, total):
        peak = "" if step.peak_mb is None else f"{step.peak_mb:.0f}"
        table.add_row(Text(step.step), f"{step.cpu_s:.1f}", f"{step.wall_s:.1f}", peak)
    print_table(table)


def print_accuracy(accuracy: Sequence[Accuracy]) -> None:
    """Print on stdout what each form gets right, the eager model before the export first."""
    table = Table(title="accuracy before and after", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("form", "runtime", "precision"):
        table.add_column(heading)
    for heading in ("top-1", "difference", "images"):
        table.add_column(heading, justify="right")
    for form in accuracy:
        difference = "" if form is accuracy[0] else _difference(form, accuracy[0])
        measured = (f"{100 * form.top1:.2f} %", difference, str(form.images))
        table.add_row(form.form, form.runtime, form.precision, *measured)
    print_table(table)


def print_quantisation(quantisation: Quantisation) -> None:
    """Print on stdout what was quantised and which layers cost most."""
    q = quantisation
    kept = f"kept in floating point: {', '.join(q.kept)}" if q.kept else "none kept in floating point"
    print(f"{q.layers} layers quantised, {kept}; calibrated on {q.images} images ({q.method})")
    if q.float_convolutions and not q.kept:
        print(f"ONNX Runtime runs {q.float_convolutions} convolutions of {CPU_ONNX_FILE} in floating point")
    if not q.costs:
        print("what a layer in 8 bits costs was not measured; --layer-costs does")
        return
    table = Table(title="what a layer in 8 bits costs", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("layer")
    table.add_column("error of the output", justify="right")
    for cost in q.costs[:_COSTS_SHOWN]:
        table.add_row(cost.name, f"{cost.error:.1e}")
    print_table(table)
    if len(q.costs) > _COSTS_SHOWN:
        print(f"and {len(q.costs) - _COSTS_SHOWN} layers that cost less: all are in parity.json")


def print_evaluation(measured: Sequence[tuple[str, str, Accuracy]]) -> None:
    """Print on stdout the bundle, artefact and accuracy of each; differences are to the first."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("bundle", "artefact", "runtime", "precision"):
        table.add_column(heading)
    for heading in ("images", "correct", "top-1", "difference", "images/s"):
        table.add_column(heading, justify="right")
    for index, (bundle, file, found) in enumerate(measured):
        difference = _difference(found, measured[0][2]) if index else ""
        rate = f"{found.images / found.seconds:.0f}"
        counts = (str(found.images), str(found.correct), f"{100 * found.top1:.2f} %", difference, rate)
        table.add_row(Text(bundle), Text(file), found.runtime, found.precision, *counts)
    print_table(table)


def _difference(form: Accuracy, first: Accuracy) -> str:
    """How much more or less of the images `form` gets right."""
    return f"{100 * (form.top1 - first.top1):+.2f} pp"


def print_predictions(picture: str, predictions: Sequence[tuple[str, float]]) -> None:
    """Print on stdout a picture's classes, each with its probability."""
    table = Table(show_header=False, box=None)
    table.add_column(justify="right")
    for label, probability in predictions:
        table.add_row(f"{100 * probability:.2f} %", Bar(1, 0, probability, width=_BAR_WIDTH), Text(label))
    console = _stdout()
    console.print(Text(picture), soft_wrap=True)
    console.print(table)


def print_table(table: Table, width: int = _WIDTH) -> None:
    """Print a table on stdout; `width` is how wide it may be where there is no terminal, in characters."""
    _stdout(width).print(table)


def _stdout(width: int = _WIDTH) -> Console:
    """As wide as the terminal; wide enough for every column where there is none."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def print_rungs(rungs: Sequence[Rung], files: Mapping[str, int]) -> None:
    """Print the table of rungs on stdout; `files` gives the size in bytes of each artefact."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for heading in RUNG_HEADINGS:
        table.add_column(heading, justify="left" if heading in ("form", "runtime", "verdict") else "right")
    for rung in rungs:
        cells = map(in_flags, rung.cells(files.get(rung.file, 0)))
        table.add_row(*cells, style="" if rung else "red")
    print_table(table)
