"""The operator criterion and the evidence criterion, on cases made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from export import Batch, fuse
from export.base.precision import PRECISIONS
from export.criteria.evidence import check_evidence
from export.criteria.operators import check_operators, evaluate
from export.fusion.nodes import FUSED_OPERATORS, duplicate, is_call, module_path, named_args
from export.fusion.program import FusedProgram
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import OnnxRuntimeRunner, ProgramRunner, Runner

BATCH = Batch(1, 4, 8)
FP16 = PRECISIONS["fp16"]


@pytest.fixture(scope="module")
def program(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> FusedProgram:
    return fuse(calibrated["resnet20"], pictures["resnet20"], BATCH)


@pytest.fixture
def trace(program: FusedProgram, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
    runner = ProgramRunner(program, FP16, ("output",))
    with runner:
        return runner.trace({"input": pictures["resnet20"].numpy()})


def fused_name(program: FusedProgram, layer: str) -> str:
    return next(n.name for n in program.master.graph.nodes if is_call(n, *FUSED_OPERATORS) and module_path(n) == layer)


def test_every_operator_is_checked_and_within_its_rounding(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    checks = check_operators(program, FP16, trace)
    assert checks and not checks.unchecked
    assert len(checks.checks) == 20  # 19 convolutions, two of them with a projection, and the head
    assert all(0.5 < check.rms_z < 1.2 for check in checks.checks)


class Stem(nn.Module):
    """A convolution whose ReLU is dead over whole windows of the pool in half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.conv.bias.data = torch.tensor([0.5, -1.5] * 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.conv(x)))


class Bottleneck(nn.Module):
    """3x3 and 1x1 with a projection, or with the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.expand = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, channels, 1)
        self.project = nn.Conv2d(3, channels, 1) if channels != 3 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.expand(torch.relu(self.conv(x))) + self.project(x))


class Projection(nn.Module):
    """A convolution and a projection of about the same size, whose sum is small beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.project.weight.data[:] = -self.conv.weight.data.sum((2, 3), keepdim=True)
        self.project.weight.data *= 1 + 0.1 * torch.rand(8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.project(x)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 200)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


ALONE: dict[str, Callable[[], nn.Module]] = {
    "conv2d_bias_relu_maxpool": Stem,
    "conv2d_conv1x1_bias_act": lambda: Bottleneck(3),
    "conv2d_conv1x1_bias_act, projection": lambda: Bottleneck(12),
    "conv2d_projection_bias_act": Projection,
    "mean_linear": Head,
}


@pytest.fixture(params=ALONE)
def alone(request: pytest.FixtureRequest, pictures: dict[str, Tensor]) -> tuple[str, FusedProgram, Tensor]:
    """The name of an operator, and a network of that one."""
    torch.manual_seed(0)
    images = pictures["resnet20"]
    return request.param.partition(",")[0], fuse(ALONE[request.param]().eval(), images, BATCH), images


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", ["fused", "onnx"])
def test_one_operator_alone_is_within_its_rounding(
    alone: tuple[str, FusedProgram, Tensor], form: str, precision: str
) -> None:
    kind, program, images = alone
    p = PRECISIONS[precision]
    runner: Runner = ProgramRunner(program, p, ("output",))
    if form == "onnx":
        runner = OnnxRuntimeRunner(lower_onnx(program, images, p, {}), p)
    with runner:
        checks = check_operators(program, p, runner.trace({"input": images.numpy()}), form == "onnx")
    (check,) = checks.checks
    assert check and check.kind == kind and not checks.unchecked, check
    if precision != "fp32":
        assert 0.75 < check.rms_z < 1.25  # the formula is neither too strict nor too generous


def test_a_separate_addition_has_its_own_rounding(pictures: dict[str, Tensor]) -> None:
    """Without that term, what ONNX rounds between two large summands would look like an error."""
    torch.manual_seed(0)
    images = pictures["resnet20"]
    program = fuse(Projection().eval(), images, BATCH)
    with OnnxRuntimeRunner(lower_onnx(program, images, FP16, {}), FP16) as runner:
        trace = runner.trace({"input": images.numpy()})
    separate, fused = (check_operators(program, FP16, trace, separately).checks[0] for separately in (True, False))
    assert separate and fused.rms_z > 1.15 * separate.rms_z


