"""P1: every operator on its own, against the unfused float64 graph on the operator's own input.

With x, W, b, r the input, weight, bias and residual, and pre the value before the ReLU,

    sigma^2 = (0.41 u)^2 (conv(x^2, W^2) + b^2)
            + u32^2 max(1, K/2) (conv(x^2, W^2) + b^2 + r^2)
            + (0.41 u)^2 pre^2

is the variance that rounding weight and bias to the storage type, accumulating in float32 and rounding
the result explain. For float32 the first term is 0. A runtime that adds the residual in an operator of
its own also rounds the sum before it: (0.41 u)^2 (pre - r)^2 more.

An operator passes when z = |y - y64| / sigma has rms <= 1.6 over the values that are not exactly 0 and
max <= 9 (16 for float32), all is finite, and y is exactly 0 wherever a ReLU's input is below -8 sigma.
max-pool must be exact.

y64 comes from the captured graph, not from the fused one: a wrongly folded weight or a residual taken
from the wrong place is an error here, not part of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from export.capture import plain_torch
from export.graph import args_of, aten, constant, is_call, module_path, moves_data, parameter, schema_name, source_name
from export.parity.network import finite
from export.passes.fuse_epilogue import FUSED
from export.precision import Precision
from export.program import FusedProgram

_ROUNDING = 0.41
_U32 = 2.0**-24
RMS_LIMIT = 1.6
MAX_LIMIT = 9.0
MAX_LIMIT_FP32 = 16.0
_DEAD = 8.0


@dataclass(frozen=True)
class OperatorCheck:
    """One operator of one candidate; true when it passed.

    Attributes:
        name: the module of the user's model.
        kind: the operator.
        rms_z, max_z: error in units of what rounding explains; 0 or inf for an exact operator.
        reason: why it failed, empty where it passed.
        worst: index of the worst element.
        got, expected: its value and the float64 value.
    """

    name: str
    kind: str
    rms_z: float
    max_z: float
    reason: str = ""
    worst: tuple[int, ...] = ()
    got: float = 0.0
    expected: float = 0.0

    def __bool__(self) -> bool:
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        z = {"rms_z": finite(self.rms_z), "max_z": finite(self.max_z)}
        return {"name": self.name, "kind": self.kind, **z, "reason": self.reason}


@dataclass(frozen=True)
class OperatorChecks:
    """All operators of one candidate; true when each passed and there was at least one."""

    checks: tuple[OperatorCheck, ...]
    unchecked: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.checks) and all(self.checks)

    @property
    def first_failure(self) -> OperatorCheck | None:
        return next((check for check in self.checks if not check), None)


def check_operators(
    program: FusedProgram, precision: Precision, trace: Mapping[str, Tensor], separate_addition: bool = False
) -> OperatorChecks:
    """Hold every convolution, linear, mean and max-pool of a candidate to its rounding error.

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
            model = _model(program, node)
            if model is None:
                unchecked.append(module_path(node))
                continue
            shown = {n.name: _value(n, trace) for n in [node, *_activations(node)]}
            values = {name: value for name, value in shown.items() if value is not None}
            if len(values) < len(shown) or any(source_name(n) is None for n in [node, *_activations(node)]):
                unchecked.append(module_path(node))
                continue
            checks.append(_check(program, precision, node, model, values, separate_addition))
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
class _Statistics:
    """What an operator's error is measured by.

    Attributes:
        products: conv(x^2, W^2), the sum of the squared products.
        constants: b^2.
        residual: r, 0 where there is none.
        length: K, how many products are summed.
        rounded: whether weight and bias are rounded to the storage type.
    """

    products: Tensor
    constants: Tensor | float
    residual: Tensor | float
    length: int
    rounded: bool


def _conv(program: FusedProgram, node: fx.Node, x: Tensor, residual: Tensor | None) -> _Statistics:
    weight, bias = (parameter(program.master, argument) for argument in args_of(node)[1:3])
    products = F.conv2d(x.float().square(), weight.float().square(), None, *args_of(node)[4:8])
    r = 0.0 if residual is None else residual.float()
    return _Statistics(products, bias.float().square()[:, None, None], r, weight[0].numel(), rounded=True)


