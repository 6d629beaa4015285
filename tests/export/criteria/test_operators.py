"""The operator criterion and the evidence criterion, on cases made by hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from export import fuse
from export.base.precision import PRECISIONS
from export.criteria.evidence import check_evidence
from export.criteria.operators import check_operators, evaluate
from export.fusion.nodes import FUSED_OPERATORS, duplicate, is_call, module_path, named_args
from export.fusion.program import FusedProgram
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import OnnxRuntimeRunner, ProgramRunner
from export.runtime.parity.checks import OperatorCheck
from export.runtime.runner import Runner
from resnet.models import create_model
from tests.export.networks import BATCH, Called, Fused

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


def test_every_operator_is_checked_and_within_its_rounding(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    checks = check_operators(program, FP16, trace)
    assert checks and not checks.unchecked
    assert len(checks.checks) == 8  # 7 convolutions, two of them with a projection, and the head
    assert all(isinstance(check, OperatorCheck) and 0.5 < check.rms_z < 1.2 for check in checks.checks)


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


def alone(case: str, images: Tensor) -> FusedProgram:
    torch.manual_seed(0)
    return fuse(ALONE[case]().eval(), images, BATCH)


@pytest.mark.parametrize("case", ALONE)
def test_one_operator_alone_is_within_its_rounding(case: str, pictures: dict[str, Tensor]) -> None:
    images = pictures["resnet8"]
    program = alone(case, images)
    for precision, p in PRECISIONS.items():
        runners: list[Runner] = [ProgramRunner(program, p, ("output",))]
        if precision != "bf16":  # whose file is written and run as that of fp16
            runners.append(OnnxRuntimeRunner(lower_onnx(program, images, p, {}), p))
        for runner in runners:
            checks = check_operators(program, p, traced(runner, images), runner.name == "onnx")
            (check,) = checks.checks
            assert isinstance(check, OperatorCheck) and check.kind == case.partition(",")[0] and not checks.unchecked
            assert check, check
            if precision != "fp32":
                assert 0.75 < check.rms_z < 1.25  # the formula is neither too strict nor too generous


def test_a_separate_addition_has_its_own_rounding(pictures: dict[str, Tensor]) -> None:
    """Without that term, what ONNX rounds between two large summands would look like an error."""
    images = pictures["resnet8"]
    program = alone("conv2d_projection_bias_act", images)
    trace = traced(OnnxRuntimeRunner(lower_onnx(program, images, FP16, {}), FP16), images)
    separate, fused = (check_operators(program, FP16, trace, separately).checks[0] for separately in (True, False))
    assert isinstance(separate, OperatorCheck) and isinstance(fused, OperatorCheck)
    assert separate and fused.rms_z > 1.15 * separate.rms_z


def test_a_positive_value_behind_a_dead_window_of_the_stem_fails(pictures: dict[str, Tensor]) -> None:
    program = alone("conv2d_bias_relu_maxpool", pictures["resnet8"])
    name = fused_name(program, "conv")
    trace = traced(ProgramRunner(program, FP16, ("output",)), pictures["resnet8"])
    assert (trace[name] == 0).any()
    failure = failure_of(program, trace, name, trace[name].where(trace[name] != 0, 1e-6))
    assert failure.name == "conv" and "clearly negative" in failure.reason


def changed(value: Tensor, index: tuple[int, ...], by: float) -> Tensor:
    broken = value.clone()
    broken[index] += by
    return broken


def test_a_failure_names_the_layer_and_the_element(program: FusedProgram, trace: Mapping[str, Tensor]) -> None:
    name = fused_name(program, "layer2.0.conv1")
    failure = failure_of(program, trace, name, changed(trace[name], (3, 5, 2, 1), 1.0))
    assert failure.fault is not None and failure.name == "layer2.0.conv1"
    assert (failure.fault.index, failure.fault.kind) == ((3, 5, 2, 1), "wrong value")
    rounding = 4 * FP16.roundoff * (1 + abs(failure.fault.got))
    assert failure.fault.got == pytest.approx(failure.fault.expected + 1, abs=rounding)


def test_values_of_another_kind_fail(program: FusedProgram, trace: Mapping[str, Tensor]) -> None:
    name = fused_name(program, "layer1.0.conv1")
    for value in (float("nan"), float("inf")):
        failure = failure_of(program, trace, name, changed(trace[name], (0, 0, 0, 0), value))
        assert failure.reason.startswith("1 values are NaN or Inf")
    dead = failure_of(program, trace, name, trace[name].where(trace[name] != 0, 1e-4))
    assert "not 0 where the ReLU's input is clearly negative" in dead.reason
    assert not check_operators(program, FP16, {**trace, name: trace[name][:, :-1]})


def test_a_tensor_that_is_not_shown_is_reported(program: FusedProgram, trace: Mapping[str, Tensor]) -> None:
    hidden = {name: value for name, value in trace.items() if name != fused_name(program, "layer1.0.conv2")}
    checks = check_operators(program, FP16, hidden)
    assert checks and checks.unchecked == ("layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
    assert not check_operators(program, FP16, {})  # nothing checked is not a pass


def test_residual_from_the_wrong_place_fails(resnet8: Fused) -> None:
    """A block that adds what its own branch computes: every operator for itself is right, the wiring is not."""
    program = resnet8.program
    wired = FusedProgram(program.source, program.folded, duplicate(program.master), BATCH)
    fused = [node for node in wired.master.graph.nodes if is_call(node, *FUSED_OPERATORS)]
    fused[2].replace_input_with(named_args(fused[2])["residual"], fused[1])
    wired.master.recompile()
    trace = traced(ProgramRunner(wired, FP16, ("output",)), resnet8.images)
    failure = check_operators(wired, FP16, trace).first_failure
    assert failure is not None and failure.name == "layer1.0.conv2"


def test_evaluate_refuses_to_compare_a_value_with_itself(program: FusedProgram) -> None:
    with pytest.raises(ValueError, match="compared with itself"):
        evaluate(program.source, "conv2d", {"conv2d": torch.zeros(1)})


def dead_layer(images: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    model(images)
    model.get_parameter("0.bias").data.sub_(100)
    return model


def vanishing_branch(images: Tensor) -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    for parameter in conv.parameters():
        parameter.data *= 1e-4
    return Called(lambda x, m: (x + m.conv(x)).mean((2, 3)), conv=conv)


# a network, what its images are multiplied with, and what makes them weak evidence
WEAK: dict[str, tuple[Callable[[Tensor], nn.Module] | None, float, tuple[str, ...]]] = {
    "good": (None, 1.0, ()),
    "zeros as input": (None, 0.0, ("logits vary by 0.00", "1 top-1 classes")),
    "untouched": (lambda _: create_model("resnet8"), 1.0, ("bn1 has the default", "every folded bias is zero")),
    "a dead layer": (dead_layer, 1.0, ("1: share of positive values after the ReLU is 0",)),
    "a vanishing branch": (vanishing_branch, 1.0, ("rms ratio of the two summands",)),
}


@pytest.mark.parametrize("case", WEAK)
def test_weak_evidence_is_named(case: str, resnet8: Fused) -> None:
    make, factor, expected = WEAK[case]
    torch.manual_seed(0)
    images = factor * resnet8.images
    model = resnet8.model if make is None else make(images).eval()
    with torch.no_grad():
        found = check_evidence(fuse(model, images, BATCH).source, images, images, [model(images).double()])
    assert bool(found) is (case == "good"), found.weaknesses
    assert all(any(reason in weakness for weakness in found.weaknesses) for reason in expected)
    if case == "good":
        assert found.classes is not None and found.classes >= 3
        assert found.active_share is not None and 0.1 < found.active_share[0] < found.active_share[1] < 0.9
