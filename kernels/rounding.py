"""What rounding explains of an operator's error: the one model that the tests, the tuner and the criteria share.

A sum of K products p of inputs and weights, a bias b and a residual r carries the variance

    S = (0.41 u)^2 (sum p^2 + b^2) + u32^2 max(1, K/2) (sum p^2 + b^2 + r^2) + (0.41 u32)^2 K/3 pre^2

that rounding weight and bias to the storage type (the first term, absent where they are exact) and accumulating in
float32 explain: products of any sign, and of one, whose k-th partial sum is about k/K of the sum, whatever they
scatter by: their roundings add up to the last term. Rounding a value v to the storage type adds R(v) = (0.41 u)^2 v^2.
With pre the value before the ReLU, sigma^2 is, for

    conv2d_bias_act             S + R(pre)                 sum p^2 = conv(x^2, W^2)
    linear                      S + R(y)                   sum p^2 = x^2 @ W^2
    conv_transpose2d            S + R(y)                   sum p^2 = conv_transpose(x^2, W^2)
    conv2d_projection_bias_act  S + R(pre)                 sum p^2 = conv(x^2, W^2) + conv(s^2, Ws^2), K of both
    conv2d_conv1x1_bias_act     S + R(pre) + conv(V, We^2) as the two above on the intermediate h, which itself
                                                           carries V = S_h + R(h) where h > 0
    conv2d_bias_relu_maxpool    S + R(pre)                 at the pixel that is the largest of its window
    mean                        T + R(y)                   T = u32^2 max(1, HW/2) mean(x^2) / HW
                                                           + (0.41 u32)^2 HW/3 mean(x)^2, the sum over pixels
    mean_linear                 S + R(y) + V @ W^2         sum p^2 = m^2 @ W^2, on the mean m with V = T + R(m)

Behind another activation f than ReLU, sigma^2 is D^2 + R(f(pre)) and what evaluating f takes: D is what the sigma above
makes of f(pre), by the steepest chord of f over a few sigma (see operators/activations.py).

A runtime that adds in an operator of its own also rounds the summands: R(pre - r) more for a residual r,
and R(r) besides where r is a projection; R(pre - b) more for the bias b of a mean_linear in float16. max-pool alone
must be exact.

z is the error in units of sigma: its root mean square over an operator's values, and its largest, have limits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# Root mean square of a rounding error, in units of roundoff times value.
ROUNDING_RMS = 0.41
MAX_RMS_Z = 1.6
MAX_Z = {torch.float16: 9.0, torch.bfloat16: 9.0, torch.float32: 16.0}
# Below this many sigma, a ReLU can give nothing but an exact 0.
ZERO_BELOW_SIGMA = 8.0


@dataclass(frozen=True)
class Bound:
    """The standard deviation that rounding explains, and the largest value that what a ReLU reads may have."""

    sigma: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Rounding:
    """How a candidate rounds.

    Attributes:
        roundoff: u of the storage type.
        rounds_weights: whether weights and biases are rounded to it; otherwise they are exact.
        separate_addition: whether residuals, and in float16 the bias of a head, are added in an operator of their own.
        dtype: in which the variances are computed.
        truncates: whether sums may be truncated after every 8 products or more, as on tensor cores: K/8 times by half
            a roundoff each, all one way, which is a variance of u32^2 (K/16)^2 sum p^2 more.
    """

    roundoff: float
    rounds_weights: bool = False
    separate_addition: bool = False
    dtype: torch.dtype = torch.float32
    truncates: bool = False

    def of(self, value: Tensor) -> Tensor:
        """R: the variance of rounding `value` to the storage type."""
        return (ROUNDING_RMS * self.roundoff * value.to(self.dtype)).square()

    def and_of(self, variance: Tensor, value: Tensor) -> Tensor:
        """`variance` + R(value), in the place of `variance`."""
        value = value.to(variance.dtype)
        return variance.addcmul_(value, value, value=(ROUNDING_RMS * self.roundoff) ** 2)

    def sum(
        self, pre: Tensor, products: Tensor, constants: Tensor | float, length: int, other: Tensor | None = None
    ) -> Tensor:
        """S: the variance of a sum of `length` products, before it is rounded.

        Args:
            pre: the sum.
            products: the sum of the squared products.
            constants: b^2.
            length: K.
            other: r^2; none by default.
        """
        factor = _accumulation(length)
        if self.truncates:
            factor += (UNIT_ROUNDOFF[torch.float32] * length / 16) ** 2
        if self.rounds_weights:
            factor += (ROUNDING_RMS * self.roundoff) ** 2
        variance = (products + constants).mul_(factor)
        if other is not None:
            variance.add_(other, alpha=_accumulation(length))
        pre = pre.to(variance.dtype)
        return variance.addcmul_(pre, pre, value=_climb(length))

    def convolution(
        self,
        pre: Tensor,
        products: Tensor,
        bias: Tensor,
        length: int,
        shortcut: Tensor | None = None,
        projection: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
    ) -> Tensor:
        """S + R(pre) of a convolution with a shortcut, its projection or neither, given its own sum p^2 and K."""
        constants = bias.square()[:, None, None]
        if shortcut is None:
            return self.and_of(self.sum(pre, products, constants, length), pre)
        if projection is None:
            variance = self.sum(pre, products, constants, length, shortcut.square())
        else:
            products = products + F.conv2d(shortcut.square(), projection.square(), None, stride)
            variance = self.sum(pre, products, constants, length + projection[0].numel())
            shortcut = F.conv2d(shortcut, projection, None, stride)
            if self.separate_addition:
                variance = self.and_of(variance, shortcut)
        if self.separate_addition:
            variance = self.and_of(variance, pre - shortcut)
        return self.and_of(variance, pre)


def mean_variance(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    """T: the variance of a mean accumulated in float32, before it is rounded."""
    length = math.prod(x.shape[dim] for dim in dims)
    climb = _climb(length) * x.mean(dims, keepdim).square()
    return _accumulation(length) * x.square().mean(dims, keepdim) / length + climb


def bound_of(variance: Tensor, pre: Tensor) -> Bound:
    sigma = variance.sqrt()
    return Bound(sigma, torch.add(pre.to(sigma.dtype), sigma, alpha=ZERO_BELOW_SIGMA))


def _accumulation(length: int) -> float:
    return UNIT_ROUNDOFF[torch.float32] ** 2 * max(1.0, length / 2)


def _climb(length: int) -> float:
    """Of the square of a sum of values of one sign, on the way up to which the partial sums are rounded."""
    return (ROUNDING_RMS * UNIT_ROUNDOFF[torch.float32]) ** 2 * length / 3
