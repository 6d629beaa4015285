"""P4: the files as they are written pass, and none that was broken on purpose does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from export.base.precision import PRECISIONS
from export.criteria.operators import evaluate
from export.fusion.nodes import args_of, aten, parameter
from export.fusion.program import FusedProgram, QuantisedProgram
from export.lowering.runners import ProgramRunner
from export.quantisation.scheme import CPU, TENSORRT, Scheme
from export.runtime.parity.checks import OperatorChecks, QuantisedCheck
from tests.export import networks
from tests.export import quantised as q8
from tests.export.quantised_networks import make

INNER = "layer1.1.conv1"  # 16 channels to 16, behind it a ReLU


@pytest.fixture(params=q8.SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return q8.SCHEMES[request.param]


@pytest.fixture
def digits(in_8_bits: Callable[[str], q8.Subject]) -> q8.Subject:
    return in_8_bits("digits")


@pytest.fixture(scope="module")
def traces(in_8_bits: Callable[[str], q8.Subject]) -> Callable[[Scheme], dict[str, Tensor]]:
    """What ONNX Runtime computes of the right file: copies, to be broken."""
    made: dict[Scheme, dict[str, Tensor]] = {}

    def trace(scheme: Scheme) -> dict[str, Tensor]:
        if scheme not in made:
            subject = in_8_bits("digits")
            made[scheme] = subject.trace(scheme, subject.shown(scheme))
        return {name: value.clone() for name, value in made[scheme].items()}

    return trace


def quantised_checks(checks: OperatorChecks) -> list[QuantisedCheck]:
    found = [check for check in checks.checks if isinstance(check, QuantisedCheck)]
    assert len(found) == len(checks.checks)
    return found


# what is right


@pytest.mark.parametrize("name", ["resnet20", "digits"])
def test_correct_files_pass(in_8_bits: Callable[[str], q8.Subject], name: str, scheme: Scheme) -> None:
    subject = in_8_bits(name)
    program = subject.quantised[scheme]
    checks = subject.check(scheme, subject.trace(scheme, subject.shown(scheme)))
    assert checks, checks.first_failure
    assert not checks.unchecked
    found = quantised_checks(checks)
    values, weights = ([c for c in found if c.kind == kind] for kind in ("quantize_linear", "weight"))
    labels = [node.meta["label"] for node in q8.nodes(program, q8.QUANTIZE)]
    assert sorted(check.name for check in values) == sorted(labels)
    roles = ("weight", "bias") if scheme is CPU else ("weight",)
    assert {check.name for check in weights} == {f"{path}.{role}" for path in q8.layers(program) for role in roles}
    assert [check.name for check in found if check.kind == "linear"] == ["fc"]
    assert all(check.lsb <= 1 for check in values) and max(check.lsb for check in weights) > 0.4


def simulated(subject: q8.Subject, program: FusedProgram) -> dict[str, Tensor]:
    """What PyTorch computes of a program, in float32."""
    with ProgramRunner(program, PRECISIONS["fp32"], ("output",)) as runner:
        trace = runner.trace({"input": subject.images.numpy()})
    shown = {name for scheme in subject.quantised for name in subject.shown(scheme).values}
    return {name: value for name, value in trace.items() if name in shown}


def test_the_simulation_in_float32_passes(digits: q8.Subject, scheme: Scheme) -> None:
    checks = digits.check(scheme, simulated(digits, digits.quantised[scheme]))
    assert checks and not checks.unchecked, checks.first_failure


@pytest.mark.parametrize("kept", [("conv1",), ("layer1.1.conv2", "fc")])
def test_correct_files_with_layers_kept_pass(digits: q8.Subject, kept: tuple[str, ...], scheme: Scheme) -> None:
    subject = digits.keeping(*kept)
    checks = subject.check(scheme, subject.trace(scheme, subject.shown(scheme)))
    assert checks and not checks.unchecked, checks.first_failure
    weights = {check.name for check in checks.checks if check.kind == "weight"}
    assert not weights & {f"{layer}.{role}" for layer in kept for role in ("weight", "bias")}


def test_a_module_used_more_than_once_passes(pictures: dict[str, Tensor], scheme: Scheme) -> None:
    subject = make(networks.SharedConv, pictures["resnet20"])
    checks = subject.check(scheme, subject.trace(scheme, subject.shown(scheme)))
    assert checks, checks.first_failure


# files broken on purpose


def change(model: onnx.ModelProto, name: str, changed: Callable[[NDArray], NDArray]) -> None:
    """Replace an initialiser by what `changed` makes of it, which must be something else."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    before = numpy_helper.to_array(tensor)
    after = changed(before.copy()).astype(before.dtype)
    assert after.shape == before.shape and not np.array_equal(after, before)
    tensor.CopyFrom(numpy_helper.from_array(after, name))


