"""P4: every quantised value of a candidate, against the float64 graph fed with the candidate's own quantised values.

Between one quantisation and the next lies one operator: whole numbers go in, whole numbers come out. Exact
accumulators and any rounding of what follows them leave at most 1 unit in the last place (LSB) between the candidate
and the float64 graph of the same scales, and that only where the exact result lies next to a tie: seldom. Correct
files were seen to differ in at most 0.006 % of the elements of a value with float32 between the quantisations, 1.5 %
with float16. What no quantisation follows, such as logits, may differ by the rounding of its type. The weights are
held to the float64 weights they stand for: half a step each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from export.capture import plain_torch
from export.graph import args_of, is_call, module_path, parameter, resnet_deploy, schema_name
from export.parity.checks import OperatorChecks, QuantisedCheck
from export.parity.operators import evaluate
from export.passes.quantise import LAYERS, quantisable
from export.precision import Precision
from export.program import FusedProgram

LIMIT = 1  # LSB
_DIFFERING = {"fp32": 0.001, "fp16": 0.05}  # share of the elements of a value
_FEW = 4  # elements that may differ however small a value is
_WEIGHT_LIMIT = 0.5 + 1e-6  # steps
_FLOAT_LIMIT = 16.0  # roundoffs of the largest value, for what is not quantised


def check_quantised(
    program: FusedProgram, master: fx.GraphModule, precision: Precision, trace: Mapping[str, Tensor]
) -> OperatorChecks:
    """Hold every quantised value, every quantised weight and the float logits of a candidate to what they stand for.

    Args:
        program: quantised; its master graph was lowered to the candidate.
        master: the graph before quantisation, float64, with the same layers.
        precision: of what is not quantised.
        trace: node of the quantised graph -> the tensor the candidate computed there: all quantised values, the
            input and what the network returns.

    Returns:
        One check per value and weight; `unchecked` names the values the candidate does not show.
    """
    graph = program.master
    unchecked = []
    with plain_torch():
        checks = _check_weights(graph, master)
        leaves = {n.name: _wide(trace[n.name]) for n in graph.graph.nodes if _is_leaf(n) and n.name in trace}
        for node in graph.graph.nodes:
            if is_call(node, resnet_deploy.quantize_linear.default):
                if node.name in leaves:
                    checks.append(_check_value(graph, node, leaves, precision))
                else:
                    unchecked.append(str(node.meta["label"]))
        for node in _returned(graph):
            if node.name in trace and node.name not in leaves:
                checks.append(_check_output(graph, node, leaves, trace[node.name], precision))
            else:
                unchecked.append(module_path(node))
    return OperatorChecks(tuple(checks), tuple(unchecked))


def shown_values(program: FusedProgram) -> set[str]:
    """The nodes of a quantised program that a candidate must show: no other, or its runtime fuses less."""
    graph = program.master
    return {node.name for node in [*filter(_is_leaf, graph.graph.nodes), *_returned(graph)]}


def _is_leaf(node: fx.Node) -> bool:
    return node.op == "placeholder" or is_call(node, resnet_deploy.quantize_linear.default)


def _wide(value: Tensor) -> Tensor:
    """In float64 and the layout that the operators require."""
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return value.to(torch.float64, memory_format=layout)


def _check_value(
    graph: fx.GraphModule, node: fx.Node, leaves: Mapping[str, Tensor], precision: Precision
) -> QuantisedCheck:
    label, got = str(node.meta["label"]), leaves[node.name]
    others = {name: value for name, value in leaves.items() if name != node.name}
    expected = evaluate(graph, node.name, others).double()
    if got.shape != expected.shape:
        reason = f"has shape {list(got.shape)}, expected {list(expected.shape)}"
        return QuantisedCheck(label, schema_name(node), float("inf"), 1.0, reason)
    difference = (got - expected).abs()
    worst, different = float(difference.max()), int((difference > 0).sum())
    reason, allowed = "", _DIFFERING[precision.name]
    if not worst <= LIMIT:
        reason = _worst(difference, got, expected, f"{worst:g} LSB off, the limit is {LIMIT}")
    elif different > max(_FEW, allowed * got.numel()):
        reason = f"{different} of {got.numel()} elements 1 LSB off, the limit is {100 * allowed:g} %"
    return QuantisedCheck(label, schema_name(node), worst, different / got.numel(), reason)


def _check_output(
    graph: fx.GraphModule, node: fx.Node, leaves: Mapping[str, Tensor], value: Tensor, precision: Precision
) -> QuantisedCheck:
    expected, got = evaluate(graph, node.name, leaves).double(), value.double()
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        reason = f"has shape {list(got.shape)} or values that are NaN or Inf, expected {list(expected.shape)}"
        return QuantisedCheck(module_path(node), schema_name(node), float("inf"), 1.0, reason)
    difference = (got - expected).abs()
    worst = float(difference.max() / largest / precision.roundoff)
    limit = f"{worst:.1f} roundoffs off, the limit is {_FLOAT_LIMIT:g}"
    reason = "" if worst <= _FLOAT_LIMIT else _worst(difference, got, expected, limit)
    return QuantisedCheck(module_path(node), schema_name(node), worst, float((difference > 0).double().mean()), reason)


def _worst(difference: Tensor, got: Tensor, expected: Tensor, what: str) -> str:
    index = torch.unravel_index(difference.argmax(), difference.shape)
    place = [int(i) for i in index]
    return f"{what} at {place}: {got[index].item():g}, expected {expected[index].item():g}"


def _check_weights(graph: fx.GraphModule, master: fx.GraphModule) -> list[QuantisedCheck]:
    """Each quantised weight and bias within half a step of the float64 one."""
    layers = {module_path(node): node for node in graph.graph.nodes if is_call(node, *LAYERS)}
    checks = []
    for layer in quantisable(master):
        quantised = layers[module_path(layer)]
        for role, index in (("weight", 1), ("bias", 2)):
            node = args_of(quantised)[index] if index < len(layer.args) else None
            if is_call(node, resnet_deploy.dequantize_linear.default):
                exact = parameter(master, args_of(layer)[index])
                checks.append(_check_weight(graph, f"{module_path(layer)}.{role}", node, exact))
    return checks


def _check_weight(graph: fx.GraphModule, label: str, node: fx.Node, exact: Tensor) -> QuantisedCheck:
    whole, scale = (parameter(graph, argument) for argument in args_of(node)[:2])
    step = scale.reshape(-1, *[1] * (whole.dim() - 1))
    difference = (whole.double() * step - exact).abs() / step
    worst, reason = float(difference.max()), ""
    if not worst <= _WEIGHT_LIMIT:
        reason = _worst(difference, whole.double() * step, exact, f"{worst:.3g} steps off, the limit is 0.5")
    return QuantisedCheck(label, "weight", worst, float((difference > 0).double().mean()), reason)


def _returned(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values the network returns."""
    found: list[fx.Node] = []
    output = next(node for node in graph.graph.nodes if node.op == "output")
    fx.node.map_arg(output.args, lambda node: found.append(node))
    return found