def test_a_positive_value_behind_a_dead_window_of_the_stem_fails(pictures: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    program = fuse(Stem().eval(), pictures["resnet20"], BATCH)
    name = fused_name(program, "conv")
    with ProgramRunner(program, FP16, ("output",)) as runner:
        trace = runner.trace({"input": pictures["resnet20"].numpy()})
    assert (trace[name] == 0).any()
    trace[name][trace[name] == 0] = 1e-6
    failure = check_operators(program, FP16, trace).first_failure
    assert failure is not None and failure.name == "conv" and "clearly negative" in failure.reason


def test_a_failure_names_the_layer_and_the_element(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    name = fused_name(program, "layer2.0.conv1")
    broken = trace[name].clone()
    broken[3, 5, 2, 1] += 1
    failure = check_operators(program, FP16, {**trace, name: broken}).first_failure
    assert failure is not None and failure.fault is not None
    assert failure.name == "layer2.0.conv1" and failure.fault.index == (3, 5, 2, 1)
    assert failure.fault.kind == "wrong value"
    assert failure.fault.got == pytest.approx(failure.fault.expected + 1, abs=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail(value: float, program: FusedProgram, trace: dict[str, Tensor]) -> None:
    name = fused_name(program, "layer1.1.conv1")
    broken = trace[name].clone()
    broken[0, 0, 0, 0] = value
    failure = check_operators(program, FP16, {**trace, name: broken}).first_failure
    assert failure is not None and failure.reason.startswith("1 values are NaN or Inf")


def test_a_positive_value_behind_a_dead_relu_fails(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    name = fused_name(program, "layer1.0.conv1")
    broken = trace[name].clone()
    broken[broken == 0] = 1e-4
    failure = check_operators(program, FP16, {**trace, name: broken}).first_failure
    assert failure is not None and "not 0 where the ReLU's input is clearly negative" in failure.reason


def test_a_wrong_shape_fails(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    name = fused_name(program, "conv1")
    assert not check_operators(program, FP16, {**trace, name: trace[name][:, :-1]})


def test_a_tensor_that_is_not_shown_is_reported(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    hidden = {name: value for name, value in trace.items() if name != fused_name(program, "layer1.1.conv2")}
    checks = check_operators(program, FP16, hidden)
    assert checks and checks.unchecked == ("layer1.1.conv2", "layer1.2.conv1", "layer1.2.conv2")


def test_nothing_checked_is_not_a_pass(program: FusedProgram) -> None:
    assert not check_operators(program, FP16, {})


def test_residual_from_the_wrong_place_fails(program: FusedProgram, pictures: dict[str, Tensor]) -> None:
    """A block that adds another block's input: every operator for itself is right, the wiring is not."""
    wired = FusedProgram(program.source, program.folded, duplicate(program.master), BATCH)
    fused = [node for node in wired.master.graph.nodes if is_call(node, *FUSED_OPERATORS)]
    fused[4].replace_input_with(named_args(fused[4])["residual"], fused[0])
    wired.master.recompile()
    runner = ProgramRunner(wired, FP16, ("output",))
    with runner:
        failure = check_operators(wired, FP16, runner.trace({"input": pictures["resnet20"].numpy()})).first_failure
    assert failure is not None and failure.name == "layer1.1.conv2"


def test_evaluate_refuses_to_compare_a_value_with_itself(program: FusedProgram) -> None:
    with pytest.raises(ValueError, match="compared with itself"):
        evaluate(program.source, "conv2d", {"conv2d": torch.zeros(1)})


def evidence(model: nn.Module, images: Tensor):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return check_evidence(fuse(model, images, BATCH).source, images, images, [model(images).double()])


def test_good_evidence(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    found = evidence(calibrated["resnet20"], pictures["resnet20"])
    assert found, found.weaknesses
    assert found.classes >= 3 and 0.1 < found.active_share[0] < found.active_share[1] < 0.9


def test_an_untouched_network_is_weak_evidence(pictures: dict[str, Tensor]) -> None:
    from resnet.models import create_model

    torch.manual_seed(0)
    found = evidence(create_model("resnet20").eval(), pictures["resnet20"])
    assert "bn1 has the default BatchNorm statistics" in found.weaknesses
    assert "every folded bias is zero" in found.weaknesses


def test_zeros_as_input_are_weak_evidence(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    found = evidence(calibrated["resnet20"], torch.zeros_like(pictures["resnet20"]))
    assert any("logits vary by 0.00" in weakness for weakness in found.weaknesses)
    assert any("1 top-1 classes" in weakness for weakness in found.weaknesses)


def test_a_dead_layer_is_weak_evidence(pictures: dict[str, Tensor]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    model(pictures["resnet20"])
    model[0].bias.data -= 100
    found = evidence(model.eval(), pictures["resnet20"])
    assert any(weakness.startswith("1: share of positive values after the ReLU is 0") for weakness in found.weaknesses)


def test_a_vanishing_branch_is_weak_evidence(pictures: dict[str, Tensor]) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.conv.weight.data *= 1e-4
            self.conv.bias.data *= 1e-4

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.conv(x)).mean((2, 3))

    found = evidence(Residual().eval(), pictures["resnet20"])
    assert any("rms ratio of the two summands" in weakness for weakness in found.weaknesses)