def swapped(values: NDArray) -> NDArray:
    values[[3, 5]] = values[[5, 3]]
    return values


def last_slice_lost(values: NDArray) -> NDArray:
    values[:, -1] = 0
    return values


def last_doubled(values: NDArray) -> NDArray:
    values[-1] *= 2
    return values


def move_zero_point(model: onnx.ModelProto, *outputs: str) -> None:
    """Of the nodes with these outputs: others that have the same zero point keep theirs."""
    nodes = [node for node in model.graph.node if node.output[0] in outputs]
    assert len(nodes) == len(outputs) and len({node.input[2] for node in nodes}) == 1
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == nodes[0].input[2])
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, "moved"))
    for node in nodes:
        node.input[2] = "moved"


def producer(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def bypass(model: onnx.ModelProto, node: onnx.NodeProto, source: str) -> None:
    """Take a node out: its readers read `source`."""
    model.graph.node.remove(node)
    for reader in model.graph.node:
        reader.input[:] = [source if name == node.output[0] else name for name in reader.input]


def drop_bias(layer: str) -> Callable[[onnx.ModelProto], None]:
    def dropped(model: onnx.ModelProto) -> None:
        names = {tensor.name for tensor in model.graph.initializer}
        name = f"{layer}.bias" if f"{layer}.bias" in names else f"{layer}.bias.quantized"
        change(model, name, np.zeros_like)

    return dropped


def drop_shortcut(model: onnx.ModelProto) -> None:
    addition = [node for node in model.graph.node if node.op_type == "Add"][2]
    produced = [producer(model, value) for value in addition.input]
    main = [value for value, node in zip(addition.input, produced, strict=True) if node.op_type == "Conv"]
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
    addition = [node for node in model.graph.node if node.op_type == "Add"][1]
    index = next(i for i, v in enumerate(addition.input) if v.endswith("conv2.dequantized"))
    addition.input[index] = f"{INNER}.dequantized"


def edge(model: onnx.ModelProto) -> None:
    """A stride read one pixel later."""
    node = next(n for n in model.graph.node if n.op_type == "Conv" and n.name == "layer2.0.conv1")
    (pads,) = (attribute for attribute in node.attribute if attribute.name == "pads")
    pads.ints[:] = [0, 0, 2, 2]


def scaled(factor: float) -> Callable[[NDArray], NDArray]:
    return lambda values: values * factor


MUTANTS: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "activation scale 10 % larger": lambda m: change(m, f"{INNER}.scale", scaled(1.1)),
    "activation scale 10 % smaller": lambda m: change(m, f"{INNER}.scale", scaled(1 / 1.1)),
    "input scale 10 % larger": lambda m: change(m, "input.scale", scaled(1.1)),
    "zero point off by one": lambda m: move_zero_point(m, f"{INNER}.dequantized", f"{INNER}.quantized"),
    "zero point of the input off by one": lambda m: move_zero_point(m, "input.dequantized", "input.quantized"),
    "zero point of quantisation alone off by one": lambda m: move_zero_point(m, f"{INNER}.quantized"),
    "zero point of dequantisation alone off by one": lambda m: move_zero_point(m, f"{INNER}.dequantized"),
    "weight scale 10 % larger": lambda m: change(m, f"{INNER}.weight.scale", scaled(1.1)),
    "weight scale of one channel": lambda m: change(m, f"{INNER}.weight.scale", last_doubled),
    "two weight channels swapped": lambda m: change(m, f"{INNER}.weight.quantized", swapped),
    "two scales swapped": lambda m: change(m, f"{INNER}.weight.scale", swapped),
    "two classes swapped": lambda m: change(m, "fc.weight.quantized", swapped),
    "class scale 10 % larger": lambda m: change(m, "fc.weight.scale", scaled(1.1)),
    "last K slice lost": lambda m: change(m, f"{INNER}.weight.quantized", last_slice_lost),
    "one tap transposed": lambda m: change(m, f"{INNER}.weight.quantized", lambda w: w.swapaxes(2, 3)),
    "zero points of weights off by one": lambda m: move_zero_point(m, f"{INNER}.weight"),
    "bias dropped": drop_bias(INNER),
    "first bias dropped": drop_bias("conv1"),
    "bias of the head dropped": drop_bias("fc"),
    "shortcut dropped": drop_shortcut,
    "shortcut from the branch": another_shortcut,
    "ReLU before the addition": relu_before_the_sum,
    "stride-2 phase off by one": edge,
}


