"""What values the activations of a network take on pictures, and how much of that range is worth its bits."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from export.base.batch import DEFAULT_BATCH, Batch, Inputs, at_once, count_of, named, resized, rows_of
from export.base.errors import ExportError
from export.base.normalisation import Normalisation
from export.base.progress import Progress, silent, sparsely
from export.fusion.capture import plain_torch
from export.fusion.casting import converted
from export.fusion.nodes import input_nodes, module_path, source_name
from export.quantisation import calibration_cache
from export.quantisation.magnitudes import BINS, LEVELS, PERCENTILE, STEP, Entropy, Extremes, Percentile
from export.quantisation.methods import DEFAULT_METHOD, METHODS
from export.quantisation.quantise import is_input, quantised_values
from export.quantisation.scheme import CPU, Range

_LOG = logging.getLogger(__name__)

WANTED_IMAGES = 100
_HASHED = 8  # images at a time
_VERSION = 1  # of the methods, for the cache


class Pictures(Protocol):
    """Inputs of a network, to calibrate on."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[NDArray | Inputs]:
        """All inputs in order, [n, C, H, W] with n at most `size`, or several by name; the same in every call."""


@dataclass(frozen=True)
class InMemory:
    """Inputs that are there already as pictures to calibrate on: [N, C, H, W], or several [N, ...] by name."""

    images: NDArray | Inputs

    def __len__(self) -> int:
        return len(self.images) if isinstance(self.images, np.ndarray) else count_of(self.images)

    def batches(self, size: int) -> Iterator[NDArray | Inputs]:
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield self.images[rows] if isinstance(self.images, np.ndarray) else rows_of(self.images, rows)


@dataclass(frozen=True)
class NormalisedPictures:
    """Pictures that are bytes, [n, H, W, C] or several by name, as the network computes with them."""

    pictures: Pictures
    normalisation: Normalisation

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, size: int) -> Iterator[NDArray[np.float32] | Inputs]:
        for given in self.pictures.batches(size):
            yield self.normalisation.of(given) if isinstance(given, Mapping) else self.normalisation(given)


@dataclass(frozen=True)
class Calibration:
    """Ranges and where they come from.

    Attributes:
        ranges: `source_name` of a value -> what its scale covers.
        method: one of METHODS.
        images: how many were shown.
        sha256: of them, as the network took them.
    """

    ranges: dict[str, Range]
    method: str
    images: int
    sha256: str


def calibrate(
    graph_module: fx.GraphModule,
    pictures: Pictures,
    method: str = DEFAULT_METHOD,
    batch: Batch = DEFAULT_BATCH,
    progress: Progress = silent,
) -> Calibration:
    """Find the range of every value that quantisation needs, or take it from the cache.

    `minmax` covers everything that was seen; `percentile` the smallest 99.99 % of magnitudes; `entropy` as much as
    loses the least information in 128 levels, by the Kullback-Leibler divergence. None covers more than was seen. The
    network's input keeps all of its range: its extremes are black and white, not outliers.

    Args:
        graph_module: fused at level b, with `split_addition`; float64.
        pictures: at least one.
        method: one of METHODS.
        batch: the sizes that the graph accepts; the last images are shown again where they are too few for one.
        progress: called with what is being done.

    Raises:
        ExportError: no pictures, an unknown method, or a value that is NaN or Inf; names the layer.

    Source:
        S. Migacz, "8-bit Inference with TensorRT", GTC 2017, for `entropy`.
    """
    if method not in METHODS:
        raise ExportError(f"expected a calibration method of {', '.join(METHODS)}, got {method!r}")
    if not len(pictures):
        raise ExportError("expected pictures to calibrate on, got none")
    if len(pictures) < WANTED_IMAGES:
        _LOG.warning("calibrating on %d images: at least %d are wanted", len(pictures), WANTED_IMAGES)
    seen, names = hashlib.sha256(), list(input_nodes(graph_module))
    for inputs in pictures.batches(_HASHED):
        for images in _ordered(inputs, names).values():
            seen.update(str(images.shape).encode() + np.ascontiguousarray(images).tobytes())
    key = _key(graph_module, seen.hexdigest(), method)
    ranges = calibration_cache.read(key)
    wanted = {str(source_name(node)) for node in quantised_values(graph_module, CPU)}
    if ranges is None or ranges.keys() != wanted:
        ranges = _ranges(graph_module, pictures, method, batch, progress)
        calibration_cache.write(key, ranges)
    return Calibration(ranges, method, len(pictures), seen.hexdigest())


