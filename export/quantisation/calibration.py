"""What values the activations of a network take on pictures, and how much of that range is worth its bits."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import rel_entr
from torch import Tensor, fx

from export.base.batch import DEFAULT_BATCH, Batch, Inputs, count_of, named, resized, rows_of
from export.base.errors import ExportError
from export.base.normalisation import Normalisation
from export.base.progress import Progress, silent, sparsely
from export.fusion.capture import plain_torch
from export.fusion.casting import converted
from export.fusion.nodes import input_nodes, module_path, source_name
from export.quantisation import calibration_cache
from export.quantisation.methods import DEFAULT_METHOD, METHODS
from export.quantisation.quantise import is_input, quantised_values
from export.quantisation.scheme import CPU, Range

_LOG = logging.getLogger(__name__)

WANTED_IMAGES = 100
_PERCENTILE = 99.99
_BINS = 2048
_LEVELS = 128  # of the magnitude of a signed byte
_STEP = 8  # between the candidates of the entropy method, in bins
_BATCH = 8  # images in memory at once
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
    for inputs in pictures.batches(_BATCH):
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
    for part in (_VERSION, inputs, method, _PERCENTILE, _BINS, _LEVELS, _STEP, graph_module.graph):
        digest.update(f"{part}\n".encode())
    for name, tensor in sorted([*graph_module.named_parameters(), *graph_module.named_buffers()]):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _ranges(
    graph_module: fx.GraphModule, pictures: Pictures, method: str, batch: Batch, progress: Progress
) -> dict[str, Range]:
    values = {str(source_name(node)): node for node in quantised_values(graph_module, CPU)}
    names, order = {node.name: name for name, node in values.items()}, list(input_nodes(graph_module))
    say = sparsely(progress)
    observer = _Observer(converted(graph_module, torch.float32), names)
    with plain_torch():
        for done, inputs in _counted(pictures, batch, order):
            say(f"calibrate: ranges of {len(names)} values, {done} of {len(pictures)} images")
            observer.observe(inputs, _extremes)
        limits: dict[str, Range] = {}
        for name, found in observer.found.items():
            low, high = (float(limit) for limit in (np.min(found), np.max(found)))  # where one is NaN, so are both
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ExportError(f"{module_path(values[name])}: NaN or Inf on the calibration images")
            limits[name] = low, high
        if method == "minmax":
            return limits
        largest = {name: max(-low, high) for name, (low, high) in limits.items()}
        histograms = {name: np.zeros(_BINS, np.int64) for name in limits}

        def count(name: str, value: Tensor) -> None:
            if largest[name] > 0:
                counts = torch.histc(value.abs(), _BINS, 0.0, largest[name])
                histograms[name] += counts.to(torch.int64).numpy()

        for done, inputs in _counted(pictures, batch, order):
            say(f"calibrate: histograms, {done} of {len(pictures)} images")
            observer.observe(inputs, count)
    covered = _percentile if method == "percentile" else _entropy
    ranges = {}
    for name, (low, high) in limits.items():
        if largest[name] == 0 or is_input(values[name]):
            ranges[name] = low, high
            continue
        threshold = largest[name] * covered(histograms[name])
        ranges[name] = max(low, -threshold), min(high, threshold)
    return ranges


def _counted(pictures: Pictures, batch: Batch, names: Sequence[str]) -> Iterator[tuple[int, Inputs]]:
    """How many pictures there were so far, and the next ones in a batch of a size that is accepted."""
    done = 0
    for given in pictures.batches(min(max(_BATCH, batch.minimum), batch.maximum)):
        inputs = _ordered(given, names)
        done += count_of(inputs)
        yield done, resized(inputs, max(count_of(inputs), batch.minimum))


def _extremes(name: str, value: Tensor) -> Range:
    low, high = torch.aminmax(value)
    return low.item(), high.item()


class _Observer(fx.Interpreter):
    """Runs a graph and hands some of its values to a function, which may not keep them."""

    def __init__(self, graph_module: fx.GraphModule, names: dict[str, str]) -> None:
        """`names`: node -> what the function is told."""
        super().__init__(graph_module)
        self._names = names
        self.found: dict[str, list[Any]] = {name: [] for name in names.values()}

    def observe(self, inputs: Inputs, look: Callable[[str, Tensor], Any]) -> None:
        self._look = look
        self.run(*map(torch.from_numpy, inputs.values()))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            name = self._names[n.name]
            self.found[name].append(self._look(name, value))
        return value


def _percentile(histogram: NDArray[np.int64]) -> float:
    """The share of the bins that holds the smallest `_PERCENTILE` percent."""
    share = np.cumsum(histogram) / histogram.sum()
    return (int(np.searchsorted(share, _PERCENTILE / 100)) + 1) / len(histogram)


def _entropy(histogram: NDArray[np.int64]) -> float:
    """The share of the bins that, cut off there and told apart by `_LEVELS` levels, stays nearest to what it was.

    What lies beyond the cut counts in the last bin of the distribution, but not of its quantised form: a cut that
    loses much moves the two apart.
    """
    histogram = histogram.copy()
    histogram[0] = histogram[1]  # the zeros that a ReLU makes are exact in any scale
    best, least = len(histogram), math.inf
    for bins in range(_LEVELS, len(histogram) + 1, _STEP):
        kept = histogram[:bins].astype(np.float64)
        reference = kept.copy()
        reference[-1] += histogram[bins:].sum()
        level = np.arange(bins) * _LEVELS // bins
        sums = np.bincount(level, kept, _LEVELS)
        filled = np.bincount(level, kept > 0, _LEVELS)
        quantised = np.where(kept > 0, (sums / np.maximum(filled, 1))[level], 0.0)
        if not quantised.any():
            continue
        divergence = rel_entr(reference / reference.sum(), quantised / quantised.sum()).sum()
        if divergence < least:
            best, least = bins, float(divergence)
    return best / len(histogram)