def trace_of_broken(subject: q8.Subject, scheme: Scheme, mutate: Callable[[onnx.ModelProto], Any]) -> dict[str, Tensor]:
    file = subject.shown(scheme)
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    mutate(model)
    return subject.trace(scheme, replace(file, model=model))


@pytest.mark.parametrize("defect", MUTANTS)
def test_broken_files_are_refused(digits: q8.Subject, scheme: Scheme, defect: str) -> None:
    checks = digits.check(scheme, trace_of_broken(digits, scheme, MUTANTS[defect]))
    assert not checks
    assert checks.first_failure is not None and checks.first_failure.reason


def test_a_lost_relu_is_refused_where_it_changes_anything(digits: q8.Subject, scheme: Scheme) -> None:
    """In unsigned numbers from 0 on, quantisation cuts off what the ReLU would have."""
    checks = digits.check(scheme, trace_of_broken(digits, scheme, relu_behind_the_sum_lost))
    assert bool(checks) is (scheme is CPU)


def test_weights_along_the_wrong_axis_are_refused_where_they_are_read_so(digits: q8.Subject, scheme: Scheme) -> None:
    """ONNX Runtime does not look at the axis when it makes a QLinearConv: there it is the test of the file's."""
    checks = digits.check(scheme, trace_of_broken(digits, scheme, wrong_axis))
    assert bool(checks) is (scheme is CPU)


def test_the_broken_layer_is_named(digits: q8.Subject, scheme: Scheme) -> None:
    """And only what it computes: the others are held to what they were given."""
    checks = digits.check(scheme, trace_of_broken(digits, scheme, drop_bias(INNER)))
    assert [check.name for check in checks.checks if not check] == [f"{INNER}.quantized"]
    reason = checks.first_failure.reason  # type: ignore[union-attr]
    assert "LSB off, the limit is 1" in reason and checks.first_failure.fault is not None  # type: ignore[union-attr]


# programs quantised wrongly, and computed rightly


def rewritten(
    subject: q8.Subject, scheme: Scheme, change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], role: str
) -> QuantisedProgram:
    """A program in which a weight was quantised by `change`: (whole numbers, scales, exact) -> the first two."""
    program = subject.quantised[scheme]
    master = copy.deepcopy(program.master)
    index = 1 if role == "weight" else 2
    exact = parameter(subject.program.master, args_of(q8.layers(subject.program)[INNER])[index])
    whole, scale = (str(node.target) for node in args_of(args_of(q8.layers(program)[INNER])[index])[:2])
    for name, value in zip((whole, scale), change(getattr(master, whole), getattr(master, scale), exact), strict=True):
        assert value.dtype == getattr(master, name).dtype
        setattr(master, name, value)
    return QuantisedProgram(subject.program, master)


