"""What goes into a network, the batch sizes it accepts, and any number of images run in such batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.base.errors import ExportError

INPUT = "input"  # what a network's only input is called; several have the names of forward's parameters
# What an input is made of: what the network computes with, [N, ...], or pictures as bytes, [N, H, W, C].
FLOAT32, UINT8 = "float32", "uint8"

Arrays = dict[str, NDArray]
Inputs = Mapping[str, NDArray]  # name -> [N, ...], a row of each per image, in the order of the network


@dataclass(frozen=True)
class Batch:
    """The batch sizes an exported network accepts; `minimum == maximum` is a static batch."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise ExportError(
                f"batch must satisfy 1 <= MIN <= OPT <= MAX, got {self.minimum}:{self.optimum}:{self.maximum}"
            )

    @property
    def static(self) -> bool:
        return self.minimum == self.maximum

    def __str__(self) -> str:
        if self.static:
            return str(self.minimum)
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


DEFAULT_BATCH = Batch(1, 8, 32)
_PIXELS_AT_ONCE = 8 * 224**2  # 26 MB for each value of 16 channels and as many pixels in float32


def as_batch(value: Batch | tuple[int, int, int] | int) -> Batch:
    """A Batch from (minimum, optimum, maximum) or from one static size."""
    if isinstance(value, Batch):
        return value
    return Batch(value, value, value) if isinstance(value, int) else Batch(*value)


def count_of(inputs: Inputs) -> int:
    """How many images there are."""
    return len(next(iter(inputs.values())))


def rows_of(inputs: Inputs, rows: Any) -> Arrays:
    """Some of the images: a slice, or their numbers."""
    return {name: values[rows] for name, values in inputs.items()}


def resized(inputs: Inputs, count: int) -> Arrays:
    """The first `count` images, over and over where there are fewer."""
    return {name: np.resize(values, (count, *values.shape[1:])) for name, values in inputs.items()}


def named(given: NDArray | Inputs, names: Iterable[str]) -> Inputs:
    """Inputs by their names: those of a network with one may be given as they are.

    Raises:
        ExportError: an array without a name, for a network with several inputs.
    """
    if isinstance(given, Mapping):
        return given
    names = list(names)
    if len(names) > 1:
        raise ExportError(f"expected inputs by name, {', '.join(names)}: got one array without a name")
    return {names[0]: given}


def run_in_batches(infer: Callable[[Inputs], Arrays], inputs: Inputs, batch: Batch, size: int) -> Arrays:
    """The outputs for all images, in batches of about `size` that `batch` allows.

    A batch that would be smaller than the minimum is filled up with images that are dropped again.

    Args:
        infer: of a runner: one batch, {input name: [N, ...]} -> {output name: [N, ...]}.
        inputs: at least one image.
    """
    size = min(max(size, batch.minimum), batch.maximum)
    parts = []
    for start in range(0, count_of(inputs), size):
        part = rows_of(inputs, slice(start, start + size))
        count = count_of(part)
        outputs = infer(part if count >= batch.minimum else resized(part, batch.minimum))
        parts.append(rows_of(outputs, slice(count)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def at_once(inputs: Inputs) -> int:
    """How many images like these to compute on together, by the memory of their values; at least two."""
    return max(2, _PIXELS_AT_ONCE // pixels_of(inputs))


def pixels_of(inputs: Inputs) -> int:
    """Of an image, in all inputs together; at least 1."""
    return max(1, sum(map(_pixels, inputs.values())))


def _pixels(values: NDArray) -> int:
    """Of an image; 1 of a vector."""
    return math.prod(values.shape[1:3] if values.dtype == UINT8 else values.shape[2:])
