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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from export.base.precision import PRECISIONS, Precision
from export.criteria.beyond_weights import beyond_weights, rms_limit, same_weights, why_not
from export.criteria.explained import (
    activations,
    allowed_error,
    bound_of,
    expected_of_leaves,
    laid_out,
    rounded,
    subnormal,
    value_in,
)
from export.criteria.fault import fault_of
from export.fusion.capture import plain_torch
from export.fusion.interpreter import REFERENCES, GraphInterpreter, computes
from export.fusion.nodes import (
    constant,
    fits,
    module_path,
    moves_data,
    schema_name,
    source_name,
    spoken_name,
    weighs,
)
from export.fusion.program import FusedProgram, operator_nodes
from export.lowering.convolutions import WideConvolutions
from export.runtime.parity.checks import UNDERFLOW, Fault, OperatorCheck, OperatorChecks
from kernels.rounding import MAX_RMS_Z, MAX_Z

_SEVERAL = 3.0  # sigmas: more than rounding does to most values
_RESULTS = 2**17  # four times as many as show that a sum is truncated after every product: see test_accumulators
_LEAST = torch.finfo(torch.float32).tiny  # of a sigma that is divided by: 0 / 0 is no error
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
    with plain_torch(), WideConvolutions():
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
        interpreter = GraphInterpreter(program.graph_module, REFERENCES)
        interpreter.values = {}
        interpreter.run(*inputs.values())
        exact = {name: rounded(value, precision.dtype) for name, value in interpreter.values.items()}
        for node in operator_nodes(program.master):
            if bound_of(program, node) is None:
                continue

            def value_of(n: fx.Node) -> Any:
                parameter = constant(program.master, n)
                return exact[n.name] if parameter is None else rounded(parameter, precision.dtype)

            args, kwargs = fx.node.map_arg(node.args, value_of), fx.node.map_arg(node.kwargs, value_of)
            y = computes(node)(*args, **kwargs)
            check = _check_node(program, precision, node, {**exact, node.name: y}, separate_addition=False)
            if check is not None:
                checks.append(check)
    return checks


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
    sigma = allowed_error(program, own, node, values, separate_addition).sigma
    faint = subnormal(y, own.dtype) & subnormal(y64, own.dtype) & ((y - y64).abs() > _SEVERAL * sigma)
    if not bool(faint.any()) or bool(faint[y64 != 0].all()) or not bool(torch.isfinite(y).all()):
        return check
    mended = torch.where(faint, y64, y)
    for reader in _readers(node):
        if _notices(program, precision, reader, trace, {**trace, node.name: mended}, separate_addition):
            return check
    return _check(program, own, node, {**values, node.name: mended}, separate_addition)


