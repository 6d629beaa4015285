"""The batch sizes a network accepts, and any number of images run in such batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.base.errors import ExportError

Arrays = dict[str, NDArray]


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
_PIXELS_AT_ONCE = 2**21  # 32 images of 256 x 256: 0.5 GB for each value of 64 channels in float32


def as_batch(value: Batch | tuple[int, int, int] | int) -> Batch:
    """A Batch from (minimum, optimum, maximum) or from one static size."""
    if isinstance(value, Batch):
        return value
    return Batch(value, value, value) if isinstance(value, int) else Batch(*value)


def run_in_batches(
    infer: Callable[[Mapping[str, NDArray]], Arrays], images: NDArray, batch: Batch, size: int
) -> Arrays:
    """The outputs for all images, in batches of about `size` that `batch` allows.

    A batch that would be smaller than the minimum is filled up with images that are dropped again.

    Args:
        infer: of a runner: one batch, {"input": [N, C, H, W]} -> {output name: [N, ...]}.
        images: [N, C, H, W], at least one.
    """
    size = min(max(size, batch.minimum), batch.maximum)
    parts = []
    for start in range(0, len(images), size):
        part = filled = images[start : start + size]
        if len(part) < batch.minimum:
            filled = np.resize(part, (batch.minimum, *part.shape[1:]))
        outputs = infer({"input": filled})
        parts.append({name: values[: len(part)] for name, values in outputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def at_once(images: NDArray) -> int:
    """How many images like these, [N, C, H, W], to compute on together, by the memory of their values; at least two."""
    return max(2, _PIXELS_AT_ONCE // max(1, math.prod(images.shape[2:])))
