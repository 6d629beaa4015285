"""The operator criterion and the kinds of faults, on cases made by hand."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from export.base.precision import PRECISIONS
from export.criteria.explained import evaluate
from export.criteria.fault import fault_of, quantised_fault_of
from export.criteria.operators import check_operators
from export.fusion.nodes import FUSED_OPERATORS, is_call, module_path
from export.fusion.program import FusedProgram
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.runtime.parity.checks import Fault, OperatorCheck, OperatorChecks
from export.runtime.runner import Runner
from tests.export.networks import Called, Fused

FP16 = PRECISIONS["fp16"]


@pytest.fixture(scope="module")
def program(resnet8: Fused) -> FusedProgram:
    return resnet8.program


def traced(runner: Runner, images: Tensor) -> dict[str, Tensor]:
    with runner:
        return dict(runner.trace({"input": images.numpy()}))


@pytest.fixture(scope="module")
def trace(resnet8: Fused) -> Mapping[str, Tensor]:
    return traced(ProgramRunner(resnet8.program, FP16, ("output",)), resnet8.images)


def failure_of(program: FusedProgram, trace: Mapping[str, Tensor], name: str, value: Tensor) -> OperatorCheck:
    """Why another value is refused."""
    failure = check_operators(program, FP16, {**trace, name: value}).first_failure
    assert isinstance(failure, OperatorCheck)
    return failure


def fused_name(program: FusedProgram, layer: str) -> str:
    return next(n.name for n in program.master.graph.nodes if is_call(n, *FUSED_OPERATORS) and module_path(n) == layer)


def stem() -> nn.Module:
    """A convolution whose ReLU is dead over whole windows of the pool in half of the channels."""
    conv = nn.Conv2d(3, 8, 7, 2, 3)
    conv.get_parameter("bias").data = torch.tensor([0.5, -1.5] * 4)
    return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), pool=nn.MaxPool2d(3, 2, 1)))


def bottleneck(channels: int) -> nn.Module:
    """3x3 and 1x1 with a projection, or with the identity."""
    conv, expand = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, channels, 1)
    parts = {"conv": conv, "expand": expand, "project": nn.Conv2d(3, channels, 1) if channels != 3 else nn.Identity()}
    return Called(lambda x, m: torch.relu(m.expand(torch.relu(m.conv(x))) + m.project(x)), **parts)


def projection() -> nn.Module:
    """A convolution and a projection of about the same size, whose sum is small beside them."""
    conv, project = nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.Conv2d(3, 8, 1)
    project.weight.data[:] = -conv.weight.data.sum((2, 3), keepdim=True)
    project.weight.data *= 1 + 0.1 * torch.rand(8, 3, 1, 1)
    return Called(lambda x, m: m.conv(x) + m.project(x), conv=conv, project=project)


ALONE: dict[str, Callable[[], nn.Module]] = {
    "conv2d_bias_relu_maxpool": stem,
    "conv2d_conv1x1_bias_act": lambda: bottleneck(3),
    "conv2d_conv1x1_bias_act, projection": lambda: bottleneck(12),
    "conv2d_projection_bias_act": projection,
    "mean_linear": lambda: Called(lambda x, m: m.fc(x.mean((2, 3))), fc=nn.Linear(3, 200)),
}


def alone(case: str, pictures: Mapping[str, Tensor]) -> Fused:
    torch.manual_seed(0)
    return Fused(ALONE[case]().eval(), pictures["resnet8"])


@pytest.mark.parametrize("case", ALONE)
def test_one_operator_alone_is_within_its_rounding(case: str, pictures: dict[str, Tensor]) -> None:
    """An addition of its own, as ONNX has, rounds once more: between two large summands that is much."""
    network = alone(case, pictures)
    for precision, p in PRECISIONS.items():
        runners: list[Runner] = [ProgramRunner(network.program, p, ("output",))]
        if precision != "bf16":  # whose file is written and run as that of fp16
            runners.append(TracedOnnxRunner(network.files[precision], p))
        for runner in runners:
            trace, separate = traced(runner, network.images), runner.name == "onnx"
            checks = check_operators(network.program, p, trace, separate)
            (check,) = checks.checks
            assert isinstance(check, OperatorCheck) and check.kind == case.partition(",")[0] and not checks.unchecked
            assert check, check
            if precision != "fp32":
                assert 0.75 < check.rms_z < 1.25  # the formula is neither too strict nor too generous
            if separate and precision == "fp16" and case == "conv2d_projection_bias_act":
                (fused,) = check_operators(network.program, p, trace).checks
                assert isinstance(fused, OperatorCheck) and fused.rms_z > 1.15 * check.rms_z


def test_a_positive_value_behind_a_dead_window_of_the_stem_fails(pictures: dict[str, Tensor]) -> None:
    network = alone("conv2d_bias_relu_maxpool", pictures)
    name = fused_name(network.program, "conv")
    trace = traced(ProgramRunner(network.program, FP16, ("output",)), network.images)
    assert (trace[name] == 0).any()
    failure = failure_of(network.program, trace, name, trace[name].where(trace[name] != 0, 1e-6))
    assert failure.name == "conv" and "clearly negative" in failure.reason


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_a_failure_names_the_layer_and_the_element(
    value: float, program: FusedProgram, trace: Mapping[str, Tensor]
) -> None:
    name, index = fused_name(program, "layer2.0.conv1"), (3, 5, 2, 1)
    broken = trace[name].clone()
    broken[index] += value
    failure = failure_of(program, trace, name, broken)
    assert failure.fault is not None and (failure.name, failure.fault.index) == ("layer2.0.conv1", index)
    assert failure.reason.startswith("1 values are NaN or Inf") is (value != 1.0)
    if value == 1.0:
        rounding = 4 * FP16.roundoff * (1 + abs(failure.fault.got))
        assert failure.fault.got == pytest.approx(failure.fault.expected + 1, abs=rounding)


def test_values_behind_a_dead_relu_and_of_another_shape_fail(
    program: FusedProgram, trace: Mapping[str, Tensor]
) -> None:
    name = fused_name(program, "layer1.0.conv1")
    dead = failure_of(program, trace, name, trace[name].where(trace[name] != 0, 1e-4))
    assert "not 0 where the ReLU's input is clearly negative" in dead.reason
    assert "has shape [8, 15, 32, 32]" in failure_of(program, trace, name, trace[name][:, :-1]).reason


def test_a_tensor_that_is_not_shown_is_reported(program: FusedProgram, trace: Mapping[str, Tensor]) -> None:
    hidden = {name: value for name, value in trace.items() if name != fused_name(program, "layer1.0.conv2")}
    checks = check_operators(program, FP16, hidden)
    assert not checks and checks.unchecked == ("layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
    assert checks.diagnosis.startswith("no verdict: layer1.0.conv2 (conv2d_bias_act) could not be checked")
    assert not check_operators(program, FP16, {})  # nothing checked is not a pass


def test_evaluate_refuses_to_compare_a_value_with_itself(program: FusedProgram) -> None:
    with pytest.raises(ValueError, match="compared with itself"):
        evaluate(program.source, "conv2d", {"conv2d": torch.zeros(1)})


LARGEST = torch.finfo(torch.float16).max
INDEX = (1, 2)


def filled(value: float, to: float) -> Tensor:
    values = torch.full((3, 4), value, dtype=torch.float64)
    values[INDEX] = to
    return values


# what was computed, what float64 has, and what is found
KINDS: dict[str, tuple[Tensor, Tensor, str]] = {
    "infinite": (filled(1.0, math.inf), filled(1.0, 7e4), "overflow"),
    "infinite where float64 is within the range": (filled(1.0, math.inf), filled(7e4, 1.0), "overflow"),
    "not a number": (filled(1.0, math.nan), filled(7e4, 1.0), "NaN"),
    "clamped": (filled(1.0, LARGEST), filled(1.0, 7e4), "saturation"),
    "clamped below": (filled(-1.0, -LARGEST), filled(-1.0, -7e4), "saturation"),
    "flushed to zero": (filled(1.0, 0.0), filled(1.0, 3e-6), "underflow"),
    "not 0 behind a dead ReLU": (filled(0.0, 5.0), filled(0.0, 0.0), "wrong value"),
    "one wrong": (filled(1.0, 3.0), filled(1.0, 1.0), "wrong value"),
    "zero where it is not": (filled(1.0, 0.0), filled(1.0, 1.0), "wrong value"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_wrong_value_has_a_kind_a_place_and_both_values(case: str) -> None:
    y, expected, kind = KINDS[case]
    z = (y - expected).abs() / (1e-3 * expected.abs()).clamp(min=1e-9) if bool(torch.isfinite(y).all()) else None
    fault = fault_of(y, expected, z, torch.float16)
    assert (fault.kind, fault.index) == (kind, INDEX)
    assert fault.expected == expected[INDEX] and (fault.got == y[INDEX] or math.isnan(fault.got))


def test_of_several_infinite_values_the_largest_is_the_worst() -> None:
    y, expected = torch.full((5,), math.inf, dtype=torch.float64), torch.tensor([7e4, 9e4, -2e5, 8e4, 1.0]).double()
    y[3] = math.nan
    assert fault_of(y, expected, None, torch.float16).index == (2,)


def test_weights_below_the_smallest_normal_number_are_an_underflow() -> None:
    y, expected = torch.ones(4).double(), torch.full((4,), 1.01).double()
    small, usual = torch.linspace(1e-7, 1e-6, 50).double(), torch.linspace(-1, 1, 50).double()
    assert fault_of(y, expected, expected - y, torch.float16, [usual, small]).kind == "underflow"
    assert fault_of(y, expected, expected - y, torch.float16, [usual]).kind == "wrong value"
    assert fault_of(y, expected, expected - y, torch.bfloat16, [usual, small]).kind == "wrong value"


@pytest.mark.parametrize(
    ("got", "zero_point", "kind"),
    [(127, 0, "saturation"), (-128, 0, "saturation"), (90, 0, "wrong value"), (-128, -128, "wrong value")],
)
def test_whole_numbers(got: int, zero_point: int, kind: str) -> None:
    """What is at the end of the range was cut off, unless that end is the zero."""
    q, expected = torch.full((2, 3), 10.0).double(), torch.full((2, 3), 10.0).double()
    q[1, 1] = got
    fault = quantised_fault_of(q, expected, torch.tensor(zero_point, dtype=torch.int8))
    assert fault == Fault(kind, (1, 1), float(got), 10.0)


def test_a_diagnosis_says_where_what_and_how() -> None:
    fault = Fault("overflow", (0, 5, 2, 1), math.inf, 123456.0)
    passed = OperatorCheck("conv1", "conv2d_bias_act", 1.0, 4.0, 1.6, 9.0)
    failed = OperatorCheck("layer1.0.conv1", "conv2d_bias_act", math.inf, math.inf, 1.6, 9.0, "12 are Inf", fault)
    assert OperatorChecks((passed, failed, failed), ()).diagnosis == (
        "layer1.0.conv1 (conv2d_bias_act): overflow at [0, 5, 2, 1], inf where float64 has 1.2346e+05: 12 are Inf"
    )
    assert failed.to_json()["fault"] == {"kind": "overflow", "index": [0, 5, 2, 1], "got": None, "expected": 123456.0}
    assert OperatorChecks((passed,), ()).diagnosis == "" and passed.severity == pytest.approx(1 / 1.6)
    assert OperatorChecks((), ()).diagnosis == "no operator could be checked"
