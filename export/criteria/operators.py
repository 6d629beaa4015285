"""P1: every operator on its own, against the unfused float64 graph on the operator's own input.

An operator passes when z = |y - y64| / sigma, with sigma from `bounds`, has rms <= 1.6 over the values that are not
exactly 0 and max <= 9 (16 for float32), all is finite, and y is exactly 0 wherever a ReLU's input is below -8 sigma.
Of fewer than 36 values the rms may be what it is of so many normal ones once in a million times. Where that fails and
weights were rounded, z is that against the correctly rounded ones, without their part of sigma: all values of an output
channel share one draw of it. Values below the smallest normal number of the type, as in channels that training has
switched off, are judged by who reads them: where no reader would change by more than a sigma had they been exact, z is
that of the other values.

y64 comes from the captured graph, not from the fused one: a wrongly folded weight or a residual taken
from the wrong place is an error here, not part of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import chdtri, stdtrit
from torch import Tensor, fx

from export.base.precision import PRECISIONS, Precision
from export.criteria.bounds import BOUNDS, Call, shared_variance
from export.criteria.fault import fault_of
from export.fusion.capture import plain_torch
from export.fusion.interpreter import GraphInterpreter, WideConvolutions
from export.fusion.nodes import (
    args_of,
    aten,
    constant,
    fits,
    is_call,
    is_size,
    module_path,
    moves_data,
    named_args,
    schema_name,
    size_at,
    source_name,
    spoken_name,
    tensor_inputs,
    weighs,
)
from export.fusion.program import FusedProgram, operator_nodes
from export.runtime.parity.checks import UNDERFLOW, Fault, OperatorCheck, OperatorChecks
from kernels.rounding import MAX_RMS_Z, MAX_Z, UNIT_ROUNDOFF, Bound, Rounding

_SEVERAL = 3.0  # sigmas: more than rounding does to most values
_BY_CHANCE = 1e-6  # the share of right operators of few values that may be refused
_EXACT = 1e-9  # relative, of float64 sums in another order
_DRIFT = 4.9  # standard deviations of a mean, beyond which one in a million is
_RESULTS = 2**17  # four times as many as show that a sum is truncated after every product: see test_accumulators
_TILE = 2**18  # values of a result that are looked at together: 2 MB in float64


def check_operators(
    program: FusedProgram, precision: Precision, trace: Mapping[str, Tensor], separate_addition: bool = False
) -> OperatorChecks:
    """Hold every fused operator, linear, mean and max-pool of a candidate to its rounding error.

    Args:
        program: the fused program the candidate was made from.
        precision: the candidate's.
        trace: fused-graph node name -> the tensor the candidate computed there, and its inputs.
        separate_addition: the candidate adds residuals in an operator of its own.

    Returns:
        One check per operator in execution order; `unchecked` names the operators without a criterion
        and those whose tensors the candidate does not show, `unproved` the convolutions and linear layers among them.
    """
    checks, unchecked, unproved = [], [], []
    with plain_torch():
        for node in operator_nodes(program.master):
            check = _check_node(program, precision, node, trace, separate_addition)
            if check is None:
                unchecked.append(module_path(node))
                if weighs(node):
                    unproved.append(f"{module_path(node)} ({schema_name(node)})")
            else:
                checks.append(check)
    return OperatorChecks(tuple(checks), tuple(unchecked), tuple(unproved))


def check_alone(program: FusedProgram, precision: Precision, inputs: Mapping[str, Tensor]) -> list[OperatorCheck]:
    """Hold each operator, alone in `precision` and fed with what float32 makes of the network, to its rounding error.

    Whatever a layer before it does to a value, it is judged by what it does itself.

    Args:
        program: of which none is kept in float32.
        precision: of 16 bits.
        inputs: name -> [N, ...] float32.

    Returns:
        One check per operator that has a criterion.
    """
    checks = []
    with plain_torch(), WideConvolutions():
        interpreter = GraphInterpreter(program.graph_module, {})
        interpreter.values = {}
        interpreter.run(*inputs.values())
        exact = {name: _rounded(value, precision.dtype) for name, value in interpreter.values.items()}
        for node in operator_nodes(program.master):
            if _bound(program, node) is None:
                continue

            def value_of(n: fx.Node) -> Any:
                parameter = constant(program.master, n)
                return exact[n.name] if parameter is None else _rounded(parameter, precision.dtype)

            target: Any = node.target
            args, kwargs = fx.node.map_arg(node.args, value_of), fx.node.map_arg(node.kwargs, value_of)
            y = target(*args, **kwargs)
            check = _check_node(program, precision, node, {**exact, node.name: y}, separate_addition=False)
            if check is not None:
                checks.append(check)
    return checks


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _check_node(
    program: FusedProgram, precision: Precision, node: fx.Node, trace: Mapping[str, Tensor], separate_addition: bool
) -> OperatorCheck | None:
    """The check of one operator; None where it has no criterion or the candidate does not show its tensors."""
    values = _shown(program, node, trace)
    if values is None:
        return None
    own = _precision_of(program, node, precision)
    check = _passed(program, own, node, values, separate_addition)
    check = check or _check(program, own, node, values, separate_addition)
    if check or check.fault is None or own.name == "fp32":
        return check
    y, y64 = values[node.name].double(), _expected_of(program, node, values, own.dtype)
    sigma = _allowed(program, own, node, values, separate_addition).sigma
    faint = _faint(y, own.dtype) & _faint(y64, own.dtype) & ((y - y64).abs() > _SEVERAL * sigma)
    if not bool(faint.any()) or bool(faint[y64 != 0].all()) or not bool(torch.isfinite(y).all()):
        return check
    mended = torch.where(faint, y64, y)
    for reader in _readers(node):
        if _notices(program, precision, reader, trace, {**trace, node.name: mended}, separate_addition):
            return check
    return _check(program, own, node, {**values, node.name: mended}, separate_addition)


def _shown(program: FusedProgram, node: fx.Node, trace: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What an operator read and computed; None where it has no criterion or not all of that is known."""
    shown = {n.name: _value(n, trace) for n in [node, *_activations(node)]}
    values = {name: value for name, value in shown.items() if value is not None}
    known = len(values) == len(shown) and all(source_name(n) for n in [node, *_activations(node)])
    return values if known and _bound(program, node) is not None else None


