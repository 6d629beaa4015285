"""What rounding explains of an operator's error: the variance of its result.

A sum of K products p of inputs and weights, a bias b and a residual r carries the variance

    S = (0.41 u)^2 (sum p^2 + b^2) + u32^2 max(1, K/2) (sum p^2 + b^2 + r^2)

that rounding weight and bias to the storage type and accumulating in float32 explain (for float32 the
first term is 0). Rounding a value v to the storage type adds R(v) = (0.41 u)^2 v^2. With pre the value
before the ReLU, sigma^2 is, for

    conv2d_bias_act             S + R(pre)                 sum p^2 = conv(x^2, W^2)
    linear                      S + R(y)                   sum p^2 = x^2 @ W^2
    conv2d_projection_bias_act  S + R(pre)                 sum p^2 = conv(x^2, W^2) + conv(s^2, Ws^2), K of both
    conv2d_conv1x1_bias_act     S + R(pre) + conv(V, We^2) as the two above on the intermediate h, which itself
                                                           carries V = S_h + R(h) where h > 0
    conv2d_bias_relu_maxpool    S + R(pre)                 at the pixel that is the largest of its window
    mean                        T + R(y)                   T = u32^2 max(1, HW/2) mean(x^2) / HW, the sum over pixels
    mean_linear                 S + R(y) + V @ W^2         sum p^2 = m^2 @ W^2, on the mean m with V = T + R(m)

A runtime that adds in an operator of its own also rounds the summands: R(pre - r) more for a residual r,
and R(r) besides where r is a projection. max-pool alone must be exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export.fusion.nodes import aten, resnet_deploy

_ROUNDING = 0.41
_U32 = 2.0**-24
_DEAD = 8.0  # sigmas below zero, where a ReLU can give nothing but 0


@dataclass(frozen=True)
class Call:
    """One operator of one candidate.

    Attributes:
        arguments: by the names of its schema; tensors in float32, weights as folded in float64.
        pre: its value before the ReLU, and before the pool behind that, in float64.
        roundoff: u of the storage type.
        rounds_weights: whether weights and biases are rounded to it.
        separate_addition: whether the candidate adds residuals in an operator of its own.
    """

    arguments: Mapping[str, Any]
    pre: Tensor
    roundoff: float
    rounds_weights: bool
    separate_addition: bool

    def geometry(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups of the convolution of x."""
        a = self.arguments
        return a["stride"], a["padding"], a.get("dilation", (1, 1)), a.get("groups", 1)

    def sum(self, products: Tensor, constants: Tensor | float, length: int, other: Tensor | float = 0.0) -> Tensor:
        """S: the variance of a sum of `length` products, before it is rounded.

        Args:
            products: the sum of the squared products.
            constants: b^2.
            length: K.
            other: r^2.
        """
        summed = products + constants
        variance = _accumulation(length) * (summed + other)
        return variance + (_ROUNDING * self.roundoff) ** 2 * summed if self.rounds_weights else variance

    def rounding(self, value: Tensor) -> Tensor:
        """R: the variance of rounding `value` to the storage type."""
        return (_ROUNDING * self.roundoff * value.float()).square()


@dataclass(frozen=True)
class Bound:
    """The standard deviation that rounding explains, and the largest value that what a ReLU reads may have."""

    sigma: Tensor
    upper: Tensor


def _accumulation(length: int) -> float:
    return _U32**2 * max(1.0, length / 2)


def _per_channel(bias: Tensor) -> Tensor:
    return bias.square()[:, None, None]


def _bound_of(variance: Tensor, pre: Tensor) -> Bound:
    sigma = variance.sqrt()
    return Bound(sigma, pre.float() + _DEAD * sigma)


