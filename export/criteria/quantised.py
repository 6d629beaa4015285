"""P4: every quantised value of a candidate, against the float64 graph fed with the candidate's own quantised values.

Between one quantisation and the next lies one operator: whole numbers go in, whole numbers come out. Exact
accumulators and any rounding of what follows them leave at most 1 unit in the last place (LSB) between the candidate
and the float64 graph of the same scales, and that only where the exact result lies next to a tie: seldom. Correct
files were seen to differ in at most 0.006 % of the elements of a value with float32 between the quantisations, 1.5 %
with float16. What no quantisation follows, such as logits, may differ by the rounding of its type. Where more than one
operator lies between, or sums cancel, and those limits do not hold, `spread` says what rounding explains instead.
`scales` has what the quantised graph itself is held to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx

from export.base.precision import Precision
from export.criteria.explained import evaluate
from export.criteria.fault import fault_of, quantised_fault_of
from export.criteria.scales import Lazily, check_layers, check_scales, largest
from export.criteria.spread import draws, spread
from export.fusion.capture import plain_torch
from export.fusion.nodes import args_of, fits, is_call, module_path, parameter, resnet_deploy, schema_name
from export.fusion.program import QuantisedProgram, output_nodes
from export.lowering.convolutions import WideConvolutions
from export.lowering.onnx_file import OnnxFile
from export.quantisation.scheme import Range, Scheme
from export.runtime.parity.checks import OperatorChecks, QuantisedCheck

LIMIT = 1  # LSB
_DIFFERING = {"fp32": 0.001, "fp16": 0.05}  # share of the elements of a value
_FEW = 4  # elements that may differ however small a value is
_FLOAT_LIMIT = {"fp32": 16.0, "fp16": 4.0}  # roundoffs of the largest value, for what is not quantised
_TINY = torch.finfo(torch.float64).tiny


def check_quantised(
    program: QuantisedProgram, ranges: Mapping[str, Range], scheme: Scheme, trace: Mapping[str, Tensor]
) -> OperatorChecks:
    """Hold a candidate to the quantised graph, and the quantised graph to the network as it was captured.

    Args:
        program: quantised; its master graph was lowered to the candidate.
        ranges: calibrated, that its scales are to cover.
        scheme: that it was quantised by.
        trace: node of the quantised graph -> the tensor the candidate computed there: the input, every quantised value
            and what the network returns.

    Returns:
        One check per quantised value, per weight, per layer and per value the network returns. What the candidate
        does not show fails.
    """
    graph, precision = program.master, scheme.arithmetic
    checks: list[QuantisedCheck] = []
    with plain_torch(), WideConvolutions():
        wanted = [*filter(_is_leaf, graph.graph.nodes), *output_nodes(graph)]
        refused = [_refused(node, reason) for node in wanted if (reason := _why_unusable(node, trace))]
        if refused:
            return OperatorChecks(tuple(refused), ())
        leaves = Lazily({n.name: partial(_wide, trace[n.name]) for n in graph.graph.nodes if _is_leaf(n)})
        values: list[QuantisedCheck] = []
        checks += check_scales(program, ranges, scheme)
        checks += check_layers(
            program, leaves, lambda node, layer: values.append(_check_value(graph, node, leaves, layer, precision))
        )
        checks += values
        for node in output_nodes(graph):
            if node.name not in leaves:
                checks.append(_check_output(graph, node, leaves, trace[node.name], precision))
    return OperatorChecks(tuple(checks), ())


def shown_values(program: QuantisedProgram, file: OnnxFile) -> dict[str, str]:
    """Node of a quantised program -> value of its file: all that a candidate must show; if more, it fuses less.

    What the network returns is read where the file returns it.
    """
    graph, returned = program.master, output_nodes(program.master)
    shown = {n.name: file.values[n.name] for n in graph.graph.nodes if _is_leaf(n) and n.name in file.values}
    return {**dict(zip((node.name for node in returned), file.output_names, strict=True)), **shown}


def _is_leaf(node: fx.Node) -> bool:
    return node.op == "placeholder" or is_call(node, resnet_deploy.quantize_linear.default)


def _why_unusable(node: fx.Node, trace: Mapping[str, Tensor]) -> str:
    """Why what the candidate shows of `node` cannot be computed with, empty where it can."""
    if node.name not in trace:
        return "the runtime does not show it"
    got, expected = list(trace[node.name].shape), list(node.meta["val"].shape)
    return "" if fits(node, got) else f"has shape {got}, expected {['N', *expected[1:]]}"


def _refused(node: fx.Node, reason: str) -> QuantisedCheck:
    return QuantisedCheck(str(node.meta.get("label", module_path(node))), schema_name(node), math.inf, 1.0, reason)


def _wide(value: Tensor) -> Tensor:
    """In float64 and the layout that the operators require."""
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return value.to(torch.float64, memory_format=layout)


def _check_value(
    graph: fx.GraphModule, node: fx.Node, leaves: Lazily, layer: Mapping[str, Tensor], precision: Precision
) -> QuantisedCheck:
    """`layer` is what the graph computes of the others at the layer before the node, if it is known already."""
    label, got, others = str(node.meta["label"]), leaves[node.name], leaves.without(node.name)
    expected = evaluate(graph, node.name, others.beside(layer)).double()
    if got.shape != expected.shape:
        reason = f"has shape {list(got.shape)}, expected {list(expected.shape)}"
        return QuantisedCheck(label, schema_name(node), float("inf"), 1.0, reason)
    difference = (got - expected).abs_()
    worst, different = largest(difference), int(difference.count_nonzero())
    reason, fault, limit, allowed = "", None, LIMIT, _DIFFERING[precision.name]
    most, beyond = max(_FEW / got.numel(), allowed), difference > LIMIT
    if bool(beyond.any()) or different > most * got.numel():
        step = parameter(graph, args_of(node)[1])
        moved = spread(graph, args_of(node)[0], others, precision.roundoff) / step  # in LSB
        explained = LIMIT + (_FLOAT_LIMIT[precision.name] * moved).floor()
        allowed = max(allowed, float(moved.clamp(max=1.0).mean()))
        most, limit, beyond = max(most, allowed), int(explained.max()), ~(difference <= explained)
    if bool(beyond.any()):
        worst = float(difference[beyond].max())
        reason = f"{worst:g} LSB off, the limit is {int(explained[beyond].min())}"
        fault = quantised_fault_of(got, expected, parameter(graph, args_of(node)[2]))
    elif different > most * got.numel():
        reason = f"{different} of {got.numel()} elements {worst:g} LSB off, the limit is {100 * allowed:g} %"
    return QuantisedCheck(label, schema_name(node), worst, different / got.numel(), reason, fault, limit, most)


def _check_output(
    graph: fx.GraphModule, node: fx.Node, leaves: Mapping[str, Tensor], value: Tensor, precision: Precision
) -> QuantisedCheck:
    expected, got = evaluate(graph, node.name, leaves).double(), value.double()
    largest = expected.abs().max().clamp(min=_TINY)
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        reason = f"has shape {list(got.shape)} or values that are NaN or Inf, expected {list(expected.shape)}"
        return QuantisedCheck(module_path(node), schema_name(node), float("inf"), 1.0, reason)
    difference = (got - expected).abs()
    differing = float((difference > 0).double().mean())
    if not value.is_floating_point():  # an argmax per pixel, say: a near tie may fall the other way
        most = _DIFFERING["fp32"]
        if differing > most:
            near = [(y != expected).double().mean() for y in draws(graph, node, leaves, precision.roundoff)]
            most = max(most, float(torch.stack(near).mean()))
        reason = "" if differing <= most else f"{differing:.1%} of the values differ, the limit is {most:.1%}"
        return QuantisedCheck(module_path(node), schema_name(node), float(difference.max()), differing, reason)
    worst = float(difference.max() / largest / precision.roundoff)
    allowed, reason, fault = _FLOAT_LIMIT[precision.name], "", None
    if not worst <= allowed:  # of what is summed, not only of what is left of it
        worst = float(difference.max() / spread(graph, node, leaves, precision.roundoff).max().clamp(min=_TINY))
    if not worst <= allowed:
        reason = f"{worst:.1f} roundoffs off, the limit is {allowed:g}"
        fault = fault_of(got, expected, difference, precision.dtype)
    return QuantisedCheck(module_path(node), schema_name(node), worst, differing, reason, fault, allowed)