def _linear(program: FusedProgram, node: fx.Node, x: Tensor, residual: Tensor | None) -> _Statistics:
    weight = parameter(program.master, args_of(node)[1])
    bias = constant(program.master, args_of(node)[2]) if len(node.args) > 2 else None
    products = F.linear(x.float().square(), weight.float().square())
    return _Statistics(products, 0.0 if bias is None else bias.float().square(), 0.0, weight.shape[1], rounded=True)


def _mean(program: FusedProgram, node: fx.Node, x: Tensor, residual: Tensor | None) -> _Statistics:
    dims, keep = args_of(node)[1], len(node.args) > 2 and args_of(node)[2]
    length = math.prod(x.shape[dim] for dim in dims)
    return _Statistics(x.float().square().mean(dims, keep) / length, 0.0, 0.0, length, rounded=False)


def _exact(program: FusedProgram, node: fx.Node, x: Tensor, residual: Tensor | None) -> None:
    return None


def _model(program: FusedProgram, node: fx.Node) -> Any:
    """The error model of a call, None where it has none: other operators, axes or computed parameters."""
    if is_call(node, aten.mean.dim):
        x = args_of(node)[0].meta["val"]
        return _mean if x.dim() == 4 and sorted(d % 4 for d in args_of(node)[1]) == [2, 3] else None
    if is_call(node, aten.linear.default):
        computed = [n for n in args_of(node)[1:] if n is not None and constant(program.master, n) is None]
        return _linear if args_of(node)[0].meta["val"].dim() == 2 and not computed else None
    if is_call(node, FUSED):
        return _conv
    return _exact if is_call(node, aten.max_pool2d.default) else None


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
    model: Any,
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
    target = str(source_name(node))
    try:
        y64, pre = _expected(program.source, target, leaves)
    except ValueError as error:
        return refused(f"wrong wiring: {error}")
    if not bool(torch.isfinite(y).all()):
        count = int((~torch.isfinite(y)).sum())
        return refused(f"{count} values are NaN or Inf, float64 reaches {y64.abs().max():.4g}")
    x = values[args_of(node)[0].name]
    residual = values[args_of(node)[3].name] if is_call(node, FUSED) and args_of(node)[3] is not None else None
    statistics = model(program, node, x, residual)
    difference = (y - y64).abs().float()
    if statistics is None:  # exact
        z = torch.where(difference == 0, 0.0, float("inf"))
        return _verdict(name, kind, y, y64, z, None, precision)
    sigma = _sigma(statistics, pre, precision, separate_addition and residual is not None)
    z = torch.where(difference == 0, 0.0, difference / sigma)
    dead = None if pre is y64 else pre + _DEAD * sigma < 0
    return _verdict(name, kind, y, y64, z, dead, precision)


def _expected(source: fx.GraphModule, target: str, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """y64 and the value before the ReLU (y64 itself where there is none)."""
    node = next(n for n in source.graph.nodes if n.name == target)
    if is_call(node, aten.relu.default) and args_of(node)[0].name not in leaves:
        pre = evaluate(source, args_of(node)[0].name, leaves)
        return pre.relu(), pre
    y64 = evaluate(source, target, leaves)
    return y64, y64


def _sigma(statistics: _Statistics, pre: Tensor, precision: Precision, separate_addition: bool) -> Tensor:
    rounding = (_ROUNDING * precision.roundoff) ** 2
    summed = statistics.products + statistics.constants
    pre = pre.float()
    variance = _U32**2 * max(1.0, statistics.length / 2) * (summed + statistics.residual**2)
    variance = variance + rounding * pre.square()
    if statistics.rounded and precision.name != "fp32":
        variance = variance + rounding * summed
    if separate_addition:
        variance = variance + rounding * (pre - statistics.residual).square()
    return variance.sqrt()


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