def _add_shortcut(
    call: Call, products: Tensor, bias: Tensor, length: int, shortcut: Tensor | None, projection: Tensor | None
) -> Tensor:
    """S + R(pre) of a convolution with a shortcut, its projection or neither, given the convolution's own sum."""
    if shortcut is None:
        return call.sum(products, _per_channel(bias), length) + call.rounding(call.pre)
    if projection is None:
        variance = call.sum(products, _per_channel(bias), length, shortcut.square())
    else:
        stride = call.arguments["shortcut_stride"]
        products = products + F.conv2d(shortcut.square(), projection.square(), None, stride)
        variance = call.sum(products, _per_channel(bias), length + projection[0].numel())
        shortcut = F.conv2d(shortcut, projection, None, stride)
        if call.separate_addition:
            variance = variance + call.rounding(shortcut)
    if call.separate_addition:
        variance = variance + call.rounding(call.pre - shortcut)
    return variance + call.rounding(call.pre)


def _conv2d_bias_act(call: Call) -> Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    length = a["weight"][0].numel()
    return _bound_of(_add_shortcut(call, products, a["bias"], length, a["residual"], None), call.pre)


def _conv2d_projection_bias_act(call: Call) -> Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    length = a["weight"][0].numel()
    variance = _add_shortcut(call, products, a["bias"], length, a["shortcut"], a["shortcut_weight"])
    return _bound_of(variance, call.pre)


def _conv2d_conv1x1_bias_act(call: Call) -> Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    h = F.conv2d(a["x"], a["weight"], a["bias"], *call.geometry()).relu()
    carried = call.sum(products, _per_channel(a["bias"]), a["weight"][0].numel()) + call.rounding(h)
    expand = a["expand_weight"].square()
    products, length = F.conv2d(h.square(), expand), expand.shape[1]
    variance = _add_shortcut(call, products, a["expand_bias"], length, a["shortcut"], a["shortcut_weight"])
    return _bound_of(variance + F.conv2d(carried * (h > 0), expand), call.pre)


def _conv2d_bias_relu_maxpool(call: Call) -> Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    variance = call.sum(products, _per_channel(a["bias"]), a["weight"][0].numel()) + call.rounding(call.pre)
    bound = _bound_of(variance, call.pre)
    pooled, largest = F.max_pool2d(call.pre, 3, 2, 1, return_indices=True)
    sigma = bound.sigma.flatten(2).gather(2, largest.flatten(2)).view_as(pooled)
    return Bound(sigma, F.max_pool2d(bound.upper, 3, 2, 1))


def _linear(call: Call) -> Bound:
    a = call.arguments
    products = F.linear(a["input"].square(), a["weight"].square())
    constants = 0.0 if a["bias"] is None else a["bias"].square()
    return _bound_of(call.sum(products, constants, a["weight"].shape[1]) + call.rounding(call.pre), call.pre)


def _mean(call: Call) -> Bound:
    a = call.arguments
    return _bound_of(_mean_variance(a["self"], a["dim"], a["keepdim"]) + call.rounding(call.pre), call.pre)


def _mean_variance(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    """T: the variance of a mean accumulated in float32, before it is rounded."""
    length = math.prod(x.shape[dim] for dim in dims)
    return _accumulation(length) * x.square().mean(dims, keepdim) / length


def _mean_linear(call: Call) -> Bound:
    a = call.arguments
    mean, squared_weight = a["x"].mean((2, 3)), a["weight"].square()
    carried = _mean_variance(a["x"], [2, 3]) + call.rounding(mean)
    variance = call.sum(F.linear(mean.square(), squared_weight), a["bias"].square(), squared_weight.shape[1])
    return _bound_of(variance + F.linear(carried, squared_weight) + call.rounding(call.pre), call.pre)


def _exact(call: Call) -> Bound:
    return Bound(torch.zeros_like(call.pre), call.pre)


BOUNDS: dict[Callable[..., Any], Callable[[Call], Bound]] = {
    aten.linear.default: _linear,
    aten.max_pool2d.default: _exact,
    aten.mean.dim: _mean,
    resnet_deploy.conv2d_bias_act.default: _conv2d_bias_act,
    resnet_deploy.conv2d_bias_relu_maxpool.default: _conv2d_bias_relu_maxpool,
    resnet_deploy.conv2d_conv1x1_bias_act.default: _conv2d_conv1x1_bias_act,
    resnet_deploy.conv2d_projection_bias_act.default: _conv2d_projection_bias_act,
    resnet_deploy.mean_linear.default: _mean_linear,
}
