"""What rounding explains of each operator's error, by the formulas of `kernels/rounding.py`.

A fused operator's bound lies with the operator; here are those of what stays eager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.fusion.nodes import WEIGHTED, aten, resnet_deploy
from kernels.operators.registry import OPERATORS, Arguments
from kernels.rounding import Bound, Rounding, bound_of, mean_variance


@dataclass(frozen=True)
class Call:
    """One operator of one candidate.

    Attributes:
        arguments: by the names of its schema; tensors in float32, weights as folded in float64.
        pre: its value before the ReLU, and before the pool behind that, computed in float64, held in float32.
        rounding: how the candidate rounds.
    """

    arguments: Mapping[str, Any]
    pre: Tensor
    rounding: Rounding


def _fused(operator: type[Arguments[Any]]) -> Callable[[Call], Bound]:
    return lambda call: operator.of(*call.arguments.values()).bound(call.pre, call.rounding)


def shared_variance(target: Any, arguments: Mapping[str, Any], pull: Tensor, rounding: Rounding) -> float:
    """The variance of sum(pull * y) that the roundings inside an operator explain, which values of y share."""
    operator = OPERATORS.get(getattr(target, "_opname", ""))
    return float(operator.of(*arguments.values()).shared(pull, rounding)) if operator else 0.0


def _weighted(target: Callable[..., Any]) -> Callable[[Call], Bound]:
    """Of a convolution or linear layer of any rank: S + R(y), with the sum of p^2 from the operator itself."""

    def bound(call: Call) -> Bound:
        a, rounding, rank = call.arguments, call.rounding, call.pre.dim()
        products = target(**{**a, "input": a["input"].square(), "weight": a["weight"].square(), "bias": None})
        linear = target is aten.linear.default
        constants = 0.0 if a["bias"] is None else a["bias"].square().reshape(-1, *[1] * (0 if linear else rank - 2))
        variance = rounding.and_of(rounding.sum(call.pre, products, constants, a["weight"][0].numel()), call.pre)
        if linear and rank != 2 and a["bias"] is not None and rounding.separate_addition:
            variance = rounding.and_of(variance, call.pre - a["bias"])  # a matrix product of its own
        return bound_of(variance, call.pre)

    return bound


def _mean(call: Call) -> Bound:
    a = call.arguments
    return bound_of(mean_variance(a["self"], a["dim"], a["keepdim"]) + call.rounding.of(call.pre), call.pre)


def _exact(call: Call) -> Bound:
    return Bound(torch.zeros_like(call.pre), call.pre)


BOUNDS: dict[Callable[..., Any], Callable[[Call], Bound]] = {
    **{target: _weighted(target) for target in WEIGHTED},
    aten.max_pool2d.default: _exact,
    aten.mean.dim: _mean,
    **{getattr(resnet_deploy, name).default: _fused(operator) for name, operator in OPERATORS.items()},
}