def _shown(program: FusedProgram, node: fx.Node, trace: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What an operator read and computed; None where it has no criterion or not all of that is known."""
    shown = {n.name: value_in(n, trace) for n in [node, *activations(node)]}
    values = {name: value for name, value in shown.items() if value is not None}
    known = len(values) == len(shown) and all(source_name(n) for n in [node, *activations(node)])
    return values if known and bound_of(program, node) is not None else None


def _precision_of(program: FusedProgram, node: fx.Node, precision: Precision) -> Precision:
    return PRECISIONS["fp32"] if module_path(node) in program.kept else precision


def _flushes(weights: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether weights below the smallest normal number of a type lose more than rounding takes of others."""
    return any(bool((subnormal(w, dtype) & (rounded(w, dtype) != w)).any()) for w in weights)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, through what only moves data."""
    return [
        end for user in node.users for end in (_readers(user) if moves_data(user) and user.op != "output" else [user])
    ]


def _expected_of(
    program: FusedProgram, node: fx.Node, values: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Tensor:
    """y64 of an operator on what it reads, rounded to a type or as it is."""
    read = {n: values[n.name] if dtype is None else rounded(values[n.name], dtype) for n in activations(node)}
    leaves = {str(source_name(n)): x.double() for n, x in read.items()}
    return expected_of_leaves(program.source, node, leaves)[0]


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
    sigma = allowed_error(program, own, node, given, separate_addition).sigma
    changed = (y - other).abs() > sigma
    return bool((changed & ~(subnormal(y, own.dtype) & subnormal(other, own.dtype))).any())


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
    shown, y, dtype = [node, *activations(node)], values[node.name], precision.dtype
    if not all(fits(n, values[n.name].shape) for n in shown):
        return None
    by_image = _by_image(shown)
    weights = [w.numel() for n in node.all_input_nodes if (w := constant(program.master, n)) is not None]
    tile = max(_TILE, *weights, 0)  # they are prepared anew for each
    rows = max(1, tile * len(y) // max(1, y.numel())) if by_image else max(1, len(y))
    sampled = max(1, _RESULTS * len(y) // max(1, y.numel())) if precision.name != "fp32" and weights else 0
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
    if why_not(rms, peak, *limits, 0):
        return None
    if sampled:
        y64, pre = (torch.cat(parts) for parts in zip(*kept, strict=True))
        beyond = beyond_weights(
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
    y, read = laid_out(values[node.name]), {}
    for n in activations(node):
        held, x = values[n.name], laid_out(rounded(values[n.name], precision.dtype))
        if x.dtype != held.dtype and bool((subnormal(held, precision.dtype) & (x != held)).any()):
            return None
        read[n] = x.double()
        if not math.isfinite(read[n].sum().item()):
            return None
    try:
        y64, pre = expected_of_leaves(program.source, node, {str(source_name(n)): x for n, x in read.items()})
    except ValueError:
        return None
    given = {n.name: x.float() for n, x in read.items()}
    bound = allowed_error(program, precision, node, given, separate_addition, pre)
    z = (y.double() - y64).float().div_(bound.sigma.clamp_(min=_LEAST)).abs_()
    peak, live = z.max().item() if z.numel() else 0.0, y != 0
    if not math.isfinite(peak) or (pre is not y64 and bool((live & (bound.upper < 0)).any())):
        return None
    return _Tile(y64, pre, z.square_().sum().item(), peak, int(torch.count_nonzero(live.logical_or_(y64 != 0))))


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

    for n in [node, *activations(node)]:
        if not fits(n, values[n.name].shape):
            expected = list(n.meta["val"].shape[1:])
            return refused(f"{spoken_name(n)} has shape {list(values[n.name].shape)}, expected [N, *{expected}]")
    y, read = values[node.name].double(), {n: rounded(values[n.name], dtype) for n in activations(node)}
    for n, x in read.items():
        if not bool(torch.isfinite(x).all()):
            broken = f"{_count_broken(x)} in what it reads"
            return refused(broken, fault_of(x, values[n.name].double(), None, dtype))
    leaves = {str(source_name(n)): x.double() for n, x in read.items()}
    try:
        y64, pre = expected_of_leaves(program.source, node, leaves)
    except ValueError as error:
        return refused(f"wrong wiring: {error}")
    weights = [w for n in node.all_input_nodes if (w := constant(program.master, n)) is not None]
    if not bool(torch.isfinite(y).all()):
        largest = f"the largest {dtype} is {torch.finfo(dtype).max:.5g}"
        return refused(f"{_count_broken(y)}, {largest}", fault_of(y, y64, None, dtype))
    allowed = allowed_error(program, precision, node, values, separate_addition, pre)
    for n, x in read.items():
        held = values[n.name].double()
        faint = subnormal(held, dtype) & (x != held)
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
    reason = why_not(rms, peak, *limits, alive)
    if weights and precision.name != "fp32" and not alive:
        few = len(y64) if reason else max(1, _RESULTS * len(y64) // y64.numel())
        beyond = None
        if same_weights(program, precision, node, values, y64[:few]):
            beyond = beyond_weights(
                program, precision, node, values, separate_addition, y64[:few], pre[:few], bool(reason)
            )
        if beyond is not None and not (reason and _flushes(weights, dtype)):
            wrong = beyond.why_not(limits[1])
            if bool(wrong) is not bool(reason):
                rms, peak, limits = beyond.rms, beyond.peak, (rms_limit(beyond.values), limits[1])
                reason = wrong and f"with its weights rounded, {wrong}"
    fault = fault_of(y, y64, z, dtype, weights) if reason else None
    return OperatorCheck(name, kind, rms, peak, *limits, reason, fault)


def _count_broken(values: Tensor) -> str:
    return f"{int((~torch.isfinite(values)).sum())} values are NaN or Inf"
