"""P1: every operator on its own, against the unfused float64 graph on the operator's own input.

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

An operator passes when z = |y - y64| / sigma has rms <= 1.6 over the values that are not exactly 0 and
max <= 9 (16 for float32), all is finite, and y is exactly 0 wherever a ReLU's input is below -8 sigma.

y64 comes from the captured graph, not from the fused one: a wrongly folded weight or a residual taken
from the wrong place is an error here, not part of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from export.capture import plain_torch
from export.graph import (
    args_of,
    aten,
    constant,
    is_call,
    module_path,
    moves_data,
    named_args,
    resnet_deploy,
    schema_name,
    source_name,
)
from export.parity.checks import OperatorCheck, OperatorChecks
from export.precision import Precision
from export.program import FusedProgram

_ROUNDING = 0.41
_U32 = 2.0**-24
RMS_LIMIT = 1.6
MAX_LIMIT = 9.0
MAX_LIMIT_FP32 = 16.0
_DEAD = 8.0


def check_operators(
    program: FusedProgram, precision: Precision, trace: Mapping[str, Tensor], separate_addition: bool = False
) -> OperatorChecks:
    """Hold every fused operator, linear, mean and max-pool of a candidate to its rounding error.

    Args:
        program: the fused program the candidate was made from.
        precision: the candidate's.
        trace: fused-graph node name -> the tensor the candidate computed there, and its input.
        separate_addition: the candidate adds residuals in an operator of its own.

    Returns:
        One check per operator in execution order; `unchecked` names the operators without a criterion
        and those whose tensors the candidate does not show.
    """
    checks, unchecked = [], []
    with plain_torch():
        for node in program.master.graph.nodes:
            if node.op != "call_function" or moves_data(node):
                continue
            bound = _bound(program, node)
            shown = {n.name: _value(n, trace) for n in [node, *_activations(node)]}
            values = {name: value for name, value in shown.items() if value is not None}
            known = len(values) == len(shown) and all(source_name(n) for n in [node, *_activations(node)])
            if bound is None or not known:
                unchecked.append(module_path(node))
                continue
            checks.append(_check(program, precision, node, bound, values, separate_addition))
    return OperatorChecks(tuple(checks), tuple(unchecked))


def evaluate(source: fx.GraphModule, name: str, leaves: Mapping[str, Tensor]) -> Tensor:
    """The value of the node `name` of the captured graph, given the values of `leaves`.

    Raises:
        ValueError: it also depends on something that is not among the leaves.
    """
    nodes = {node.name: node for node in source.graph.nodes}
    known: dict[str, Any] = dict(leaves)

    def visit(node: fx.Node) -> Any:
        if node.name not in known:
            if node.op == "get_attr":
                known[node.name] = constant(source, node)
            elif node.op != "call_function":
                raise ValueError(f"it does not follow from {', '.join(leaves)}")
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), visit)
                target: Any = node.target
                known[node.name] = target(*args, **kwargs)
        return known[node.name]

    if name in leaves:
        raise ValueError("it would be compared with itself")
    return visit(nodes[name])


@dataclass(frozen=True)
class _Call:
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
class _Bound:
    """The standard deviation that rounding explains, and the largest value that what a ReLU reads may have."""

    sigma: Tensor
    upper: Tensor


def _accumulation(length: int) -> float:
    return _U32**2 * max(1.0, length / 2)


def _per_channel(bias: Tensor) -> Tensor:
    return bias.square()[:, None, None]


def _bound_of(variance: Tensor, pre: Tensor) -> _Bound:
    sigma = variance.sqrt()
    return _Bound(sigma, pre.float() + _DEAD * sigma)


def _add_shortcut(
    call: _Call, products: Tensor, bias: Tensor, length: int, shortcut: Tensor | None, projection: Tensor | None
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


def _conv2d_bias_act(call: _Call) -> _Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    length = a["weight"][0].numel()
    return _bound_of(_add_shortcut(call, products, a["bias"], length, a["residual"], None), call.pre)


def _conv2d_projection_bias_act(call: _Call) -> _Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    length = a["weight"][0].numel()
    variance = _add_shortcut(call, products, a["bias"], length, a["shortcut"], a["shortcut_weight"])
    return _bound_of(variance, call.pre)


def _conv2d_conv1x1_bias_act(call: _Call) -> _Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    h = F.conv2d(a["x"], a["weight"], a["bias"], *call.geometry()).relu()
    carried = call.sum(products, _per_channel(a["bias"]), a["weight"][0].numel()) + call.rounding(h)
    expand = a["expand_weight"].square()
    products, length = F.conv2d(h.square(), expand), expand.shape[1]
    variance = _add_shortcut(call, products, a["expand_bias"], length, a["shortcut"], a["shortcut_weight"])
    return _bound_of(variance + F.conv2d(carried * (h > 0), expand), call.pre)


def _conv2d_bias_relu_maxpool(call: _Call) -> _Bound:
    a = call.arguments
    products = F.conv2d(a["x"].square(), a["weight"].square(), None, *call.geometry())
    variance = call.sum(products, _per_channel(a["bias"]), a["weight"][0].numel()) + call.rounding(call.pre)
    bound = _bound_of(variance, call.pre)
    pooled, largest = F.max_pool2d(call.pre, 3, 2, 1, return_indices=True)
    sigma = bound.sigma.flatten(2).gather(2, largest.flatten(2)).view_as(pooled)
    return _Bound(sigma, F.max_pool2d(bound.upper, 3, 2, 1))


def _linear(call: _Call) -> _Bound:
    a = call.arguments
    products = F.linear(a["input"].square(), a["weight"].square())
    constants = 0.0 if a["bias"] is None else a["bias"].square()
    return _bound_of(call.sum(products, constants, a["weight"].shape[1]) + call.rounding(call.pre), call.pre)


def _mean(call: _Call) -> _Bound:
    a = call.arguments
    return _bound_of(_mean_variance(a["self"], a["dim"], a["keepdim"]) + call.rounding(call.pre), call.pre)


def _mean_variance(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    """T: the variance of a mean accumulated in float32, before it is rounded."""
    length = math.prod(x.shape[dim] for dim in dims)
    return _accumulation(length) * x.square().mean(dims, keepdim) / length


def _mean_linear(call: _Call) -> _Bound:
    a = call.arguments
    mean, squared_weight = a["x"].mean((2, 3)), a["weight"].square()
    carried = _mean_variance(a["x"], [2, 3]) + call.rounding(mean)
    variance = call.sum(F.linear(mean.square(), squared_weight), a["bias"].square(), squared_weight.shape[1])
    return _bound_of(variance + F.linear(carried, squared_weight) + call.rounding(call.pre), call.pre)


def _exact(call: _Call) -> _Bound:
    return _Bound(torch.zeros_like(call.pre), call.pre)


_BOUNDS: dict[Callable[..., Any], Callable[[_Call], _Bound]] = {
    aten.linear.default: _linear,
    aten.max_pool2d.default: _exact,
    aten.mean.dim: _mean,
    resnet_deploy.conv2d_bias_act.default: _conv2d_bias_act,
    resnet_deploy.conv2d_bias_relu_maxpool.default: _conv2d_bias_relu_maxpool,
    resnet_deploy.conv2d_conv1x1_bias_act.default: _conv2d_conv1x1_bias_act,
    resnet_deploy.conv2d_projection_bias_act.default: _conv2d_projection_bias_act,
    resnet_deploy.mean_linear.default: _mean_linear,
}


def _bound(program: FusedProgram, node: fx.Node) -> Callable[[_Call], _Bound] | None:
    """The error model of a call, None where it has none: other operators, axes or computed parameters."""
    if is_call(node, aten.mean.dim):
        x = args_of(node)[0].meta["val"]
        if x.dim() != 4 or sorted(d % 4 for d in args_of(node)[1]) != [2, 3]:
            return None
    if is_call(node, aten.linear.default):
        computed = [n for n in args_of(node)[1:] if n is not None and constant(program.master, n) is None]
        if args_of(node)[0].meta["val"].dim() != 2 or computed:
            return None
    target: Any = node.target
    return _BOUNDS.get(target)


def _activations(node: fx.Node) -> list[fx.Node]:
    """The tensors a node computes from, its parameters apart."""
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def _value(node: fx.Node, trace: Mapping[str, Tensor]) -> Tensor | None:
    """What the candidate holds for `node`; a change of layout or shape follows from what it was made from."""
    if node.name not in trace and is_call(node, aten.contiguous.default, aten.reshape.default):
        value = _value(args_of(node)[0], trace)
        return value.reshape(args_of(node)[1]) if value is not None and len(node.args) > 1 else value
    return trace.get(node.name)


def _check(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    bound: Callable[[_Call], _Bound],
    values: Mapping[str, Tensor],
    separate_addition: bool,
) -> OperatorCheck:
    name, kind = module_path(node), schema_name(node)

    def refused(reason: str) -> OperatorCheck:
        return OperatorCheck(name, kind, float("inf"), float("inf"), reason)

    for n in [node, *_activations(node)]:
        expected = tuple(n.meta["val"].shape[1:])
        if tuple(values[n.name].shape[1:]) != expected:
            return refused(f"{n.name} has shape {list(values[n.name].shape)}, expected [N, *{list(expected)}]")
    y = values[node.name].double()
    leaves = {str(source_name(n)): values[n.name].double() for n in _activations(node)}
    try:
        y64, pre = _expected(program.source, str(source_name(node)), leaves)
    except ValueError as error:
        return refused(f"wrong wiring: {error}")
    if not bool(torch.isfinite(y).all()):
        count = int((~torch.isfinite(y)).sum())
        return refused(f"{count} values are NaN or Inf, float64 reaches {y64.abs().max():.4g}")

    def value_of(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        value = constant(program.master, argument)
        return (values[argument.name] if value is None else value).float()

    arguments = {key: value_of(argument) for key, argument in named_args(node).items()}
    rounds_weights = precision.name != "fp32"
    allowed = bound(_Call(arguments, pre, precision.roundoff, rounds_weights, separate_addition))
    difference = (y - y64).abs().float()
    z = torch.where(difference == 0, 0.0, difference / allowed.sigma)
    dead = None if pre is y64 else allowed.upper < 0
    return _verdict(name, kind, y, y64, z, dead, precision)


def _expected(source: fx.GraphModule, target: str, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """y64, and the value before the ReLU and the pool behind that (y64 itself where there is none)."""
    node = last = next(n for n in source.graph.nodes if n.name == target)
    while is_call(node, aten.relu.default, aten.max_pool2d.default) and args_of(node)[0].name not in leaves:
        node = args_of(node)[0]
    pre = evaluate(source, node.name, leaves)
    return (pre if node is last else evaluate(source, target, {node.name: pre})), pre


def _verdict(
    name: str, kind: str, y: Tensor, y64: Tensor, z: Tensor, dead: Tensor | None, precision: Precision
) -> OperatorCheck:
    live = (y != 0) | (y64 != 0)  # the exact zeros behind a ReLU would dilute the mean
    rms = (z.square().sum() / live.sum().clamp(min=1)).sqrt().item()
    peak = z.max().item()
    limit = MAX_LIMIT_FP32 if precision.name == "fp32" else MAX_LIMIT
    worst = tuple(int(i) for i in torch.unravel_index(z.argmax(), z.shape))
    reason = ""
    if dead is not None and bool((y[dead] != 0).any()):
        reason = f"{int((y[dead] != 0).sum())} values are not 0 where the ReLU's input is clearly negative"
    elif not rms <= RMS_LIMIT:
        reason = f"rms error is {rms:.3g} times what rounding explains, the limit is {RMS_LIMIT:g}"
    elif not peak <= limit:
        reason = f"largest error is {peak:.3g} times what rounding explains, the limit is {limit:g}"
    return OperatorCheck(name, kind, rms, peak, reason, worst, y[worst].item(), y64[worst].item())
