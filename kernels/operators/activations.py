"""The activations beside ReLU that an operator ends with, by the names that torch.nn.functional has for them.

With clip(v, a, b) = min(max(v, a), b) and Phi the distribution function of the normal distribution:

    relu6        clip(v, 0, 6)                     hardsigmoid  clip(v + 3, 0, 6) / 6
    leaky_relu   v where v > 0, else a * v         hardswish    v * clip(v + 3, 0, 6) / 6
    prelu        the same with one a per channel   gelu         v * Phi(v)
    sigmoid      1 / (1 + exp(-v))                 gelu_tanh    v * sigmoid(1.595769 (v + 0.044715 v^3))
    silu         v * sigmoid(v)

All are computed in the type of the accumulator, and rounded once behind that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.checks import check_vector
from kernels.rounding import ROUNDING_RMS, UNIT_ROUNDOFF, ZERO_BELOW_SIGMA, Bound, Rounding, bound_of

# Multiples of sigma at which an activation is looked at beside a value: what a small error, most errors and the largest
# make of it, on either side of a bend.
_LOOKED_AT = (1.0, 3.0, ZERO_BELOW_SIGMA)
# An exponential leaves every type's range: float16 values are never nearer to each other than 2^-24. In the others the
# spacing is far below what float32 holds the square of.
_SPACING = {UNIT_ROUNDOFF[torch.float16]: 2.0**-24}
_SMALLEST_SPACING = 2.0**-58


@dataclass(frozen=True)
class _Kind:
    """One activation.

    Attributes:
        function: of a value, the negative slope and the slope per channel.
        zero_below: all that is below gives exactly 0; None where nothing does.
        steps: roundings of about the result's size on the way to it, where each step is an operator of its own.
        cancels: whether a step is of the size of what it reads though the result is small: 1 + erf(v) for one.
        sigmoid: by what a step that is a sigmoid is multiplied. As an operator of its own it is as exact as its largest
            summand, in float32: ONNX Runtime's is 1/2 and a rational function, off by 2^-25 rms where it is near 0 too.
    """

    function: Callable[[Tensor, float, Tensor | None], Tensor]
    zero_below: float | None = None
    steps: int = 0
    cancels: bool = False
    sigmoid: Callable[[Tensor], Tensor] | None = None


def _prelu(value: Tensor, _: float, slope: Tensor | None) -> Tensor:
    assert slope is not None  # the check has seen to it
    return F.prelu(value, slope.to(value.dtype))


_KINDS: dict[str, _Kind] = {
    "relu6": _Kind(lambda v, a, s: v.clamp(0, 6), zero_below=0.0),
    "leaky_relu": _Kind(lambda v, a, s: F.leaky_relu(v, a)),
    "prelu": _Kind(_prelu, steps=1),
    "sigmoid": _Kind(lambda v, a, s: v.sigmoid(), sigmoid=torch.ones_like),
    "silu": _Kind(lambda v, a, s: F.silu(v), steps=1, sigmoid=torch.abs),
    "hardsigmoid": _Kind(lambda v, a, s: F.hardsigmoid(v), zero_below=-3.0, steps=1),
    "hardswish": _Kind(lambda v, a, s: F.hardswish(v), zero_below=-3.0, steps=2),
    "gelu": _Kind(lambda v, a, s: F.gelu(v), steps=2, cancels=True),
    "gelu_tanh": _Kind(lambda v, a, s: F.gelu(v, approximate="tanh"), steps=2, cancels=True),
}
ACTIVATIONS = tuple(_KINDS)


@dataclass(frozen=True, eq=False)
class Activation:
    """One of ACTIVATIONS, or "" for none, with what it needs.

    Attributes:
        name: of the activation.
        negative_slope: of a leaky_relu.
        slope: [C] of a prelu, for axis 1 of what it is applied to.
    """

    name: str
    negative_slope: float
    slope: Tensor | None

    def __call__(self, value: Tensor) -> Tensor:
        """[N, C, H, W] of any floating-point type, which the result has too."""
        return _KINDS[self.name].function(value, self.negative_slope, self.slope) if self.name else value

    def check(self, relu: bool, channels: int) -> None:
        if self.name and self.name not in _KINDS:
            raise ValueError(f"activation is {self.name!r}, expected '' or one of {', '.join(ACTIVATIONS)}")
        if self.name and relu:
            raise ValueError(f"activation is {self.name!r} beside relu, expected one of the two")
        if not math.isfinite(self.negative_slope):
            raise ValueError(f"negative_slope is {self.negative_slope}, expected a finite number")
        if (self.slope is not None) != (self.name == "prelu"):
            given = "None" if self.slope is None else "given"
            raise ValueError(f"slope is {given} and activation {self.name!r}, expected a slope with 'prelu' alone")
        if self.slope is not None:
            check_vector("slope", self.slope, channels)

    def bound(self, variance: Tensor, pre: Tensor, rounding: Rounding) -> Bound:
        """What rounding explains behind the activation, of what explains `variance` of `pre` before it."""
        before = bound_of(variance, pre)
        if not self.name:
            return before
        kind, y, single = _KINDS[self.name], self(pre), UNIT_ROUNDOFF[torch.float32]
        variance = (
            self.carried(pre, before.sigma).square() + rounding.of(y) + (2 * single * y.to(variance.dtype)).square()
        )
        if rounding.separate_addition or (rounding.rounds_weights and self.slope is not None):
            variance = variance + kind.steps * rounding.of(y)
        if kind.cancels:
            roundoff = rounding.roundoff if rounding.separate_addition else single
            variance = variance + (0.5 * roundoff * pre.to(variance.dtype)).square()
        if kind.sigmoid is not None and rounding.separate_addition:
            variance = variance + (0.5 * single * kind.sigmoid(pre.to(variance.dtype))).square()
        variance = variance + (ROUNDING_RMS * _SPACING.get(rounding.roundoff, _SMALLEST_SPACING)) ** 2
        if kind.zero_below is None:
            return Bound(variance.sqrt(), torch.full_like(before.upper, math.inf))
        return Bound(variance.sqrt(), before.upper - kind.zero_below)

    def carried(self, pre: Tensor, sigma: Tensor) -> Tensor:
        """The deviation of the result where what it is of has the value `pre` and the deviation `sigma`.

        The steepest of the chords that reach from `pre` as far as errors do: at a bend, or where the slope is 0, the
        derivative alone would say too little.
        """
        value, deviation = pre.double(), sigma.double()
        y, largest = self(value), torch.zeros_like(value)
        for multiple in (side * reach for reach in _LOOKED_AT for side in (1, -1)):
            chord = (self(value + multiple * deviation) - y).abs_().div_(abs(multiple))
            largest = torch.maximum(largest, chord)
        return largest.to(sigma.dtype)
