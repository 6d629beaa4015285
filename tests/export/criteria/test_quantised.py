"""P4: the files as they are written pass, and none that was broken on purpose does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.criteria.explained import evaluate
from export.fusion.nodes import args_of, aten, deep_copy, is_call, parameter
from export.fusion.program import QuantisedProgram
from export.quantisation.scheme import CPU, TENSORRT, Scheme
from export.runtime.parity.checks import OperatorChecks, QuantisedCheck
from tests.export import quantised as q8
from tests.export.onnx_edits import Edit, bypass, change, edited, producer, setting

INNER = "layer1.0.conv1"  # 16 channels to 16, behind it a ReLU
Trace = dict[str, Tensor]


@pytest.fixture(scope="module")
def digits(in_8_bits: Mapping[str, q8.Subject]) -> q8.Subject:
    return in_8_bits["digits"]


@pytest.fixture(scope="module")
def traces(digits: q8.Subject) -> dict[Scheme, Trace]:
    """What ONNX Runtime computes of the right files."""
    return {scheme: digits.trace(scheme, digits.shown(scheme)) for scheme in (TENSORRT, CPU)}


@pytest.fixture
def trace(traces: dict[Scheme, Trace], scheme: Scheme) -> Trace:
    """A copy, to be broken."""
    return {name: value.clone() for name, value in traces[scheme].items()}


def test_correct_files_pass(digits: q8.Subject, scheme: Scheme, trace: Trace) -> None:
    program = digits.quantised[scheme]
    checks = digits.check(scheme, trace)
    assert checks and not checks.unchecked, checks.first_failure
    roles = ("weight", "bias") if scheme is CPU else ("weight",)
    wanted = {
        "quantize_linear": [node.meta["label"] for node in q8.nodes(program, q8.QUANTIZE)],
        "weight": [f"{path}.{role}" for path in q8.layers(program) for role in roles],
        "linear": ["fc"],
    }
    for kind, names in wanted.items():
        assert sorted(check.name for check in checks.checks if check.kind == kind) == sorted(names)
    simulation = digits.check(scheme, digits.simulated(program))
    assert simulation and not simulation.unchecked, simulation.first_failure


swapped = setting([3, 5], lambda values: values[[5, 3]])


def extremes_swapped(scales: NDArray) -> NDArray:
    """The smallest and the largest: others may be as good as alike."""
    ends = [scales.argmin(), scales.argmax()]
    return setting(ends, lambda values: values[ends[::-1]])(scales)


def move_zero_point(model: onnx.ModelProto, *outputs: str) -> None:
    """Of the nodes with these outputs: others that have the same zero point keep theirs."""
    nodes = [node for node in model.graph.node if node.output[0] in outputs]
    assert len(nodes) == len(outputs) and len({node.input[2] for node in nodes}) == 1
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == nodes[0].input[2])
    point = onnx.numpy_helper.to_array(tensor)
    moved = onnx.numpy_helper.from_array(np.asarray(point + 1, point.dtype), "moved")  # numpy 1 widens the sum
    model.graph.initializer.append(moved)
    for node in nodes:
        node.input[2] = "moved"


def drop_bias(model: onnx.ModelProto, layer: str) -> None:
    names = {tensor.name for tensor in model.graph.initializer}
    change(model, f"{layer}.bias" if f"{layer}.bias" in names else f"{layer}.bias.quantized", np.zeros_like)


def drop_shortcut(model: onnx.ModelProto) -> None:
    addition = [node for node in model.graph.node if node.op_type == "Add"][2]
    main = [value for value in addition.input if producer(model, value).op_type == "Conv"]
    bypass(model, addition, main[0] if main else addition.input[0])


def relu_behind_the_sum_lost(model: onnx.ModelProto) -> None:
    sums = {node.output[0] for node in model.graph.node if node.op_type == "Add"}
    relu = next(node for node in model.graph.node if node.op_type == "Relu" and node.input[0] in sums)
    bypass(model, relu, relu.input[0])


def relu_before_the_sum(model: onnx.ModelProto) -> None:
    """One summand is rectified before it is added."""
    addition = next(node for node in model.graph.node if node.op_type == "Add")
    index = next((i for i, v in enumerate(addition.input) if producer(model, v).op_type == "Conv"), 0)
    position = list(model.graph.node).index(addition)
    model.graph.node.insert(position, onnx.helper.make_node("Relu", [addition.input[index]], ["rectified"]))
    addition.input[index] = "rectified"


def wrong_axis(model: onnx.ModelProto) -> None:
    node = producer(model, f"{INNER}.weight")
    (axis,) = (attribute for attribute in node.attribute if attribute.name == "axis")
    axis.i = 1


def another_shortcut(model: onnx.ModelProto) -> None:
    """The shortcut of a block taken from its own branch."""
    addition = next(node for node in model.graph.node if node.op_type == "Add")
    index = list(addition.input).index("conv1.dequantized")
    addition.input[index] = f"{INNER}.dequantized"


def edge(model: onnx.ModelProto) -> None:
    """A stride read one pixel later."""
    node = next(n for n in model.graph.node if n.op_type == "Conv" and n.name == "layer2.0.conv1")
    (pads,) = (attribute for attribute in node.attribute if attribute.name == "pads")
    pads.ints[:] = [0, 0, 2, 2]


MUTANTS: dict[str, Edit] = {
    "activation scale 10 % larger": lambda m: change(m, f"{INNER}.scale", lambda s: s * 1.1),
    "activation scale 10 % smaller": lambda m: change(m, f"{INNER}.scale", lambda s: s / 1.1),
    "input scale 10 % larger": lambda m: change(m, "input.scale", lambda s: s * 1.1),
    "zero point off by one": lambda m: move_zero_point(m, f"{INNER}.dequantized", f"{INNER}.quantized"),
    "zero point of the input off by one": lambda m: move_zero_point(m, "input.dequantized", "input.quantized"),
    "zero point of quantisation alone off by one": lambda m: move_zero_point(m, f"{INNER}.quantized"),
    "zero point of dequantisation alone off by one": lambda m: move_zero_point(m, f"{INNER}.dequantized"),
    "weight scale 10 % larger": lambda m: change(m, f"{INNER}.weight.scale", lambda s: s * 1.1),
    "weight scale of one channel": lambda m: change(m, f"{INNER}.weight.scale", setting(-1, lambda s: 2 * s[-1])),
    "two weight channels swapped": lambda m: change(m, f"{INNER}.weight.quantized", swapped),
    "two scales swapped": lambda m: change(m, f"{INNER}.weight.scale", extremes_swapped),
    "two classes swapped": lambda m: change(m, "fc.weight.quantized", swapped),
    "NaN in a class scale": lambda m: change(m, "fc.weight.scale", setting(-1, lambda s: np.nan)),
    "class scale 10 % larger": lambda m: change(m, "fc.weight.scale", lambda s: s * 1.1),
    "last K slice lost": lambda m: change(m, f"{INNER}.weight.quantized", setting((slice(None), -1), lambda w: 0)),
    "one tap transposed": lambda m: change(m, f"{INNER}.weight.quantized", lambda w: w.swapaxes(2, 3)),
    "zero points of weights off by one": lambda m: move_zero_point(m, f"{INNER}.weight"),
    "bias dropped": lambda m: drop_bias(m, INNER),
    "first bias dropped": lambda m: drop_bias(m, "conv1"),
    "bias of the head dropped": lambda m: drop_bias(m, "fc"),
    "shortcut dropped": drop_shortcut,
    "shortcut from the branch": another_shortcut,
    "ReLU before the addition": relu_before_the_sum,
    "stride-2 phase off by one": edge,
}


# In unsigned numbers from 0 on, quantisation cuts off what a ReLU would have; and ONNX Runtime does not look at the
# axis when it makes a QLinearConv: there it is the test of the file's.
HARMLESS_ON_CPUS = {"ReLU behind the sum lost": relu_behind_the_sum_lost, "weights along the wrong axis": wrong_axis}


@pytest.mark.parametrize("defect", [*(pytest.param(d, marks=pytest.mark.mutant) for d in MUTANTS), *HARMLESS_ON_CPUS])
def test_broken_files_are_refused(digits: q8.Subject, scheme: Scheme, defect: str) -> None:
    file, edit = digits.shown(scheme), {**MUTANTS, **HARMLESS_ON_CPUS}[defect]
    checks = digits.check(scheme, digits.trace(scheme, replace(file, model=edited(file.model, edit))))
    assert bool(checks) is (scheme is CPU and defect in HARMLESS_ON_CPUS)
    failure = checks.first_failure
    assert checks or (failure is not None and failure.reason)
    if defect == "bias dropped":  # only what the broken layer computes: the others are held to what they were given
        assert failure is not None and "LSB off, the limit is 1" in failure.reason and failure.fault is not None
        assert [check.name for check in checks.checks if not check] == [f"{INNER}.quantized"]


def rewritten(subject: q8.Subject, scheme: Scheme, change: Rewrite, role: str) -> QuantisedProgram:
    """A program in which a weight was quantised by `change`: (whole numbers, scales, exact) -> the first two."""
    program = subject.quantised[scheme]
    master = deep_copy(program.master)
    index = 1 if role == "weight" else 2
    exact = parameter(subject.program.master, args_of(q8.layers(subject.program)[INNER])[index])
    whole, scale = (str(node.target) for node in args_of(args_of(q8.layers(program)[INNER])[index])[:2])
    for name, value in zip((whole, scale), change(getattr(master, whole), getattr(master, scale), exact), strict=True):
        assert value.dtype == getattr(master, name).dtype
        setattr(master, name, value)
    return QuantisedProgram(subject.program, master)


Rewrite = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rounded_by(rounding: Callable[[Tensor], Tensor], narrower: float = 1.0) -> Rewrite:
    def rewrite(whole: Tensor, scale: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        scale = (scale / narrower).half().double() if narrower != 1.0 else scale
        steps = scale.reshape(-1, *[1] * (exact.dim() - 1))
        quantised = rounding(exact / steps)
        return (quantised.clamp(-127, 127) if whole.dtype == torch.int8 else quantised).to(whole.dtype), scale

    return rewrite


def scales_of_inputs(whole: Tensor, scale: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Along axis 1, read along axis 0."""
    wrong = (exact.abs().amax((0, 2, 3)) / 127).half().double()
    return (exact / wrong.reshape(1, -1, 1, 1)).round().clamp(-127, 127).to(whole.dtype), wrong


