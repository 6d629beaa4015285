"""From ranges to scales: nothing is cut off, 0 is exact, and the file can hold the result."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from export.quantisation.scheme import CPU, TENSORRT, Range, Scheme
from kernels.operators.quantize_linear import dequantize_linear, quantize_linear

RANGES: dict[str, Range] = {
    "around 0": (-2.1, 1.7),
    "behind a ReLU": (0.0, 6.3),
    "below 0": (-3.3, -0.1),
    "above 0": (0.1, 3.3),
    "lopsided": (-0.001, 9.9),
    "large": (-3e4, 2e4),
    "small": (-1e-4, 2e-4),
    "a third": (-1 / 3, 1 / 3),
}


def held_exactly(scheme: Scheme, scale: Tensor) -> bool:
    """Whether the type of the file's scales has that value."""
    return scale.dtype == torch.float64 and torch.equal(scale.to(scheme.arithmetic.dtype).double(), scale)


@pytest.mark.parametrize("case", RANGES)
def test_the_scale_is_the_smallest_that_covers_the_range(scheme: Scheme, case: str) -> None:
    low, high = RANGES[case]
    scale, zero_point = scheme.activation((low, high))
    limits = torch.iinfo(scheme.dtype)
    wanted = max(-low, high) / 127 if scheme.symmetric else (max(high, 0.0) - min(low, 0.0)) / 255
    assert held_exactly(scheme, scale) and scale.shape == zero_point.shape == ()
    assert wanted <= scale.item() <= wanted * (1 + 4 * scheme.arithmetic.roundoff) + 1e-7 * (wanted < 1e-4)
    assert zero_point.dtype == scheme.dtype and limits.min <= zero_point.item() <= limits.max
    # Everything comes back to within half a step, but the two ends: the zero point is a whole number. 0 is exact.
    values = torch.tensor([0.0, *torch.linspace(low, high, 1001)], dtype=torch.float64)
    whole = quantize_linear(values, scale, zero_point)
    error = (dequantize_linear(whole, scale, zero_point) - values).abs()
    inner = (values > low + 0.6 * scale) & (values < high - 0.6 * scale)
    assert error.max() <= scale * (1 + 1e-9) and error[inner].max() <= scale * (0.5 + 1e-9)
    assert whole[0] == zero_point and error[0] == 0.0


def test_each_scheme_uses_its_numbers() -> None:
    """The symmetric one leaves the lowest out."""
    for scheme, limits, expected in ((TENSORRT, (-12.7, 12.7), [-127, 127]), (CPU, (-1.0, 3.0), [0, 255])):
        assert quantize_linear(torch.tensor(limits).double(), *scheme.activation(limits)).tolist() == expected
    assert TENSORRT.activation((-12.7, 12.7))[1].item() == 0
    assert CPU.activation((0.0, 5.0))[1].item() == 0 and CPU.activation((-5.0, 0.0))[1].item() == 255


@pytest.mark.parametrize("size", [1e-9, 1e-42, 1e-300, 5e-324])
def test_ranges_below_what_the_type_resolves_have_a_positive_scale(scheme: Scheme, size: float) -> None:
    scale, _ = scheme.activation((-size, size))
    assert held_exactly(scheme, scale) and 0 < scale.item() < math.inf and scale.item() >= size / 255
    nothing, zero_point = scheme.activation((0.0, 0.0))
    assert (nothing.item(), zero_point.item()) == (1.0, 0)


def test_a_range_that_no_scale_covers_shows_as_infinite() -> None:
    """The pass refuses it by name."""
    assert TENSORRT.activation((0.0, 1e8))[0].item() == math.inf
    assert CPU.activation((0.0, 1e8))[0].item() < math.inf


# one channel each: what its weights are multiplied with
CHANNELS = {
    "ordinary": 1.0,
    "zero": 0.0,
    "tiny": 1e-9,
    "below float16": 1e-12,
    "below float32": 1e-42,
    "denormal": 1e-310,
    "large": 500.0,
    "a third": 1 / 3,
}


def weights(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    unit = torch.randn(len(CHANNELS), *shape, generator=generator, dtype=torch.float64)
    return unit * torch.tensor(list(CHANNELS.values()), dtype=torch.float64).reshape(-1, *[1] * len(shape))


def assert_half_a_step(scheme: Scheme, weight: Tensor, q: Tensor, scale: Tensor) -> None:
    assert held_exactly(scheme, scale)
    steps = scale.reshape(-1, *[1] * (weight.dim() - 1))
    assert ((q.double() * steps - weight).abs() <= (0.5 + 1e-9) * steps).all()


@pytest.mark.parametrize("shape", [(3, 3, 3), (16, 1, 1), (40,)], ids=["3x3", "1x1", "linear"])
def test_weights_come_back_to_within_half_a_step(scheme: Scheme, shape: tuple[int, ...]) -> None:
    weight = weights(*shape)
    q, scale = scheme.weight(weight)
    assert q.dtype == torch.int8 and q.shape == weight.shape and scale.shape == (len(CHANNELS),)
    assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all()) and q.min() >= -127
    assert_half_a_step(scheme, weight, q, scale)


def test_each_channel_uses_its_numbers_where_the_type_resolves_it(scheme: Scheme) -> None:
    q, scale = scheme.weight(weights(3, 3, 3))
    peaks = dict(zip(CHANNELS, q.abs().flatten(1).amax(1).tolist(), strict=True))
    assert peaks["ordinary"] == peaks["large"] == peaks["a third"] == 127
    assert peaks["zero"] == 0 and dict(zip(CHANNELS, scale.tolist(), strict=True))["zero"] == 1.0
    assert scheme is not CPU or peaks["tiny"] == peaks["below float16"] == 127
    assert torch.equal(scheme.weight(-weights(3, 3, 3))[0], -q)  # the zero point is 0


def test_scales_do_not_fall_below_the_smallest_allowed(scheme: Scheme) -> None:
    weight = weights(3, 3, 3)
    free = scheme.weight(weight)[1]
    smallest = torch.full((len(weight),), 1e-3, dtype=torch.float64)
    smallest[0] = 0.0
    q, scale = scheme.weight(weight, smallest)
    assert_half_a_step(scheme, weight, q, scale)
    assert bool((scale >= smallest).all())
    above = (free >= smallest) & (weight.abs().flatten(1).amax(1) > 0)
    assert torch.equal(scale[above], free[above]) and 0 < above.sum() < len(above)
