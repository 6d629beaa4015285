"""What is kept of a value while pictures go by, and how much of it a scale covers. No value is held whole."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import rel_entr
from torch import Tensor

from export.quantisation.scheme import Range

PERCENTILE = 99.99
BINS = 2048
LEVELS = 128  # of the magnitude of a signed byte
STEP = 8  # between the candidates of the entropy method, in bins
_PART = 2**20  # values at a time, which caches hold; torch.histc counts in float32, right up to 2^24 of them


class Extremes:
    """The smallest and the largest of all values, which `minmax` covers.

    Attributes:
        low, high: they.
        finite: whether none was NaN or Inf; else nothing of the rest counts.
    """

    def __init__(self) -> None:
        self.low, self.high, self.finite = math.inf, -math.inf, True

    def see(self, value: Tensor) -> None:
        """Take note of a batch of values, float32."""
        flat = in_memory_order(value.detach())
        low, high = (limit.item() for limit in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):  # where one is NaN, so are both
            self.finite = False
        if not self.finite:
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        for part in flat.split(_PART):
            self._see(part if low >= 0 else part.abs())

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @property
    def covered(self) -> Range:
        """What a scale is to cover; no more than was seen."""
        if self.largest == 0:
            return self.low, self.high
        threshold = self.largest * self._share()
        return max(self.low, -threshold), min(self.high, threshold)

    def _see(self, magnitudes: Tensor) -> None:
        """Take note of magnitudes, [n]."""

    def _share(self) -> float:
        """How much of the largest magnitude to cover."""
        return 1.0


class Percentile(Extremes):
    """The largest magnitudes themselves, as many as `PERCENTILE` leaves out: the others make no difference."""

    def __init__(self, batches: int) -> None:
        """`batches`: how often `see` will be called; the first time with the most values."""
        super().__init__()
        self._batches = batches
        self._largest: NDArray[np.float32] = np.empty(0, np.float32)
        self._wanted = self._count = 0
        self._floor = -1.0  # magnitudes up to this one are none of the largest

    def see(self, value: Tensor) -> None:
        if not self._wanted:
            self._wanted = int(self._batches * value.numel() * (1 - PERCENTILE / 100)) + 2
        super().see(value)

    def _see(self, magnitudes: Tensor) -> None:
        values = magnitudes.numpy()
        self._count += len(values)
        found = np.concatenate([self._largest, values[values > self._floor]])
        if len(found) > self._wanted:
            found = np.partition(found, len(found) - self._wanted)[-self._wanted :].copy()
            self._floor = float(found.min())
        self._largest = found

    def _share(self) -> float:
        """The share of the bins that holds the smallest `PERCENTILE` percent; what is not kept may be in the first."""
        histogram = _histogram(torch.from_numpy(self._largest), self.largest)
        histogram[0] += self._count - len(self._largest)
        share = np.cumsum(histogram) / self._count
        return (int(np.searchsorted(share, PERCENTILE / 100)) + 1) / BINS


class Entropy(Extremes):
    """All magnitudes, in bins.

    Whose width has to be known before: of a histogram that grows with what is seen, even one with 32 bins for one of
    these, ranges came out up to a sixth of the largest magnitude off, so flat is the divergence about its minimum.
    """

    def __init__(self, seen: Extremes) -> None:
        """`seen`: of the same values, which `see` is now shown again."""
        super().__init__()
        self.low, self.high = seen.low, seen.high
        self._counts: NDArray[np.int64] = np.zeros(BINS, np.int64)

    def _see(self, magnitudes: Tensor) -> None:
        if self.largest > 0:
            self._counts += _histogram(magnitudes, self.largest)

    def _share(self) -> float:
        return least_divergence(self._counts)


def _histogram(magnitudes: Tensor, largest: float) -> NDArray[np.int64]:
    """How many lie in each of the bins."""
    return torch.histc(magnitudes, BINS, 0.0, largest).to(torch.int64).numpy()


def least_divergence(histogram: NDArray[np.int64]) -> float:
    """The share of the bins that, cut off there and told apart by `LEVELS` levels, stays nearest to what it was.

    What lies beyond the cut counts in the last bin of the distribution, but not of its quantised form: a cut that
    loses much moves the two apart.
    """
    histogram = histogram.copy()
    histogram[0] = histogram[1]  # the zeros that a ReLU makes are exact in any scale
    best, least = len(histogram), math.inf
    for bins in range(LEVELS, len(histogram) + 1, STEP):
        kept = histogram[:bins].astype(np.float64)
        reference = kept.copy()
        reference[-1] += histogram[bins:].sum()
        level = np.arange(bins) * LEVELS // bins
        sums = np.bincount(level, kept, LEVELS)
        filled = np.bincount(level, kept > 0, LEVELS)
        quantised = np.where(kept > 0, (sums / np.maximum(filled, 1))[level], 0.0)
        if not quantised.any():
            continue
        divergence = rel_entr(reference / reference.sum(), quantised / quantised.sum()).sum()
        if divergence < least:
            best, least = bins, float(divergence)
    return best / len(histogram)


def in_memory_order(value: Tensor) -> Tensor:
    """All elements, [n], in the order they lie in memory: without a copy where they lie together."""
    return value.permute(sorted(range(value.dim()), key=value.stride, reverse=True)).reshape(-1)