def _ordered(given: NDArray | Inputs, names: Sequence[str]) -> Inputs:
    """Inputs in the order of the network."""
    inputs = named(given, names)
    return {name: inputs[name] for name in names}


def _key(graph_module: fx.GraphModule, inputs: str, method: str) -> str:
    """Of the network, the inputs and the settings: nothing else changes the result by more than rounding."""
    digest = hashlib.sha256()
    for part in (_VERSION, inputs, method, PERCENTILE, BINS, LEVELS, STEP, graph_module.graph):
        digest.update(f"{part}\n".encode())
    for name, tensor in sorted([*graph_module.named_parameters(), *graph_module.named_buffers()]):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _ranges(
    graph_module: fx.GraphModule, pictures: Pictures, method: str, batch: Batch, progress: Progress
) -> dict[str, Range]:
    values = {str(source_name(node)): node for node in quantised_values(graph_module, CPU)}
    order, say = list(input_nodes(graph_module)), sparsely(progress)
    first = _ordered(next(iter(pictures.batches(1))), order)
    size = min(max(at_once(first), batch.minimum), batch.maximum)
    single = converted(graph_module, torch.float32)

    def show(what: str, seen: Mapping[str, Extremes]) -> None:
        observer, done = _Observer(single, {values[name].name: found for name, found in seen.items()}), 0
        for inputs in _of_size(pictures.batches(size), size, order):
            done += count_of(inputs)
            say(f"calibrate: {what} of {len(seen)} value{'s' * (len(seen) != 1)}, {done} of {len(pictures)} images")
            shown = resized(inputs, max(count_of(inputs), batch.minimum))
            observer.run(*map(torch.from_numpy, shown.values()))

    batches = math.ceil(len(pictures) / size)
    cut = {name for name, node in values.items() if method != "minmax" and not is_input(node)}
    seen = {name: Percentile(batches) if name in cut and method == "percentile" else Extremes() for name in values}
    with plain_torch():
        show("ranges", seen)
        for name, found in seen.items():
            if not found.finite:
                raise ExportError(f"{module_path(values[name])}: NaN or Inf on the calibration images")
        if method == "entropy":
            counted = {name: Entropy(seen[name]) for name in cut}
            show("histograms", counted)
            seen |= counted
    return {name: found.covered for name, found in seen.items()}


def _of_size(batches: Iterator[NDArray | Inputs], size: int, names: Sequence[str]) -> Iterator[Inputs]:
    """The same pictures `size` at a time, in the end what is left."""
    held: Inputs | None = None
    for given in batches:
        new = _ordered(given, names)
        held = new if held is None else {name: np.concatenate([held[name], new[name]]) for name in names}
        while count_of(held) >= size:
            yield rows_of(held, slice(size))
            held = rows_of(held, slice(size, None))
    if held is not None and count_of(held):
        yield held


class _Observer(fx.Interpreter):
    """Runs a graph and shows some of its values, as they are computed, to who takes note of them."""

    def __init__(self, graph_module: fx.GraphModule, seen: Mapping[str, Extremes]) -> None:
        """`seen`: node -> who takes note of its value."""
        super().__init__(graph_module)
        self._seen = seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._seen:
            self._seen[n.name].see(value)
        return value
