"""What rounding explains of each operator's error, by the formulas of `kernels/rounding.py`.

A fused operator's bound lies with the operator; here are those of what stays eager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export.fusion.nodes import aten, resnet_deploy
from kernels.operators.registry import OPERATORS, Arguments
from kernels.rounding import Bound, Rounding, bound_of, mean_variance


@dataclass(frozen=True)
class Call:
    """One operator of one candidate.

    Attributes:
        arguments: by the names of its schema; tensors in float32, weights as folded in float64.
        pre: its value before the ReLU, and before the pool behind that, in float64.
        rounding: how the candidate rounds.
    """

    arguments: Mapping[str, Any]
    pre: Tensor
    rounding: Rounding


def _fused(operator: type[Arguments[Any]]) -> Callable[[Call], Bound]:
    return lambda call: operator.of(*call.arguments.values()).bound(call.pre, call.rounding)


def _linear(call: Call) -> Bound:
    a = call.arguments
    products = F.linear(a["input"].square(), a["weight"].square())
    constants = 0.0 if a["bias"] is None else a["bias"].square()
    variance = call.rounding.sum(products, constants, a["weight"].shape[1])
    return bound_of(variance + call.rounding.of(call.pre), call.pre)


def _transposed(call: Call) -> Bound:
    a = call.arguments
    geometry = (a["stride"], a["padding"], a["output_padding"], a["groups"], a["dilation"])
    products = F.conv_transpose2d(a["input"].square(), a["weight"].square(), None, *geometry)
    constants = 0.0 if a["bias"] is None else a["bias"].square()[:, None, None]
    variance = call.rounding.sum(products, constants, a["weight"][:, 0].numel() // a["groups"])
    return bound_of(variance + call.rounding.of(call.pre), call.pre)


def _mean(call: Call) -> Bound:
    a = call.arguments
    return bound_of(mean_variance(a["self"], a["dim"], a["keepdim"]) + call.rounding.of(call.pre), call.pre)


def _exact(call: Call) -> Bound:
    return Bound(torch.zeros_like(call.pre), call.pre)


BOUNDS: dict[Callable[..., Any], Callable[[Call], Bound]] = {
    aten.conv_transpose2d.input: _transposed,
    aten.linear.default: _linear,
    aten.max_pool2d.default: _exact,
    aten.mean.dim: _mean,
    **{getattr(resnet_deploy, name).default: _fused(operator) for name, operator in OPERATORS.items()},
}
