"""Errors on a logarithmic scale, one row for each operator: what the template draws, in percent of the width.

A point is where its value is; 0 is at the left edge and what is not finite at the right one, each with a shape of its
own. Plots of one measure share one scale, so that they can be compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.report.numbers import is_finite, number, percent, short

Check = Mapping[str, Any]
_APART = 14.0  # percent of the width between two labels of an axis
_LINES = 8  # powers of ten that are drawn
_SMALLEST = 1e-150  # what is smaller is drawn there; its quotients are still numbers


@dataclass(frozen=True)
class Series:
    """One number of every check.

    Attributes:
        label: its column.
        value, limit: where a check has it and what it may not exceed; a check without a limit has none drawn.
        shape: what marks it, `dot` or `diamond`.
        form: writes it.
    """

    label: str
    value: str
    limit: str
    shape: str
    form: Callable[[float | None], str]


@dataclass(frozen=True)
class Measure:
    """What is plotted of one kind of check.

    Attributes:
        heading: of the plot.
        column: of the names.
        series: what is drawn.
        columns: label -> what is only written.
    """

    heading: str
    column: str
    series: tuple[Series, ...]
    columns: tuple[tuple[str, str], ...] = ()


def _hundredths(value: float | None) -> str:
    return number(value, ".2f")


Z = Measure(
    "Error of each operator, in units of what rounding explains",
    "operator",
    (
        Series("rms z", "rms_z", "rms_limit", "dot", _hundredths),
        Series("max z", "max_z", "max_limit", "diamond", _hundredths),
    ),
)
VALUES = Measure(
    "Share of each quantised value that differs from the float64 result of the same scales",
    "value",
    (Series("differing", "differing", "differing_limit", "dot", percent),),
    (("LSB", "lsb"),),
)
LAYERS = Measure(
    "Error of each quantised layer, in units of what rounding its weights explains",
    "layer",
    (Series("max z", "lsb", "lsb_limit", "diamond", _hundredths),),
)
COSTS = Measure(
    "Error of the output when one layer alone computes in 8 bits, the highest first",
    "layer",
    (Series("error", "error", "", "dot", short),),
)


@dataclass(frozen=True)
class Point:
    x: float
    shape: str


@dataclass(frozen=True)
class Line:
    """A limit or, in an axis, a label."""

    x: float
    shape: str
    label: str = ""


@dataclass(frozen=True)
class Row:
    """One check; `reason` is why it failed, empty where it passed."""

    name: str
    title: str
    points: tuple[Point, ...]
    limits: tuple[Line, ...]
    cells: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Plot:
    """All checks of one measure of one form; `axis` names, for each series, the limit of most checks."""

    measure: Measure
    labels: tuple[str, ...]
    axis: tuple[Line, ...]
    grid: tuple[float, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Scale:
    """From a value to where it is, in percent of the width."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Scale:
        """One that holds the positive ones, with some room on both sides."""
        positive = [value for value in values if is_finite(value) and value > 0] or [1.0]
        return cls(max(min(positive) / 2, _SMALLEST), min(1.6 * max(positive), 1 / _SMALLEST))

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def decades(self) -> list[float]:
        """The powers of ten in it; of a wide scale, only some, of a narrow one maybe none."""
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        return [10.0**exponent for exponent in range(first, last + 1, 1 + max(last - first, 0) // _LINES)]


def plots(measure: Measure, forms: Sequence[Sequence[Check]]) -> list[Plot]:
    """One plot for the checks of each form, all on one scale."""
    everything = [check for checks in forms for check in checks]
    values = [
        check.get(key) for check in everything for series in measure.series for key in (series.value, series.limit)
    ]
    scale = Scale.of(values)
    return [_plot(measure, scale, checks) for checks in forms]


def _plot(measure: Measure, scale: Scale, checks: Sequence[Check]) -> Plot:
    labels = (*(series.label for series in measure.series), *(label for label, _ in measure.columns))
    rows = tuple(_row(measure, scale, check) for check in checks)
    limits = Counter(line for row in rows for line in row.limits)
    axis = list({line.shape: line for line, _ in reversed(limits.most_common())}.values())
    grid = scale.decades()
    for decade in grid:
        line = Line(scale(decade), "decade", _axis_label(measure, decade))
        if all(abs(line.x - other.x) >= _APART for other in axis):
            axis.append(line)
    return Plot(measure, labels, tuple(axis), tuple(scale(decade) for decade in grid), rows)


def _row(measure: Measure, scale: Scale, check: Check) -> Row:
    points, limits, cells, told = [], [], [], []
    for series in measure.series:
        value, limit = check[series.value], check.get(series.limit)
        points.append(_point(scale, value, series.shape))
        cells.append(series.form(value))
        told.append(f"{series.label} {cells[-1]}")
        if is_finite(limit) and limit > 0:
            limits.append(Line(scale(limit), series.shape, _axis_label(measure, limit)))
            told[-1] += f", limit {series.form(limit)}"
    cells += [short(check[key]) for _, key in measure.columns]
    name, reason = str(check["name"]), str(check.get("reason", ""))
    title = "; ".join(filter(None, [name, str(check.get("kind", "")), *told, reason]))
    return Row(name, title, tuple(points), tuple(limits), tuple(cells), reason)


def _point(scale: Scale, value: float | None, shape: str) -> Point:
    if not is_finite(value):
        return Point(100.0, "beyond")
    return Point(scale(value), shape) if value > 0 else Point(0.0, "zero")


def _axis_label(measure: Measure, value: float) -> str:
    return percent(value) if measure.series[0].form is percent else f"{value:g}"
