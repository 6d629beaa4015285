"""The operator criterion and the evidence criterion, on cases made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from export import Batch, fuse
from export.graph import duplicate, is_call, module_path
from export.parity.evidence import check_evidence
from export.parity.operators import check_operators, evaluate
from export.passes.fuse_epilogue import FUSED
from export.precision import PRECISIONS
from export.program import FusedProgram
from export.runners import ProgramRunner

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
    return next(n.name for n in program.master.graph.nodes if is_call(n, FUSED) and module_path(n) == layer)


def test_every_operator_is_checked_and_within_its_rounding(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    checks = check_operators(program, FP16, trace)
    assert checks and not checks.unchecked
    assert len(checks.checks) == 23  # 21 convolutions, the pooling and the classifier
    assert all(0.5 < check.rms_z < 1.2 for check in checks.checks if check.kind == "conv2d_bias_act")


def test_a_failure_names_the_layer_and_the_element(program: FusedProgram, trace: dict[str, Tensor]) -> None:
    name = fused_name(program, "layer2.0.conv1")
    broken = trace[name].clone()
    broken[3, 5, 2, 1] += 1
    failure = check_operators(program, FP16, {**trace, name: broken}).first_failure
    assert failure is not None
    assert failure.name == "layer2.0.conv1" and failure.worst == (3, 5, 2, 1)
    assert failure.got == pytest.approx(failure.expected + 1, abs=1e-2)


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
    wired = FusedProgram(program.source, duplicate(program.master), BATCH)
    fused = [node for node in wired.master.graph.nodes if is_call(node, FUSED)]
    fused[4].replace_input_with(fused[4].args[3], fused[0])
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
        return check_evidence(fuse(model, images, BATCH).source, images, [model(images).double()])


def test_good_evidence(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    found = evidence(calibrated["resnet20"], pictures["resnet20"])
    assert found, found.weaknesses
    assert found.classes >= 3 and 0.1 < found.active_share[0] < found.active_share[1] < 0.9


def test_an_untouched_network_is_weak_evidence(pictures: dict[str, Tensor]) -> None:
    from resnet import create_model

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