def swapped_rows(whole: Tensor, scale: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.arange(len(whole))
    order[[3, 5]] = order[[5, 3]]
    return whole[order], scale


def one_step_off(whole: Tensor, scale: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    changed = whole.clone()
    changed[0] += 1 if float(changed[0].reshape(-1)[0]) <= 0 else -1
    return changed, scale


WEIGHTS: dict[str, Rewrite] = {
    "floor": rounded_by(torch.floor),
    "truncated": rounded_by(torch.trunc),
    "saturated": rounded_by(torch.round, narrower=2.0),
    "wrong axis": scales_of_inputs,
    "swapped": swapped_rows,
    "off": one_step_off,
    "4 bits": lambda whole, scale, exact: ((whole.double() / 16).round().to(whole.dtype), scale * 16),
}


BIASES = ("floor", "swapped", "off")


@pytest.mark.mutant
@pytest.mark.parametrize(("role", "defect"), [*(("weight", d) for d in WEIGHTS), *(("bias", d) for d in BIASES)])
def test_wrongly_quantised_parameters_are_refused(digits: q8.Subject, scheme: Scheme, role: str, defect: str) -> None:
    """What is computed is what the program says, which is not what the network says."""
    if role == "bias" and scheme is TENSORRT:
        pytest.skip("its biases are floats")
    program = rewritten(digits, scheme, WEIGHTS[defect], role)
    checks = digits.check(scheme, digits.simulated(program), program)
    failed = [check for check in checks.checks if not check]
    assert (f"{INNER}.{role}", "weight") in [(check.name, check.kind) for check in failed]
    assert all(check.name.startswith(INNER) for check in failed)


def dropped_bias(program: QuantisedProgram) -> None:
    node = args_of(q8.layers(program)[INNER])[2]
    name = str((args_of(node)[0] if is_call(node, q8.DEQUANTIZE) else node).target)
    setattr(program.master, name, torch.zeros_like(getattr(program.master, name)))


def dropped_relu(program: QuantisedProgram) -> None:
    layer = q8.layers(program)[INNER]
    layer.args = tuple(False if value is True else value for value in layer.args)


def move_scale(program: QuantisedProgram, factor: float) -> None:
    node = next(n for n in q8.nodes(program, q8.QUANTIZE) if n.meta["label"] == f"{INNER}.quantized")
    name = str(args_of(node)[1].target)
    setattr(program.master, name, getattr(program.master, name) * factor)


def another_residual(program: QuantisedProgram) -> None:
    """The first block adds what its own branch computes."""
    branch = next(n for n in q8.nodes(program, q8.DEQUANTIZE) if n.meta["label"] == f"{INNER}.dequantized")
    layer = q8.layers(program)["layer1.0.conv2"]
    if sums := q8.nodes(program, aten.add.Tensor):
        sums[0].args = (sums[0].args[0], branch)
    else:
        layer.args = (*layer.args[:3], branch, *layer.args[4:])
    program.master.graph.lint()
    program.master.recompile()


GRAPHS: dict[str, Callable[[QuantisedProgram], None]] = {
    "bias dropped": dropped_bias,
    "ReLU dropped": dropped_relu,
    "range 8 times as large": lambda program: move_scale(program, 8.0),
    "range a third": lambda program: move_scale(program, 1 / 3),
    "another residual": another_residual,
}


@pytest.mark.mutant
@pytest.mark.parametrize("defect", GRAPHS)
def test_wrongly_quantised_graphs_are_refused(digits: q8.Subject, scheme: Scheme, defect: str) -> None:
    """The candidate computes exactly what the graph says: it is the graph that is wrong."""
    program = QuantisedProgram(digits.program, deep_copy(digits.quantised[scheme].master))
    GRAPHS[defect](program)
    lost = defect == "ReLU dropped" and scheme is CPU  # in unsigned numbers from 0 on, that changes nothing
    assert lost or not digits.check(scheme, digits.simulated(program), program)


def node_of(subject: q8.Subject, scheme: Scheme, name: str = f"{INNER}.quantized") -> str:
    """The node of a quantised value, or of a layer."""
    values = {node.meta["label"]: node for node in q8.nodes(subject.quantised[scheme], q8.QUANTIZE)}
    return {**q8.layers(subject.quantised[scheme]), **values}[name].name


def nudge(value: Tensor, count: int, by: int = 1) -> None:
    """Move `count` elements by some LSB, away from the ends."""
    flat = value.permute(0, 2, 3, 1).reshape(-1) if value.dim() == 4 else value.view(-1)
    inner = ((flat > 4) & (flat < 120)).nonzero()[:, 0]
    assert len(inner) >= count
    for index in inner[torch.linspace(0, len(inner) - 1, count).long()]:
        flat[index] += by
    if value.dim() == 4:
        n, c, h, w = value.shape
        value.copy_(flat.reshape(n, h, w, c).permute(0, 3, 1, 2))


def expected_values(subject: q8.Subject, scheme: Scheme, trace: Trace, name: str) -> Trace:
    """A trace in which one value is exactly what the float64 graph makes of the others."""
    shown = {node.name for node in q8.nodes(subject.quantised[scheme], q8.QUANTIZE)} | {"x"}
    leaves = {n: v.double() for n, v in trace.items() if n in shown and n != name}
    leaves = {n: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for n, v in leaves.items()}
    return {**trace, name: evaluate(subject.quantised[scheme].master, name, leaves).to(trace[name].dtype)}


def check_of(checks: OperatorChecks, name: str) -> QuantisedCheck:
    found = (check for check in checks.checks if check.name == name and check.kind in ("quantize_linear", "linear"))
    (check,) = found
    assert isinstance(check, QuantisedCheck)
    return check


@pytest.mark.parametrize("read", [f"{INNER}.quantized", "fc"])
def test_how_many_elements_may_be_off_by_how_much(digits: q8.Subject, scheme: Scheme, trace: Trace, read: str) -> None:
    """One LSB of a few elements, either way; not two of a single one. Of a small value, such as fc reads, four may."""
    node = args_of(args_of(q8.layers(digits.quantised[scheme])["fc"])[0])[0]
    node = next((n for n in q8.nodes(digits.quantised[scheme], q8.QUANTIZE) if n.meta["label"] == read), node)
    trace, name = expected_values(digits, scheme, trace, node.name), str(node.meta["label"])
    value = trace[node.name]
    share = {"fp32": 0.001, "fp16": 0.05}[scheme.arithmetic.name]
    allowed = max(4, int(share * value.numel()))
    assert (value.numel() == 256) is (read == "fc") and (allowed == 4) is (read == "fc" and scheme is CPU)

    def off(count: int, by: int) -> QuantisedCheck:
        broken = value.clone()
        nudge(broken, count, by)
        return check_of(digits.check(scheme, {**trace, node.name: broken}), name)

    found = check_of(digits.check(scheme, trace), name)
    assert found and (found.kind, found.lsb, found.differing) == ("quantize_linear", 0.0, 0.0)
    check = off(1, 2)
    assert not check and (check.lsb, check.differing) == (2, 1 / value.numel())
    assert check.reason == "2 LSB off, the limit is 1"
    for by in (1, -1):
        check = off(allowed, by)
        assert check and (check.lsb, check.differing) == (1, allowed / value.numel())
    check = off(allowed + 1, 1)
    assert not check and check.lsb == 1
    assert check.reason == f"{allowed + 1} of {value.numel()} elements 1 LSB off, the limit is {100 * share:g} %"
    assert not digits.check(scheme, {**trace, node.name: value[:, :-1]})


def one_of(value: float) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.where(torch.arange(y.numel()).reshape(y.shape) == 34, value, y)


BROKEN_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": one_of(torch.nan),
    "Inf": one_of(torch.inf),
    "minus Inf": one_of(-torch.inf),
    "zeros": torch.zeros_like,
    "constant": lambda y: y[:1].expand_as(y).clone(),
    "two classes swapped": lambda y: y[:, [1, 0, *range(2, 10)]],
    "scaled": lambda y: y * 1.05,
    "the previous picture's": lambda y: y.roll(1, 0),
    "a class less": lambda y: y[:, :-1],
    "one element": lambda y: y + y.abs().max() * 0.02 * torch.eye(*y.shape),
}


@pytest.mark.mutant
@pytest.mark.parametrize("defect", BROKEN_LOGITS)
def test_broken_logits_are_refused(digits: q8.Subject, scheme: Scheme, trace: Trace, defect: str) -> None:
    name = node_of(digits, scheme, "fc")
    trace[name] = BROKEN_LOGITS[defect](trace[name].float())
    check = check_of(digits.check(scheme, trace), "fc")
    assert not check and (("NaN" not in defect and "Inf" not in defect) or "NaN or Inf" in check.reason)


def test_what_is_not_shown_is_refused(digits: q8.Subject, scheme: Scheme, trace: Trace) -> None:
    for label in (f"{INNER}.quantized", "input.quantized", "fc"):
        node = node_of(digits, scheme, label)
        (check,) = digits.check(scheme, {name: value for name, value in trace.items() if name != node}).checks
        assert not check and check.name == label and check.reason == "the runtime does not show it"
    assert not digits.check(scheme, {})


def test_only_what_is_compared_is_asked_for(digits: q8.Subject) -> None:
    """Every further output of a file keeps its runtime from fusing."""
    for scheme, program in digits.quantised.items():
        wanted = {node.name for node in q8.nodes(program, q8.QUANTIZE)} | {"x", node_of(digits, scheme, "fc")}
        assert digits.shown(scheme).values.keys() == wanted
