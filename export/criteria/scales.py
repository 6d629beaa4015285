"""Whether a quantised graph says what the captured network says, as well as 8 bits can.

Three questions, none of which takes the quantised graph's word for it:

* scales: each activation's covers its calibrated range and is no coarser than that takes; each weight's is no coarser
  than its largest weight takes (or than an int32 bias does), and each weight is within half a step of the float64 one;
  biases that are not quantised are exact.
* layers: fed with the same dequantised values, a quantised layer is exactly the captured one but for the rounding of
  its weights: with the float64 ones, from which each weight is within half a step, it computes the same. That is no
  question of chance, as it would be to ask how large the error of the result is: all values of one channel share one
  rounding of its weights, and of few channels some are beyond any limit on their mean. The error is shown all the same,
  as z = (y - y64) / sigma, max <= 9. Rounding a weight to a step s carries the variance s^2 / 12, so sigma^2 =
  conv(x^2, s^2 / 12), of a bias the same.
* what lies between the layers, such as additions, ReLUs and pools, and between them and what is returned, is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from export.criteria.explained import evaluate
from export.fusion.interpreter import computes
from export.fusion.nodes import args_of, is_call, module_path, named_args, parameter, resnet_deploy, source_name
from export.fusion.program import QuantisedProgram, output_nodes
from export.quantisation.magnitudes import in_memory_order
from export.quantisation.quantise import BIAS_LIMIT, LAYERS, range_of, summand_name
from export.quantisation.scheme import Range, Scheme
from export.runtime.parity.checks import QuantisedCheck
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.rounding import MAX_Z

_HALF = 0.5 + 1e-6  # steps
_EXACT = 1e-9  # relative, of float64 sums in another order
_LARGEST_WEIGHT = 127 * 12**0.5  # in standard deviations of rounding it: what is summed may cancel
_TINY = torch.finfo(torch.float64).tiny
_QUANTIZE, _DEQUANTIZE = resnet_deploy.quantize_linear.default, resnet_deploy.dequantize_linear.default


def check_scales(program: QuantisedProgram, ranges: Mapping[str, Range], scheme: Scheme) -> list[QuantisedCheck]:
    """One check per quantised value, weight and bias."""
    graph, checks = program.master, []
    for node in graph.graph.nodes:
        if is_call(node, _QUANTIZE):
            checks.append(_check_range(graph, node, range_of(args_of(node)[0], ranges), scheme))
    originals = _originals(program)
    for node in filter(is_quantised, graph.graph.nodes):
        checks += _check_parameters(program, node, originals[summand_name(node)], scheme)
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


class Lazily(Mapping[str, Tensor]):
    """Values by name, each made when it is asked for and never kept: all of them together are large in float64."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        """`makers`: name -> what makes the value."""
        self._makers = makers

    def without(self, name: str) -> Lazily:
        return Lazily({other: make for other, make in self._makers.items() if other != name})

    def beside(self, values: Mapping[str, Tensor]) -> Lazily:
        """The same and `values`, which are there; of one name these count."""
        return Lazily({**self._makers, **{name: partial(values.__getitem__, name) for name in values}})

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def check_layers(
    program: QuantisedProgram, leaves: Lazily, look: Callable[[fx.Node, Mapping[str, Tensor]], None]
) -> list[QuantisedCheck]:
    """One check per quantised layer, one per quantised value that is not the result of one, and one per output.

    Args:
        program: quantised.
        leaves: node -> what a candidate computed there, float64: the input and every quantised value.
        look: called with each quantised value, and with what the quantised graph computes at the layer before it.
    """
    both, originals, checks = _Networks(program, leaves), _originals(program), []
    for node in program.master.graph.nodes:
        if is_quantised(node):
            checks.append(_check_layer(both, node, originals[summand_name(node)]))
        elif is_call(node, _QUANTIZE):
            look(node, both.last)
            if _is_between(args_of(node)[0]):
                checks.append(_check_between(both, args_of(node)[0], str(node.meta["label"])))
    outputs = zip(output_nodes(program.master), output_nodes(program.source), strict=True)
    return checks + [_check_output(both, node, end.name) for node, end in outputs]


def is_quantised(node: fx.Node) -> bool:
    """Whether a node is a layer that computes with 8-bit weights."""
    return is_call(node, *LAYERS) and is_call(args_of(node)[1], _DEQUANTIZE)


def _is_between(value: fx.Node) -> bool:
    """Whether a value is computed by something else than a quantised layer."""
    return value.op == "call_function" and not is_call(value, _QUANTIZE, _DEQUANTIZE) and not is_quantised(value)


def _originals(program: QuantisedProgram) -> dict[str, fx.Node]:
    """`summand_name` -> the layer before it was quantised."""
    return {summand_name(node): node for node in program.before.graph.nodes if is_call(node, *LAYERS)}


class _Networks:
    """What the quantised graph and the captured network make of a candidate's quantised values.

    One reader of a value may get it as it is and another what 8 bits made of it. So the captured network is run from
    one node of the quantised graph to the next, each time on what that node reads, and not by the names of the values
    alone. The result of a quantised layer, which is held to account by itself, is that of the quantised graph.

    Attributes:
        last: name -> what the quantised graph computes, of the layer that was computed last; most are read next.
    """

    def __init__(self, program: QuantisedProgram, leaves: Lazily) -> None:
        self.program, self._leaves = program, leaves
        self.last: dict[str, Tensor] = {}
        self._names = {node.name for node in program.source.graph.nodes}
        known: dict[str, Callable[[], Tensor]] = {}
        for node in program.master.graph.nodes:
            if node.op == "placeholder":
                known[node.name] = partial(leaves.__getitem__, node.name)
            elif is_call(node, _QUANTIZE):
                known[str(source_name(args_of(node)[0]))] = partial(self._dequantised, node)
        self._known = Lazily(known)

    def quantised(self, value: fx.Node) -> Tensor:
        """What the quantised graph computes there."""
        if value.name in self.last:
            return self.last[value.name]
        found = evaluate(self.program.master, value.name, self._leaves)
        if is_quantised(value):
            self.last = {value.name: found}
        return found

    def captured(self, value: fx.Node, seen: dict[fx.Node, Tensor] | None = None) -> Tensor:
        """What the captured network computes there; `seen` is what is known already."""
        seen = {} if seen is None else seen
        if value not in seen:
            name = str(source_name(value))
            read = {str(source_name(node)): self._read(node, seen) for node in self._sources(value)}
            if name in read:  # it is only moved to another layout
                seen[value] = read[name]
            else:
                seen[value] = evaluate(self.program.source, name, self._known.without(name).beside(read))
        return seen[value]

    def read(self, value: fx.Node) -> Tensor:
        """What readers of a value of the quantised graph get."""
        if value.op == "placeholder":
            return self._leaves[value.name]
        return self.quantised(value)

    def returned(self, value: fx.Node, end: str) -> Tensor:
        """What the captured network returns at `end`, where the quantised graph returns `value`."""
        name = str(source_name(value))
        if name == end and value.op == "call_function" and not is_quantised(value):
            return self.captured(value)
        known = self._known.beside({name: self.read(value)})
        return known[end] if end in known else evaluate(self.program.source, end, known)

    def _read(self, value: fx.Node, seen: dict[fx.Node, Tensor]) -> Tensor:
        if is_call(value, _DEQUANTIZE):
            return self._dequantised(args_of(value)[0])
        if value.op == "placeholder":
            return self._leaves[value.name]
        return self.quantised(value) if is_quantised(value) else self.captured(value, seen)

    def _dequantised(self, node: fx.Node) -> Tensor:
        scale, zero_point = (parameter(self.program.master, argument) for argument in args_of(node)[1:])
        return (self._leaves[node.name] - zero_point.double()) * scale

    def _sources(self, value: fx.Node) -> list[fx.Node]:
        """The nearest nodes that a value follows from and that the captured network has; no constants."""
        found: list[fx.Node] = []
        for node in value.all_input_nodes:
            if node.op != "get_attr":
                found += [node] if source_name(node) in self._names else self._sources(node)
        return found


def _check_layer(both: _Networks, layer: fx.Node, original: fx.Node) -> QuantisedCheck:
    program = both.program
    got, expected = both.quantised(layer), both.captured(layer)
    read = [both.quantised(n) if isinstance(n, fx.Node) else n for n in args_of(layer)]
    whole, scale = (parameter(program.master, argument) for argument in args_of(args_of(layer)[1])[:2])
    sigma2 = _summed_squares(layer, read[0], whole) * (scale.square() / 12).reshape(-1, *[1] * (got.dim() - 2))
    bias = args_of(layer)[2] if len(layer.args) > 2 else None
    if is_call(bias, _DEQUANTIZE):
        step = parameter(program.master, args_of(bias)[1])
        sigma2 += (step.square() / 12).reshape(-1, *[1] * (sigma2.dim() - 2))
    sigma = sigma2.sqrt_()
    if is_call(layer, resnet_deploy.conv2d_bias_act.default) and named_args(layer)["activation"]:
        call: Conv2dBiasAct[Tensor] = Conv2dBiasAct.of(*read, **layer.kwargs)
        sigma = call.act().carried(call.before_activation(), sigma)
    explained = (sigma + _EXACT * largest(expected)).clamp_(min=_TINY)
    worst = largest((got - expected).div_(explained))
    for index in (1, 2):
        if index < len(read) and isinstance(args_of(layer)[index], fx.Node):
            read[index] = parameter(program.before, args_of(original)[index])
    summed = expected.norm() + _LARGEST_WEIGHT * sigma.norm()
    error = float((computes(layer)(*read, **layer.kwargs) - expected).norm() / summed.clamp(min=_TINY))
    reason = ""
    if not error <= _EXACT:
        reason = f"relative error {error:.2g} with the weights of float64, the limit is {_EXACT:g}"
    elif not worst <= MAX_Z[torch.float16]:
        reason = f"{worst:.1f} times what rounding its weights explains"
    return QuantisedCheck(module_path(layer), "layer", worst, 0.0, reason, lsb_limit=MAX_Z[torch.float16])


def largest(values: Tensor) -> float:
    """The largest magnitude, NaN where one is NaN; in the order of memory, in which a maximum is found fastest."""
    low, high = torch.aminmax(in_memory_order(values))
    return float(torch.maximum(-low, high))


def _summed_squares(layer: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """conv(x^2, 1): of what is read for a value, alike for all channels of a group."""
    if not is_call(layer, resnet_deploy.conv2d_bias_act.default):
        return x.square().sum(1, keepdim=True)
    a, groups = named_args(layer), named_args(layer)["groups"]
    squares = x.square().unflatten(1, (groups, -1)).sum(2)
    window = squares.new_ones(groups, 1, *weight.shape[2:])
    summed = F.conv2d(squares, window, None, a["stride"], a["padding"], a["dilation"], groups)
    return summed.repeat_interleave(len(weight) // groups, 1)


def _check_between(both: _Networks, value: fx.Node, name: str) -> QuantisedCheck:
    return _exactly(both.quantised(value), both.captured(value), name, "before it is quantised")


def _check_output(both: _Networks, value: fx.Node, end: str) -> QuantisedCheck:
    """`end` is what the captured network returns there."""
    return _exactly(
        both.read(value), both.returned(value, end), module_path(value), "from the last values of 8 bits on"
    )


def _exactly(got: Tensor, expected: Tensor, name: str, where: str) -> QuantisedCheck:
    if got.shape != expected.shape:
        reason = f"has shape {list(got.shape)}, expected {list(expected.shape)}"
        return QuantisedCheck(name, "between", float("inf"), 1.0, reason, lsb_limit=_EXACT)
    error = float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=_TINY))
    reason = "" if error <= _EXACT else f"relative error {error:.2g} {where}, the limit is {_EXACT:g}"
    return QuantisedCheck(name, "between", error, 0.0, reason, lsb_limit=_EXACT)