def _precision_of(program: FusedProgram, node: fx.Node, precision: Precision) -> Precision:
    return PRECISIONS["fp32"] if module_path(node) in program.kept else precision


def _faint(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where values are below the smallest normal number of a type."""
    return values.abs() < torch.finfo(dtype).tiny


def _flushes(weights: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether weights below the smallest normal number of a type lose more than rounding takes of others."""
    return any(bool((_faint(w, dtype) & (_rounded(w, dtype) != w)).any()) for w in weights)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, through what only moves data."""
    return [
        end for user in node.users for end in (_readers(user) if moves_data(user) and user.op != "output" else [user])
    ]


def _expected_of(
    program: FusedProgram, node: fx.Node, values: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Tensor:
    """y64 of an operator on what it reads, rounded to a type or as it is."""
    read = {n: values[n.name] if dtype is None else _rounded(values[n.name], dtype) for n in _activations(node)}
    leaves = {str(source_name(n)): x.double() for n, x in read.items()}
    return _expected(program.source, node, leaves)[0]


def _notices(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    trace: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    separate_addition: bool,
) -> bool:
    """Whether an operator computes something else, beyond its sigma, from other values than it was given."""
    given, instead = _shown(program, node, trace), _shown(program, node, exact)
    if given is None or instead is None:
        return True
    own = _precision_of(program, node, precision)
    y, other = _expected_of(program, node, given, own.dtype), _expected_of(program, node, instead, None)
    sigma = _allowed(program, own, node, given, separate_addition).sigma
    changed = (y - other).abs() > sigma
    return bool((changed & ~(_faint(y, own.dtype) & _faint(other, own.dtype))).any())


def evaluate(source: fx.GraphModule, name: str, leaves: Mapping[str, Tensor]) -> Tensor:
    """The value of the node `name` of the captured graph, given the values of `leaves`.

    Raises:
        ValueError: it also depends on something that is not among the leaves.
    """
    if name in leaves:
        raise ValueError("it would be compared with itself")
    nodes = {node.name: node for node in source.graph.nodes}
    known: dict[str, Any] = dict(leaves)
    waiting = [nodes[name]]  # no function that calls itself: that would keep all values until a garbage collection
    while waiting:
        node = waiting[-1]
        if node.name in known:
            pass
        elif node.op == "get_attr":
            known[node.name] = _exact(constant(source, node))
        elif node.op == "call_function" and is_size(node):
            known[node.name] = size_at(node, _batch_of(nodes, leaves))
        elif node.op != "call_function":
            raise ValueError(f"it does not follow from {', '.join(leaves)}")
        elif unknown := [n for n in node.all_input_nodes if n.name not in known]:
            waiting += unknown
            continue
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n.name])
            target: Any = node.target
            known[node.name] = target(*args, **kwargs)
        waiting.pop()
    return known[name]


def _exact(constant: Tensor | None) -> Tensor | None:
    """In float64, convolution weights channels_last."""
    if constant is None or not constant.is_floating_point():
        return constant
    layout = torch.channels_last if constant.dim() == 4 else torch.contiguous_format
    return constant.to(torch.float64, memory_format=layout)


def _batch_of(nodes: Mapping[str, fx.Node], leaves: Mapping[str, Tensor]) -> int:
    """The batch size that `leaves` were computed for."""
    for name, value in leaves.items():
        for size, length in zip(nodes[name].meta["val"].shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt):
                return length // size_at(size, 1)  # as many as there are per image
    raise ValueError(f"its size does not follow from {', '.join(leaves)}")


def _bound(program: FusedProgram, node: fx.Node) -> Callable[[Call], Bound] | None:
    """The error model of a call, None where it has none: other operators, axes or computed parameters."""
    if is_call(node, aten.mean.dim):
        x = args_of(node)[0].meta["val"]
        if x.dim() != 4 or sorted(d % 4 for d in args_of(node)[1]) != [2, 3]:
            return None
    target: Any = node.target
    return BOUNDS.get(target)


def _activations(node: fx.Node) -> list[fx.Node]:
    """The tensors a node computes from, its parameters apart."""
    return tensor_inputs(node)


_REARRANGES = (aten.cat.default, aten.stack.default, aten.pixel_shuffle.default, aten.channel_shuffle.default)


def _value(node: fx.Node, trace: Mapping[str, Tensor]) -> Any:
    """What the candidate holds for `node`; what only moves values follows from those that it moves."""
    if node.name in trace:
        return trace[node.name]
    if is_call(node, aten._to_copy.default):
        return _value(args_of(node)[0], trace)  # of another type, to which whoever reads it rounds it
    inputs = node.all_input_nodes
    moved = node.op == "call_function" and (moves_data(node) or is_call(node, *_REARRANGES))
    if not moved or not inputs or any(n.op == "get_attr" for n in inputs):
        return None
    x = next(n for n in node.graph.nodes if n.op == "placeholder")
    found: dict[fx.Node, Any] = {}
    for n in inputs:
        found[n] = _value(n, trace) if not is_size(n) else size_at(n, len(trace[x.name])) if x.name in trace else None
    if any(value is None for value in found.values()):
        return None
    target: Any = node.target
    return target(*fx.node.map_arg(node.args, found.__getitem__), **fx.node.map_arg(node.kwargs, found.__getitem__))


def _passed(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    values: Mapping[str, Tensor],
    separate_addition: bool,
) -> OperatorCheck | None:
    """The check of an operator that passes, made of a few images at a time, which lie in the processor's caches.

    None where it does not pass, or where that takes looking at more: `_check` then sees all of it.
    """
    shown, y, dtype = [node, *_activations(node)], values[node.name], precision.dtype
    if not all(fits(n, values[n.name].shape) for n in shown):
        return None
    weighs_in = precision.name != "fp32" and any(constant(program.master, n) is not None for n in node.all_input_nodes)
    by_image = _by_image(shown)
    rows = max(1, _TILE * len(y) // max(1, y.numel())) if by_image else max(1, len(y))
    sampled = max(1, _RESULTS * len(y) // max(1, y.numel())) if weighs_in else 0
    squares, peak, count, kept = 0.0, 0.0, 0, []
    for start in range(0, len(y), rows):
        part = {n.name: values[n.name][start : start + rows] if by_image else values[n.name] for n in shown}
        found = _looked_at(program, precision, node, part, separate_addition)
        if found is None:
            return None
        squares, peak, count = squares + found.squares, max(peak, found.peak), count + found.count
        if start < sampled:
            kept.append((found.y64, found.pre))
    limits = (rms_limit(count), MAX_Z[dtype])
    rms = (squares / max(count, 1)) ** 0.5
    if _why_not(rms, peak, *limits, 0):
        return None
    if sampled:
        y64, pre = (torch.cat(parts) for parts in zip(*kept, strict=True))
        beyond = _beyond_weights(
            program, precision, node, values, separate_addition, y64[:sampled], pre[:sampled], False
        )
        if beyond is not None and beyond.why_not(limits[1]):
            return None
    return OperatorCheck(module_path(node), schema_name(node), rms, peak, *limits)


@dataclass(frozen=True)
class _Tile:
    """Some images of an operator with nothing wrong that shows in each value: z^2 summed, its peak, how many live."""

    y64: Tensor
    pre: Tensor
    squares: float
    peak: float
    count: int


def _looked_at(
    program: FusedProgram, precision: Precision, node: fx.Node, values: Mapping[str, Tensor], separate_addition: bool
) -> _Tile | None:
    """z of some images; None where a value is broken, lost to underflow, or alive behind a closed ReLU."""
    y, leaves = values[node.name].double(), {}
    for n in _activations(node):
        held, x = values[n.name], _rounded(values[n.name], precision.dtype)
        if not bool(torch.isfinite(x).all()):
            return None
        if x.dtype != held.dtype and bool((_faint(held, precision.dtype) & (x != held)).any()):
            return None
        leaves[str(source_name(n))] = x.double()
    try:
        y64, pre = _expected(program.source, node, leaves)
    except ValueError:
        return None
    bound = _allowed(program, precision, node, values, separate_addition, pre)
    difference = (y - y64).abs_().float()
    z = (difference / bound.sigma).masked_fill_(difference == 0, 0.0)
    alive = pre is not y64 and bool(((y != 0) & (bound.upper < 0)).any())
    peak = z.max().item() if len(z) else 0.0
    if alive or not math.isfinite(peak):
        return None
    return _Tile(y64, pre, z.square().sum().item(), peak, int(torch.count_nonzero((y != 0) | (y64 != 0))))


def _by_image(nodes: list[fx.Node]) -> bool:
    """Whether the rows of all these values are the images of a batch of any size."""
    sizes = [n.meta["val"].shape[0] if n.meta["val"].dim() else 0 for n in nodes]
    expressions = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
    return len(expressions) == len(sizes) and all(e.is_Symbol and e == expressions[0] for e in expressions)


def _check(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    values: Mapping[str, Tensor],
    separate_addition: bool,
) -> OperatorCheck:
    name, kind, dtype = module_path(node), schema_name(node), precision.dtype
    limits = (MAX_RMS_Z, MAX_Z[dtype])

    def refused(reason: str, fault: Fault | None = None) -> OperatorCheck:
        return OperatorCheck(name, kind, float("inf"), float("inf"), *limits, reason, fault)

    for n in [node, *_activations(node)]:
        if not fits(n, values[n.name].shape):
            expected = list(n.meta["val"].shape[1:])
            return refused(f"{spoken_name(n)} has shape {list(values[n.name].shape)}, expected [N, *{expected}]")
    y, read = values[node.name].double(), {n: _rounded(values[n.name], dtype) for n in _activations(node)}
    for n, x in read.items():
        if not bool(torch.isfinite(x).all()):
            broken = f"{_count_broken(x)} in what it reads"
            return refused(broken, fault_of(x, values[n.name].double(), None, dtype))
    leaves = {str(source_name(n)): x.double() for n, x in read.items()}
    try:
        y64, pre = _expected(program.source, node, leaves)
    except ValueError as error:
        return refused(f"wrong wiring: {error}")
    weights = [w for n in node.all_input_nodes if (w := constant(program.master, n)) is not None]
    if not bool(torch.isfinite(y).all()):
        largest = f"the largest {dtype} is {torch.finfo(dtype).max:.5g}"
        return refused(f"{_count_broken(y)}, {largest}", fault_of(y, y64, None, dtype))
    allowed = _allowed(program, precision, node, values, separate_addition, pre)
    for n, x in read.items():
        held = values[n.name].double()
        faint = _faint(held, dtype) & (x != held)
        instead = {**values, n.name: torch.where(faint, held, x.double())}
        if bool(faint.any()) and _notices(program, precision, node, values, instead, separate_addition):
            lost = torch.where(faint, (x - held).abs(), 0.0)
            reason = f"what it reads lies below the smallest normal {dtype}, {torch.finfo(dtype).tiny:.3g}"
            return refused(reason, fault_of(x.double(), held, lost, dtype, kind=UNDERFLOW))
    difference = (y - y64).abs().float()
    z = torch.where(difference == 0, 0.0, difference / allowed.sigma)
    dead = None if pre is y64 else allowed.upper < 0
    live = (y != 0) | (y64 != 0)  # the exact zeros behind a ReLU would dilute the mean
    limits = (rms_limit(int(live.sum())), limits[1])
    rms, peak = (z.square().sum() / live.sum().clamp(min=1)).sqrt().item(), z.max().item()
    alive = 0 if dead is None else int((y[dead] != 0).sum())
    reason = _why_not(rms, peak, *limits, alive)
    if weights and precision.name != "fp32" and not alive:
        few = len(y64) if reason else max(1, _RESULTS * len(y64) // y64.numel())
        beyond = None
        if _same_weights(program, precision, node, values, y64[:few]):
            beyond = _beyond_weights(
                program, precision, node, values, separate_addition, y64[:few], pre[:few], bool(reason)
            )
        if beyond is not None and not (reason and _flushes(weights, dtype)):
            wrong = beyond.why_not(limits[1])
            if bool(wrong) is not bool(reason):
                rms, peak, limits = beyond.rms, beyond.peak, (rms_limit(beyond.values), limits[1])
                reason = wrong and f"with its weights rounded, {wrong}"
    fault = fault_of(y, y64, z, dtype, weights) if reason else None
    return OperatorCheck(name, kind, rms, peak, *limits, reason, fault)


@dataclass(frozen=True)
class _Beyond:
    """The error of an operator whose rounded weights are known, in units of what rounding explains beside them.

    Attributes:
        rms, peak: of z.
        values: how many of them are not exactly 0.
        drift: the mean of z away from zero.
        shared: the variance that the drift has from roundings inside the operator, which results share.
        scatter: what the drift may be, seen how much it differs between channels: where next to nothing is added to a
            shortcut, or a constant, all values of a channel are rounded alike.
        bias: what the drift may be with every draw: that of sums truncated after every 8 products, as on tensor cores,
            and that of results which become fewer the larger they are, so that more of them are rounded up than down.
    """

    rms: float
    peak: float
    values: int
    drift: float
    shared: float
    scatter: float
    bias: float

    def why_not(self, max_limit: float) -> str:
        found = _why_not(self.rms, self.peak, rms_limit(self.values), max_limit, 0)
        limit = max(_DRIFT * (1 / max(self.values, 1) + self.shared) ** 0.5, self.scatter) + self.bias
        if found or abs(self.drift) <= limit:
            return found
        return (
            f"the mean error away from zero is {self.drift:.3g} times what rounding explains, the limit is {limit:.2g}"
        )


def _beyond_weights(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    values: Mapping[str, Tensor],
    separate_addition: bool,
    y64: Tensor,
    pre: Tensor,
    every: bool,
) -> _Beyond | None:
    """The error against the operator with the float64 weights, each rounded to the type.

    All values of an output channel share one rounding of its weights: of one channel, or few, one in nine is beyond the
    limit on the mean with nothing wrong. So that part is taken out of the error and out of what is allowed. It would
    also hide sums that are rounded to 16 bits now and then, which costs as much, and sums that are truncated, which
    draws all results towards 0. Looked at are the first images, as many as `y64` has: `every` one or as many as have
    _RESULTS results; and of these what has no activation but a ReLU behind it, which hides nothing of the sum that is
    rounded.
    """
    values = _first(values, node, len(y64))
    y, expected = values[node.name].double(), _with_weights(program, precision, node, values, precision.dtype)
    bare = node.meta.get("before_activation") is None and pre.shape == expected.shape  # a ReLU at most is behind it
    if not (bare or every):
        return None
    sigma = _allowed(
        program,
        precision,
        node,
        values,
        separate_addition,
        expected if bare else pre,
        weights_too=False,
        truncates=not every,
    ).sigma
    live = (y != 0) | (expected != 0)
    if not every:  # such values are judged by who reads them
        live &= ~(_faint(y, precision.dtype) & _faint(expected, precision.dtype))
    if not bool(live.any()):
        return _Beyond(0.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0)
    z = ((y - expected).float() / sigma)[live]
    signed = z * expected[live].sign()
    read = {n: _rounded(values[n.name], precision.dtype) for n in _activations(node)}
    pull = torch.where(live, expected.sign().float() / sigma, 0.0) if bare else torch.zeros_like(sigma)
    shared = shared_variance(node.target, _arguments(program, node, read), pull, Rounding(precision.roundoff))
    length = max(w[0].numel() for n in node.all_input_nodes if (w := constant(program.master, n)) is not None)
    return _Beyond(
        z.square().mean().sqrt().item(),
        z.abs().max().item(),
        len(z),
        signed.mean().item(),
        shared / len(z) ** 2,
        _scatter(torch.zeros_like(expected).masked_scatter(live, signed), live),
        length / 8 * UNIT_ROUNDOFF[torch.float32] / precision.roundoff + 4 * precision.roundoff,
    )


def _same_weights(
    program: FusedProgram, precision: Precision, node: fx.Node, values: Mapping[str, Tensor], y64: Tensor
) -> bool:
    """Whether with the weights of float64 an operator is the captured one; else they are wrong, however rounded."""
    exact = _with_weights(program, precision, node, _first(values, node, len(y64)), torch.float64)
    return float((exact - y64).norm()) <= _EXACT * float(y64.norm())


def _first(values: Mapping[str, Tensor], node: fx.Node, count: int) -> dict[str, Tensor]:
    """What an operator read and computed of the first images."""
    rows = values[node.name].shape[:1]
    return {name: value[:count] if value.shape[:1] == rows else value for name, value in values.items()}


def _with_weights(
    program: FusedProgram, precision: Precision, node: fx.Node, values: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """What an operator makes in float64 of what it read, with its weights rounded to a type."""

    def value_of(n: fx.Node) -> Tensor:
        held = constant(program.master, n)
        value = _rounded(values[n.name], precision.dtype) if held is None else _rounded(held, dtype)
        layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
        return value.to(torch.float64, memory_format=layout)

    target: Any = node.target
    result: Tensor = target(*fx.node.map_arg(node.args, value_of), **fx.node.map_arg(node.kwargs, value_of))
    return result


def _scatter(values: Tensor, live: Tensor) -> float:
    """What the mean of the live ones of [N, C, ...] may be once in a million times, each channel being one draw.

    Channels that are alike, as where they were repeated, are one.
    """
    others = [dim for dim in range(values.dim()) if dim != 1]
    sums, which = torch.unique(values.sum(others), return_inverse=True)
    counts = torch.zeros_like(sums).index_add(0, which, live.sum(others).double())
    sums = torch.zeros_like(sums).index_add(0, which, values.sum(others))
    total = counts.sum()
    channels = (total.square() / counts.square().sum()).item()  # as many of one size
    if channels < 2:
        return float("inf")
    deviation = (sums - sums.sum() / total * counts).square().sum().sqrt() / total
    return float(stdtrit(channels - 1, 1 - _BY_CHANCE / 2)) * (channels / (channels - 1)) ** 0.5 * deviation.item()


def _allowed(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    values: Mapping[str, Tensor],
    separate_addition: bool,
    pre: Tensor | None = None,
    weights_too: bool = True,
    truncates: bool = False,
) -> Bound:
    """What rounding explains of an operator's error; `pre` is what its activation reads, if it is known already."""
    read = {n: _rounded(values[n.name], precision.dtype) for n in _activations(node)}
    if pre is None:
        leaves = {str(source_name(n)): x.double() for n, x in read.items()}
        pre = _expected(program.source, node, leaves)[1]

    arguments = _arguments(program, node, read)
    given, bound = named_args(node), _bound(program, node)
    weights = [given["weight"]] if "weight" in given else list(given.values())
    held = any(constant(program.master, weight) is not None for weight in weights)
    rounds_weights = weights_too and precision.name != "fp32" and held
    assert bound is not None  # who asks has seen to it
    rounding = Rounding(precision.roundoff, rounds_weights, separate_addition, truncates=truncates)
    return bound(Call(arguments, pre, rounding))


def _arguments(program: FusedProgram, node: fx.Node, read: Mapping[fx.Node, Tensor]) -> dict[str, Any]:
    """Those of an operator by name, its tensors in float32: what it reads, and its weights as they are."""

    def value_of(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        value = constant(program.master, argument)
        return (read[argument] if value is None else value).float()

    return {key: value_of(argument) for key, argument in named_args(node).items()}


def rms_limit(values: int) -> float:
    """What the root mean square of z may be: with few values, the part that chance has in it is large."""
    return max(MAX_RMS_Z, float(chdtri(values, _BY_CHANCE) / values) ** 0.5) if values else MAX_RMS_Z


def _count_broken(values: Tensor) -> str:
    return f"{int((~torch.isfinite(values)).sum())} values are NaN or Inf"


def _why_not(rms: float, peak: float, rms_limit: float, max_limit: float, alive: int) -> str:
    """Why an operator fails, empty where it passes; `alive`: values that a ReLU should have made 0."""
    if alive:
        return f"{alive} values are not 0 where the ReLU's input is clearly negative"
    if not rms <= rms_limit:
        return f"rms error is {rms:.3g} times what rounding explains, the limit is {rms_limit:g}"
    if not peak <= max_limit:
        return f"largest error is {peak:.3g} times what rounding explains, the limit is {max_limit:g}"
    return ""


def _expected(source: fx.GraphModule, fused: fx.Node, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """y64, and the value before the activation and the pool behind that (y64 itself where there is none)."""
    target, before = str(source_name(fused)), fused.meta.get("before_activation")
    if before is not None:
        pre = evaluate(source, before, leaves)
        return evaluate(source, target, {**leaves, before: pre}), pre
    node = last = next(n for n in source.graph.nodes if n.name == target)
    while is_call(node, aten.relu.default, aten.max_pool2d.default) and args_of(node)[0].name not in leaves:
        node = args_of(node)[0]
    pre = evaluate(source, node.name, leaves)
    return (pre if node is last else evaluate(source, target, {node.name: pre})), pre
