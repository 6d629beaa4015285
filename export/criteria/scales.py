"""Whether a quantised graph says what the captured network says, as well as 8 bits can.

Three questions, none of which takes the quantised graph's word for it:

* scales: each activation's covers its calibrated range and is no coarser than that takes; each weight's is no coarser
  than its largest weight takes (or than an int32 bias does), and each weight is within half a step of the float64 one;
  biases that are not quantised are exact.
* layers: fed with the same dequantised values, a quantised layer differs from the captured one by what rounding its
  weights explains. Rounding a weight to a step s carries the variance s^2 / 12, so sigma^2 = conv(x^2, s^2 / 12), of a
  bias the same; z = (y - y64) / sigma has rms <= 1.6 and max <= 9.
* what lies between the layers, such as additions, ReLUs and pools, is exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from export.criteria.operators import evaluate
from export.fusion.nodes import args_of, is_call, module_path, named_args, parameter, resnet_deploy, source_name
from export.fusion.program import QuantisedProgram
from export.quantisation.quantise import BIAS_LIMIT, LAYERS, is_input, range_of, summand_name
from export.quantisation.scheme import Range, Scheme
from export.runtime.parity.checks import QuantisedCheck
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.rounding import MAX_RMS_Z, MAX_Z

_HALF = 0.5 + 1e-6  # steps
_EXACT = 1e-9  # relative, of float64 sums in another order
_MIXED = 0.1  # relative L2, where quantised layers follow each other without a quantised value between them
_QUANTIZE, _DEQUANTIZE = resnet_deploy.quantize_linear.default, resnet_deploy.dequantize_linear.default


def check_scales(program: QuantisedProgram, ranges: Mapping[str, Range], scheme: Scheme) -> list[QuantisedCheck]:
    """One check per quantised value, weight and bias."""
    graph, checks = program.master, []
    for node in graph.graph.nodes:
        if is_call(node, _QUANTIZE):
            checks.append(_check_range(graph, node, range_of(args_of(node)[0], ranges), scheme))
    masters = {summand_name(node): node for node in program.before.graph.nodes if is_call(node, *LAYERS)}
    for node in graph.graph.nodes:
        if is_call(node, *LAYERS) and is_call(args_of(node)[1], _DEQUANTIZE):
            checks += _check_parameters(program, node, masters[summand_name(node)], scheme)
    return checks


def _check_range(graph: fx.GraphModule, node: fx.Node, values: Range, scheme: Scheme) -> QuantisedCheck:
    scale, zero_point = (parameter(graph, argument) for argument in args_of(node)[1:])
    limits, step, zero = torch.iinfo(zero_point.dtype), scale.item(), zero_point.item()
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    below, above = (limits.min - zero) * step - low, high - (limits.max - zero) * step
    needed = max(-low, high) / limits.max if scheme.symmetric else (high - low) / (limits.max - limits.min)
    reason = ""
    if max(below, above) > _HALF * step:
        reason = (
            f"covers {(limits.min - zero) * step:.4g} to {(limits.max - zero) * step:.4g}, not {low:.4g} to {high:.4g}"
        )
    elif needed and step > _slightly_above(torch.tensor(needed, dtype=torch.float64), scheme):
        reason = f"has steps of {step:.4g}, its range needs {needed:.4g}"
    beyond = max(below, above, 0.0) / step
    return QuantisedCheck(str(node.meta["label"]), "scale", beyond, 0.0, reason, lsb_limit=_HALF)


def _slightly_above(scale: Tensor, scheme: Scheme) -> Tensor:
    """What scales may be rounded up to in the type that the file holds them in."""
    smallest = torch.finfo(scheme.arithmetic.dtype).tiny * 2 * scheme.arithmetic.roundoff
    return scale * (1 + 2 * scheme.arithmetic.roundoff) + smallest


def _check_parameters(
    program: QuantisedProgram, layer: fx.Node, original: fx.Node, scheme: Scheme
) -> list[QuantisedCheck]:
    graph, name = program.master, module_path(layer)
    weight = parameter(program.before, args_of(original)[1])
    bias_node = args_of(original)[2] if len(original.args) > 2 else None
    bias = None if bias_node is None else parameter(program.before, bias_node)
    needed = weight.abs().flatten(1).amax(1) / 127
    quantised_bias = bias is not None and is_call(args_of(layer)[2], _DEQUANTIZE)
    if bias is not None and quantised_bias:
        step_x = parameter(graph, args_of(args_of(layer)[0])[1])
        needed = torch.maximum(needed, bias.abs() / (step_x * BIAS_LIMIT))
    checks = [_check_rounding(graph, f"{name}.weight", args_of(layer)[1], weight)]
    steps = parameter(graph, args_of(args_of(layer)[1])[1])
    coarse = (steps > _slightly_above(needed, scheme)) & (needed > 0)
    if bool(coarse.any()):
        channel = int(coarse.int().argmax())
        reason = f"channel {channel} has steps of {steps[channel]:.4g}, its weights need {needed[channel]:.4g}"
        checks[0] = QuantisedCheck(f"{name}.weight", "weight", float("inf"), 1.0, reason)
    if bias is not None and quantised_bias:
        checks.append(_check_rounding(graph, f"{name}.bias", args_of(layer)[2], bias))
    elif bias is not None:
        held = parameter(graph, args_of(layer)[2])
        reason = "" if torch.equal(held, bias) else "differs from the folded bias"
        checks.append(QuantisedCheck(f"{name}.bias", "bias", 0.0 if not reason else float("inf"), 0.0, reason))
    return checks


def _check_rounding(graph: fx.GraphModule, label: str, node: fx.Node, exact: Tensor) -> QuantisedCheck:
    whole, scale = (parameter(graph, argument) for argument in args_of(node)[:2])
    step = scale.reshape(-1, *[1] * (whole.dim() - 1))
    difference = (whole.double() * step - exact).abs() / step
    worst = float(difference.max())
    reason = "" if worst <= _HALF else f"{worst:.3g} steps from the float64 value, the limit is 0.5"
    differing = float((difference > 0).double().mean())
    return QuantisedCheck(label, "weight", worst, differing, reason, lsb_limit=_HALF)


def check_layers(program: QuantisedProgram, leaves: Mapping[str, Tensor]) -> list[QuantisedCheck]:
    """One check per quantised layer, and one per quantised value that is not the result of one.

    Args:
        program: quantised.
        leaves: node -> what a candidate computed there, float64: the input and every quantised value.
    """
    graph, checks = program.master, []
    captured = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            captured[node.name] = leaves[node.name]
        elif is_call(node, _QUANTIZE):
            scale, zero_point = (parameter(graph, argument) for argument in args_of(node)[1:])
            captured[str(source_name(args_of(node)[0]))] = (leaves[node.name] - zero_point.double()) * scale
    for node in graph.graph.nodes:
        layer = is_call(node, *LAYERS) and is_call(args_of(node)[1], _DEQUANTIZE)
        value = node if layer else args_of(node)[0] if is_call(node, _QUANTIZE) else None
        if value is None or is_input(value) or (not layer and is_call(value, *LAYERS) and _is_quantised(value)):
            continue
        name = str(source_name(value))
        others = {key: leaf for key, leaf in captured.items() if key != name}
        own = {key: leaf for key, leaf in leaves.items() if key != node.name}
        got, expected = evaluate(graph, value.name, own), evaluate(program.source, name, others)
        checks.append(_check_layer(graph, node, got, expected, own) if layer else _check_between(node, got, expected))
    return checks


def _is_quantised(layer: fx.Node) -> bool:
    return is_call(args_of(layer)[1], _DEQUANTIZE)


def _check_layer(
    graph: fx.GraphModule, layer: fx.Node, got: Tensor, expected: Tensor, leaves: Mapping[str, Tensor]
) -> QuantisedCheck:
    x = evaluate(graph, args_of(layer)[0].name, leaves)
    whole, scale = (parameter(graph, argument) for argument in args_of(args_of(layer)[1])[:2])
    variance = (scale.reshape(-1, *[1] * (whole.dim() - 1)).square() / 12).expand(whole.shape)
    if is_call(layer, resnet_deploy.conv2d_bias_act.default):
        a = named_args(layer)
        sigma2 = F.conv2d(x.square(), variance, None, a["stride"], a["padding"], a["dilation"], a["groups"])
    else:
        sigma2 = F.linear(x.square(), variance)
    bias = args_of(layer)[2] if len(layer.args) > 2 else None
    if is_call(bias, _DEQUANTIZE):
        sigma2 = sigma2 + parameter(graph, args_of(bias)[1]).square().reshape(-1, *[1] * (sigma2.dim() - 2)) / 12
    sigma = sigma2.sqrt()
    if is_call(layer, resnet_deploy.conv2d_bias_act.default) and named_args(layer)["activation"]:
        arguments = fx.node.map_arg(layer.args, lambda n: evaluate(graph, n.name, leaves))
        call: Conv2dBiasAct[Tensor] = Conv2dBiasAct.of(*arguments)
        sigma = call.act().carried(call.before_activation(), sigma)
    floor = _EXACT * expected.abs().max()
    z = ((got - expected).abs() / (sigma + floor))[(got != 0) | (expected != 0)]
    rms, worst = (float(z.square().mean().sqrt()), float(z.max())) if len(z) else (0.0, 0.0)
    reason = ""
    if not (rms <= MAX_RMS_Z and worst <= MAX_Z[torch.float16]):
        reason = f"rms {rms:.2f}, max {worst:.1f} times what rounding its weights explains"
    return QuantisedCheck(module_path(layer), "layer", worst, 0.0, reason, lsb_limit=MAX_Z[torch.float16])


def _check_between(node: fx.Node, got: Tensor, expected: Tensor) -> QuantisedCheck:
    limit = _MIXED if _follows_layers(args_of(node)[0]) else _EXACT
    error = float((got - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))
    reason = "" if error <= limit else f"relative error {error:.2g} before it is quantised, the limit is {limit:g}"
    return QuantisedCheck(str(node.meta["label"]), "between", error, 0.0, reason, lsb_limit=limit)


def _follows_layers(value: fx.Node) -> bool:
    """Whether a quantised layer lies between `value` and the quantised values it follows from."""
    if value.op != "call_function" or is_call(value, _QUANTIZE):
        return False
    if is_call(value, *LAYERS) and _is_quantised(value):
        return True
    return any(_follows_layers(argument) for argument in value.all_input_nodes)