def steps(scale: Tensor, like: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (like.dim() - 1))


def with_floor(whole: Tensor, scale: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    return (exact / steps(scale, exact)).floor().clamp(-127, 127).to(whole.dtype), scale


def truncated(whole: Tensor, scale: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    return (exact / steps(scale, exact)).trunc().to(whole.dtype), scale


def saturated(whole: Tensor, scale: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    narrow = (scale / 2).half().double()
    return (exact / steps(narrow, exact)).round().clamp(-127, 127).to(whole.dtype), narrow


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


WEIGHTS = {
    "floor": with_floor,
    "truncated": truncated,
    "saturated": saturated,
    "wrong axis": scales_of_inputs,
    "swapped": swapped_rows,
    "off": one_step_off,
}


@pytest.mark.parametrize("defect", WEIGHTS)
def test_wrongly_quantised_weights_are_refused(digits: q8.Subject, scheme: Scheme, defect: str) -> None:
    """What is computed is what the program says, which is not what the network says."""
    program = rewritten(digits, scheme, WEIGHTS[defect], "weight")
    checks = digits.check(scheme, simulated(digits, program), program)
    failed = [check for check in checks.checks if not check]
    assert (f"{INNER}.weight", "weight") in [(check.name, check.kind) for check in failed]
    assert all(check.name.startswith(INNER) for check in failed)


@pytest.mark.parametrize("defect", [with_floor, swapped_rows, one_step_off], ids=lambda defect: defect.__name__)
def test_wrongly_quantised_biases_are_refused(
    digits: q8.Subject, traces: Callable[[Scheme], dict[str, Tensor]], defect: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    checks = digits.check(CPU, traces(CPU), rewritten(digits, CPU, defect, "bias"))
    assert f"{INNER}.bias" in [check.name for check in checks.checks if not check]


def dropped_bias(program: QuantisedProgram) -> None:
    node = args_of(q8.layers(program)[INNER])[2]
    name = str((args_of(node)[0] if q8.is_dequantised(node) else node).target)
    setattr(program.master, name, torch.zeros_like(getattr(program.master, name)))


def dropped_relu(program: QuantisedProgram) -> None:
    layer = q8.layers(program)[INNER]
    layer.args = (*layer.args[:-1], False)


def moved_scale(factor: float) -> Callable[[QuantisedProgram], None]:
    def moved(program: QuantisedProgram) -> None:
        node = next(n for n in q8.nodes(program, q8.QUANTIZE) if n.meta["label"] == f"{INNER}.quantized")
        name = str(args_of(node)[1].target)
        setattr(program.master, name, getattr(program.master, name) * factor)

    return moved


def four_bits(program: QuantisedProgram) -> None:
    whole, scale = (str(node.target) for node in args_of(args_of(q8.layers(program)[INNER])[1])[:2])
    values = getattr(program.master, whole)
    setattr(program.master, whole, (values.double() / 16).round().to(values.dtype))
    setattr(program.master, scale, getattr(program.master, scale) * 16)


def another_residual(program: QuantisedProgram) -> None:
    """The third block adds what the second got."""
    graph = program.master.graph
    if q8.nodes(program, aten.add.Tensor):
        second, third = q8.nodes(program, aten.add.Tensor)[1:3]
        third.args = (third.args[0], second.args[1])
    else:
        second, third = (q8.layers(program)[f"layer1.{i}.conv2"] for i in (1, 2))
        third.args = (*third.args[:3], second.args[3], *third.args[4:])
    graph.lint()
    program.master.recompile()


GRAPHS: dict[str, Callable[[QuantisedProgram], None]] = {
    "bias dropped": dropped_bias,
    "ReLU dropped": dropped_relu,
    "range 8 times as large": moved_scale(8.0),
    "range a third": moved_scale(1 / 3),
    "weights of 4 bits": four_bits,
    "another residual": another_residual,
}


@pytest.mark.parametrize("defect", GRAPHS)
def test_wrongly_quantised_graphs_are_refused(digits: q8.Subject, scheme: Scheme, defect: str) -> None:
    """The candidate computes exactly what the graph says: it is the graph that is wrong."""
    program = QuantisedProgram(digits.program, copy.deepcopy(digits.quantised[scheme].master))
    GRAPHS[defect](program)
    trace = simulated(digits, program)
    checks = digits.check(scheme, trace, program)
    lost = defect == "ReLU dropped" and scheme is CPU  # in unsigned numbers from 0 on, that changes nothing
    assert bool(checks) is False or lost, defect


# values broken on purpose


def value_node(subject: q8.Subject, scheme: Scheme, label: str = f"{INNER}.quantized") -> str:
    return next(n.name for n in q8.nodes(subject.quantised[scheme], q8.QUANTIZE) if n.meta["label"] == label)


def output_node(subject: q8.Subject, scheme: Scheme) -> str:
    return q8.layers(subject.quantised[scheme])["fc"].name


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


def expected_values(subject: q8.Subject, scheme: Scheme, trace: dict[str, Tensor], name: str = "") -> dict[str, Tensor]:
    """A trace in which one value is exactly what the float64 graph makes of the others."""
    name = name or value_node(subject, scheme)
    shown = {node.name for node in q8.nodes(subject.quantised[scheme], q8.QUANTIZE)} | {"x"}
    leaves = {n: v.double() for n, v in trace.items() if n in shown and n != name}
    leaves = {n: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for n, v in leaves.items()}
    return {**trace, name: evaluate(subject.quantised[scheme].master, name, leaves).to(trace[name].dtype)}


@pytest.fixture
def exact(
    digits: q8.Subject, scheme: Scheme, traces: Callable[[Scheme], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], Tensor, str]:
    """A trace, the value in it that is exact, and the name of its check."""
    trace = expected_values(digits, scheme, traces(scheme))
    return trace, trace[value_node(digits, scheme)], f"{INNER}.quantized"


Exact = tuple[dict[str, Tensor], Tensor, str]


def check_of(checks: OperatorChecks, name: str) -> QuantisedCheck:
    (check,) = (
        check
        for check in quantised_checks(checks)
        if check.name == name and check.kind in ("quantize_linear", "linear")
    )
    return check


def test_two_units_off_are_too_many_in_a_single_element(digits: q8.Subject, scheme: Scheme, exact: Exact) -> None:
    trace, value, name = exact
    found = check_of(digits.check(scheme, trace), name)
    assert found and (found.kind, found.lsb, found.differing) == ("quantize_linear", 0.0, 0.0)
    nudge(value, 1, 2)
    check = check_of(digits.check(scheme, trace), name)
    assert not check and check.lsb == 2 and check.reason == "2 LSB off, the limit is 1"
    assert check.differing == 1 / value.numel()


@pytest.mark.parametrize("by", [1, -1])
def test_one_unit_off_is_accepted_of_a_few_elements(digits: q8.Subject, scheme: Scheme, exact: Exact, by: int) -> None:
    trace, value, name = exact
    nudge(value, 4, by)
    check = check_of(digits.check(scheme, trace), name)
    assert check and (check.lsb, check.differing) == (1, 4 / value.numel())


def test_of_a_small_value_four_elements_may_be_off(
    digits: q8.Subject, traces: Callable[[Scheme], dict[str, Tensor]]
) -> None:
    """A share of 256 elements would be none."""
    node = args_of(args_of(q8.layers(digits.quantised[CPU])["fc"])[0])[0]
    trace, name = expected_values(digits, CPU, traces(CPU), node.name), str(node.meta["label"])
    value = trace[node.name]
    assert value.numel() == 256
    nudge(value, 4)
    assert check_of(digits.check(CPU, trace), name)
    trace = expected_values(digits, CPU, traces(CPU), node.name)
    nudge(trace[node.name], 5)
    assert not check_of(digits.check(CPU, trace), name)


def test_one_unit_off_is_refused_of_many(digits: q8.Subject, scheme: Scheme, exact: Exact) -> None:
    trace, value, name = exact
    share = {"fp32": 0.001, "fp16": 0.05}[scheme.arithmetic.name]
    allowed = int(share * value.numel())
    assert allowed >= 8
    nudge(value, allowed)
    assert check_of(digits.check(scheme, trace), name)
    more = expected_values(digits, scheme, trace)
    target = more[value_node(digits, scheme)]
    nudge(target, allowed + 1)
    check = check_of(digits.check(scheme, more), name)
    assert not check and check.lsb == 1
    assert check.reason == f"{allowed + 1} of {value.numel()} elements 1 LSB off, the limit is {100 * share:g} %"


def test_values_of_another_shape_are_refused(digits: q8.Subject, scheme: Scheme, exact: Exact) -> None:
    trace, value, _ = exact
    trace[value_node(digits, scheme)] = value[:, :-1]
    assert not digits.check(scheme, trace)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused(
    digits: q8.Subject, scheme: Scheme, traces: Callable[[Scheme], dict[str, Tensor]], value: float
) -> None:
    trace = traces(scheme)
    trace[output_node(digits, scheme)][3, 4] = value
    check = check_of(digits.check(scheme, trace), "fc")
    assert not check and "NaN or Inf" in check.reason


def test_nan_in_the_file_is_refused(digits: q8.Subject, scheme: Scheme) -> None:
    trace = trace_of_broken(
        digits, scheme, lambda model: change(model, "fc.weight.scale", lambda s: np.where(s == s.max(), np.nan, s))
    )
    assert not check_of(digits.check(scheme, trace), "fc")


BROKEN_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "constant": lambda y: y[:1].expand_as(y).clone(),
    "two classes swapped": lambda y: y[:, [1, 0, *range(2, 10)]],
    "scaled": lambda y: y * 1.05,
    "the previous picture's": lambda y: y.roll(1, 0),
    "a class less": lambda y: y[:, :-1],
    "one element": lambda y: y + y.abs().max() * 0.02 * torch.eye(*y.shape),
}


@pytest.mark.parametrize("defect", BROKEN_LOGITS)
def test_broken_logits_are_refused(
    digits: q8.Subject, scheme: Scheme, traces: Callable[[Scheme], dict[str, Tensor]], defect: str
) -> None:
    trace, name = traces(scheme), output_node(digits, scheme)
    trace[name] = BROKEN_LOGITS[defect](trace[name].float())
    assert not check_of(digits.check(scheme, trace), "fc")


@pytest.mark.parametrize("label", [f"{INNER}.quantized", "input.quantized"])
def test_a_value_that_is_not_shown_is_refused(
    digits: q8.Subject, scheme: Scheme, traces: Callable[[Scheme], dict[str, Tensor]], label: str
) -> None:
    trace = traces(scheme)
    del trace[value_node(digits, scheme, label)]
    (check,) = digits.check(scheme, trace).checks
    assert not check and check.name == label and check.reason == "the runtime does not show it"


def test_logits_that_are_not_shown_are_refused(
    digits: q8.Subject, scheme: Scheme, traces: Callable[[Scheme], dict[str, Tensor]]
) -> None:
    trace = traces(scheme)
    del trace[output_node(digits, scheme)]
    (check,) = digits.check(scheme, trace).checks
    assert not check and check.name == "fc"


def test_a_candidate_that_shows_nothing_does_not_pass(digits: q8.Subject, scheme: Scheme) -> None:
    assert not digits.check(scheme, {})


def test_only_what_is_compared_is_asked_for(digits: q8.Subject) -> None:
    """Every further output of a file keeps its runtime from fusing."""
    for scheme, program in digits.quantised.items():
        wanted = {node.name for node in q8.nodes(program, q8.QUANTIZE)} | {"x", output_node(digits, scheme)}
        assert digits.shown(scheme).values.keys() == wanted
    assert digits.quantised.keys() == {TENSORRT, CPU}
