"""What is kept of values that go by in batches, against the same of all of them at once."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from export.quantisation.magnitudes import BINS, Entropy, Extremes, Percentile, least_divergence

DRAWN = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAWN)


def growing(values: Tensor, factor: float) -> Tensor:
    """Later batches have larger values, or smaller ones."""
    return values * torch.logspace(0, np.log10(factor), len(values)).reshape(-1, *[1] * (values.dim() - 1))


LAST = (16, 9, 20, 20)
VALUES: dict[str, Tensor] = {
    "normal": normal(*LAST),
    "after a ReLU": normal(*LAST).relu(),
    "negative": -normal(*LAST).abs(),
    "channels last": normal(*LAST).to(memory_format=torch.channels_last),
    "a slice": normal(16, 18, 20, 20)[:, ::2],
    "expanded": normal(16, 9, 1, 20).expand(LAST),
    "a matrix": normal(16, 1000),
    "few": normal(16, 3),
    "one": normal(1, 1),
    "growing": growing(normal(*LAST), 1e3),
    "shrinking": growing(normal(*LAST), 1e-3),
    "largest last": torch.cat([normal(15, 4000), torch.full((1, 4000), 9.0)]),
    "ties": normal(*LAST).mul(2).round(),
    "always the same": torch.full(LAST, 0.7),
    "one of them not zero": torch.zeros(LAST).index_put((torch.tensor(3),) + (torch.tensor(0),) * 3, torch.tensor(2.0)),
    "tiny": normal(*LAST) * 1e-30,
    "huge": normal(*LAST) * 1e30,
}


def counted(values: Tensor) -> tuple[np.ndarray, float]:
    """All magnitudes in bins, and the largest."""
    largest = float(values.abs().max())
    return torch.histc(values.abs(), BINS, 0.0, largest).long().numpy(), largest


def cut(values: Tensor, threshold: float) -> tuple[float, float]:
    return max(float(values.min()), -threshold), min(float(values.max()), threshold)


def shown(seen: Extremes, values: Tensor, size: int) -> Extremes:
    for batch in values.split(size):
        seen.see(batch)
    return seen


@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("case", VALUES)
def test_batches_say_what_the_whole_says(case: str, size: int) -> None:
    values = VALUES[case]
    histogram, largest = counted(values)
    extremes = shown(Extremes(), values, size)
    assert extremes.covered == cut(values, largest)
    share = (int(np.argmax(histogram.cumsum() / values.numel() >= 0.9999)) + 1) / BINS
    assert shown(Percentile(len(values.split(size))), values, size).covered == cut(values, share * largest)
    assert shown(Entropy(extremes), values, size).covered == cut(values, least_divergence(histogram) * largest)


def test_what_is_kept_is_small() -> None:
    seen = shown(Percentile(40), growing(normal(40, 20_000), 100), 1)
    assert len(pickle.dumps(seen)) < 2_000 < 40 * 20_000 * 4 // 1000
    assert seen.covered[1] < 0.9 * seen.high


def test_more_of_one_value_than_float32_counts() -> None:
    """torch.histc counts in float32: 2^24 + 1 is 2^24 there."""
    values = torch.zeros(1).expand(2**24 + 2**20)
    seen = shown(Extremes(), torch.cat([values[:1], torch.ones(1)]), 2)
    entropy = Entropy(seen)
    entropy.see(values)
    assert entropy._counts.sum() == len(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_values_that_are_not_finite_are_told(value: float, place: int) -> None:
    batches = torch.ones(2, 3)
    batches[place, 1] = value
    assert not shown(Percentile(2), batches, 1).finite and shown(Percentile(1), torch.ones(1, 3), 1).finite
