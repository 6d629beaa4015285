"""Capture and fusion of any user's model: what is fused, what is left, and that the result is right."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from export import Batch, ExportError, fuse
from export.base.precision import PRECISIONS
from export.criteria.operators import check_operators
from export.fusion.capture import capture
from export.fusion.nodes import schema_name
from export.lowering.runners import ProgramRunner
from resnet.models import create_model
from tests.export import networks

BATCH = Batch(1, 4, 8)


@pytest.fixture(scope="module")
def images(pictures: dict[str, Tensor]) -> Tensor:
    return pictures["resnet20"]


def outputs(value: object) -> list[Tensor]:
    return pytree.tree_leaves(value)


@pytest.mark.parametrize("network", networks.ALL, ids=lambda network: network.__name__)
def test_user_model_comes_out_right(network: type[nn.Module], images: Tensor) -> None:
    model = networks.make(network, images)
    program = fuse(model, images, BATCH)
    expected, got = model(images), program(images)
    assert pytree.tree_structure(expected) == pytree.tree_structure(got)
    oracle = outputs(copy.deepcopy(model).double()(images.double()))
    with torch.no_grad():
        for y, y_master, y64 in zip(outputs(got), outputs(program.master(images.double())), oracle, strict=True):
            assert (y_master - y64).norm() < 1e-13 * y64.norm()
            assert (y - y64).norm() < 1e-5 * y64.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", networks.ALL, ids=lambda network: network.__name__)
def test_every_operator_of_a_user_model_passes(network: type[nn.Module], precision: str, images: Tensor) -> None:
    program = fuse(networks.make(network, images), images, BATCH)
    runner = ProgramRunner(program, PRECISIONS[precision], ("output",))
    with runner:
        checks = check_operators(program, PRECISIONS[precision], runner.trace({"input": images.numpy()}))
    assert checks, checks.first_failure


def test_coverage_names_what_was_fused_and_what_was_left(images: Tensor) -> None:
    coverage = fuse(networks.make(networks.SqueezeExcite, images), images, BATCH).coverage
    fused = {operator.name: operator.parts for operator in coverage.fused}
    assert fused["stem.0"] == ("stem.0", "stem.1", "stem.2")
    assert set(fused) == {"stem.0", "conv", "gate.1", "gate.3", "fc"}
    assert {(operator.name, operator.kind) for operator in coverage.left} >= {("norm", "native_group_norm")} or {
        (operator.name, operator.kind) for operator in coverage.left
    } >= {("norm", "group_norm")}
    assert "gate.4" in {operator.name for operator in coverage.left}
    assert "stem.0 + stem.1 + stem.2" in str(coverage)


def test_parts_are_the_modules_that_an_operator_replaces(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    coverage = fuse(calibrated["resnet50"], pictures["resnet50"], BATCH).coverage
    parts = {operator.name: operator.parts for operator in coverage.fused}
    assert parts["conv1"] == ("conv1", "bn1", "relu", "maxpool")
    assert parts["layer1.0.conv1"] == ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu")
    second = ("layer1.0.conv2", "layer1.0.bn2", "layer1.0.relu")
    projection = ("layer1.0.downsample.0", "layer1.0.downsample.1")
    third = ("layer1.0.conv3", "layer1.0.bn3", "layer1.0", "layer1.0.relu")  # the addition is the block's own
    assert parts["layer1.0.conv3"] == second + projection + third
    assert parts["fc"] == ("avgpool", "fc")
    kinds = {operator.name: operator.kind for operator in coverage.fused}
    assert kinds["layer1.0.conv3"] == kinds["layer1.1.conv3"] == "conv2d_conv1x1_bias_act"
    assert not coverage.left


COUNTS = {
    ("resnet18", "b"): 23,
    ("resnet18", "c1"): 21,
    ("resnet18", "c2"): 18,
    ("resnet18", "c3"): 18,
    ("resnet50", "b"): 56,
    ("resnet50", "c1"): 54,
    ("resnet50", "c2"): 50,
    ("resnet50", "c3"): 34,
    ("resnet20", "c3"): 20,
    ("plain20", "c3"): 20,
    ("resnet101", "c3"): 68,
    ("resnet152", "c3"): 102,
    ("resnext50_32x4d", "c3"): 50,  # grouped: the 3x3 convolutions stay on their own
}


@pytest.mark.parametrize(("model", "level"), COUNTS, ids=["-".join(case) for case in COUNTS])
def test_number_of_operators(model: str, level: str) -> None:
    """Every compute node of a ResNet is a fused operator; before the stem and the head are, three more are left."""
    coverage = fuse(create_model(model).eval(), torch.zeros(1, 3, 64, 64), BATCH, level).coverage
    left = ["max_pool2d", "mean", "linear"] if level == "b" else []
    assert [operator.kind for operator in coverage.left] == left
    assert len(coverage.fused) + len(left) == COUNTS[model, level]


def test_resnet50_in_parts() -> None:
    coverage = fuse(create_model("resnet50").eval(), torch.zeros(1, 3, 64, 64), BATCH).coverage
    assert Counter(operator.kind for operator in coverage.fused) == {
        "conv2d_bias_relu_maxpool": 1,
        "conv2d_bias_act": 16,
        "conv2d_conv1x1_bias_act": 16,
        "mean_linear": 1,
    }


def test_unknown_level_is_refused(images: Tensor) -> None:
    with pytest.raises(ExportError, match="expected a level of fusion of b, c1, c2, c3, got 'c4'"):
        fuse(networks.make(networks.Functional, images), images, BATCH, "c4")


def test_folded_graph_has_no_batchnorm_and_no_fused_operator(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    program = fuse(calibrated["resnet20"], pictures["resnet20"], BATCH)
    kinds = {schema_name(node) for node in program.folded.graph.nodes} - {""}
    assert kinds == {"conv2d", "relu", "add", "mean", "reshape", "clone", "linear"}  # dropout leaves a clone
    with torch.no_grad():
        expected = copy.deepcopy(calibrated["resnet20"]).double()(pictures["resnet20"].double())
        torch.testing.assert_close(program.folded(pictures["resnet20"].double()), expected, rtol=1e-10, atol=1e-10)


def test_folded_graph_shares_its_weights_with_the_fused_one(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    program = fuse(calibrated["resnet20"], pictures["resnet20"], BATCH)
    weights = {t.data_ptr() for t in program.folded.state_dict().values() if t.dim() == 4}
    assert {t.data_ptr() for t in program.master.state_dict().values() if t.dim() == 4} == weights


def test_shared_convolution_is_not_folded(images: Tensor) -> None:
    coverage = fuse(networks.make(networks.SharedConv, images), images, BATCH).coverage
    reasons = [operator.reason for operator in coverage.left if operator.reason]
    assert reasons == ["BatchNorm not folded: the convolution's output has 2 readers"] * 2


def test_batch_statistics_stay_eager(images: Tensor) -> None:
    model = networks.make(networks.BatchStatistics, images)
    program = fuse(model, images, Batch(8, 8, 8))
    assert [op.reason for op in program.coverage.left if op.name == "bn"] == [
        "BatchNorm without running statistics depends on the batch"
    ]
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_batch_size_in_the_range(size: int, images: Tensor) -> None:
    model = networks.make(networks.Functional, images)
    torch.testing.assert_close(
        fuse(model, images[:1], BATCH)(images[:size]), model(images[:size]), rtol=1e-4, atol=1e-5
    )


def test_the_model_is_left_as_it_was(images: Tensor) -> None:
    model = networks.make(networks.Functional, images)
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    before = {
        name: (t.clone(), t.data_ptr(), t.stride(), t.dtype) for name, t in model.state_dict(keep_vars=True).items()
    }
    example = images.clone()
    fuse(model, example, BATCH).at(PRECISIONS["fp16"])
    after = model.state_dict(keep_vars=True)
    for name, (value, pointer, stride, dtype) in before.items():
        assert torch.equal(after[name], value), name
        assert (after[name].data_ptr(), after[name].stride(), after[name].dtype) == (pointer, stride, dtype), name
    assert not model.training and len(model.fc._forward_hooks) == 1 and torch.equal(example, images)


def test_ambient_modes_have_no_influence(images: Tensor) -> None:
    model = networks.make(networks.Functional, images)
    expected = fuse(model, images, BATCH)(images)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            got = fuse(model, images, BATCH)(images)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


def test_nan_propagates_as_in_the_eager_model(images: Tensor) -> None:
    model = networks.make(networks.Functional, images)
    poisoned = images.clone()
    poisoned[2, 0, 5, 5] = float("nan")
    poisoned[4, 1, 7, 7] = float("inf")
    got, expected = fuse(model, images, BATCH)(poisoned), model(poisoned)
    assert torch.equal(torch.isnan(got), torch.isnan(expected)) and bool(torch.isnan(got[2]).any())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(x)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1)


class WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


REFUSED = {
    "input written to": (WritesItsInput, "changes its input in place"),
    "data-dependent branch": (Branches, "cannot capture Branches"),
    "buffer changed by forward": (Counts, "changes the buffer calls"),
    "batch size fixed in the code": (FixedBatch, "cannot capture FixedBatch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, images: Tensor) -> None:
    network, message = REFUSED[case]
    with pytest.raises(ExportError, match=message) as error:
        fuse(network().eval(), images, BATCH)
    assert "\n" not in str(error.value)


def test_lazy_modules_are_refused(images: Tensor) -> None:
    with pytest.raises(ExportError, match=r"0\.weight holds no values"):
        fuse(nn.Sequential(nn.LazyConv2d(4, 1)).eval(), images)


@pytest.mark.parametrize("shape", [(9, 3, 32, 32), (0, 3, 32, 32), (2, 3, 16, 16), (2, 1, 32, 32)])
def test_input_the_program_was_not_captured_for_is_refused(shape: tuple[int, ...], images: Tensor) -> None:
    program = fuse(networks.make(networks.Functional, images), images, BATCH)
    with pytest.raises(ExportError, match=r"expected an input of shape \[1:4:8, \*\[3, 32, 32\]\]"):
        program(torch.zeros(shape))


def test_batchnorm_after_an_unbatched_convolution_is_not_folded(images: Tensor) -> None:
    """Its channels are the picture's rows."""

    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3, padding=1)
            self.register_buffer("mean", torch.randn(32))
            self.register_buffer("var", torch.rand(32) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x[0]), self.mean, self.var)[None]

    model = Unbatched().eval()
    program = fuse(model, images[:1], Batch(1, 1, 1))
    torch.testing.assert_close(program(images[:1]), model(images[:1]), rtol=1e-4, atol=1e-4)


def test_training_mode_is_refused_by_name(images: Tensor) -> None:
    model = networks.make(networks.SqueezeExcite, images)
    model.stem[1].train()
    with pytest.raises(ExportError, match=r"stem\.1 in training mode"):
        fuse(model, images)
    assert model.stem[1].training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, images: Tensor) -> None:
    model = networks.make(networks.SqueezeExcite, images)
    model.stem[0].weight.data[0, 0, 0, 0] = value
    with pytest.raises(ExportError, match=r"stem\.0\.weight holds NaN or Inf"):
        fuse(model, images)


def test_negative_variance_is_refused(images: Tensor) -> None:
    model = networks.make(networks.SqueezeExcite, images)
    model.stem[1].running_var[3] = -0.1
    with pytest.raises(ExportError, match=r"stem\.1\.running_var holds -0\.1"):
        fuse(model, images)


def test_folded_weight_outside_the_fp16_range_is_refused(images: Tensor) -> None:
    model = networks.make(networks.SqueezeExcite, images)
    model.stem[1].running_var[3] = 0
    model.stem[1].weight.data[3] = 1e6
    program = fuse(model, images, BATCH)
    with pytest.raises(ExportError, match=r"stem_0_weight reaches .*expected at most 6\.55e\+04"):
        program.at(PRECISIONS["fp16"])


@pytest.mark.parametrize("example", [torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_example_of_the_wrong_form_is_refused(example: Tensor) -> None:
    with pytest.raises(ExportError, match=r"expected an example of shape \[N, C, H, W\]"):
        fuse(nn.Conv2d(3, 8, 1).eval(), example)


@pytest.mark.parametrize("sizes", [(0, 1, 2), (4, 2, 8), (1, 16, 8)])
def test_impossible_batch_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ExportError, match="batch must satisfy"):
        Batch(*sizes)


def test_captured_graph_is_functional(images: Tensor) -> None:
    graph = capture(networks.make(networks.Functional, images), images, BATCH).graph
    mutating = [
        n.name
        for n in graph.nodes
        if n.op == "call_function" and getattr(n.target, "_schema", None) and n.target._schema.is_mutable
    ]
    assert not mutating


def test_channels_last_input_gives_the_same(images: Tensor) -> None:
    program = fuse(networks.make(networks.SqueezeExcite, images), images, BATCH)
    expected = program(images)
    assert torch.equal(program(images.contiguous(memory_format=torch.channels_last)), expected)
    strided = torch.cat([images, images], dim=3)[:, :, :, : images.shape[3]]
    assert torch.equal(program(strided), expected)
    assert np.isfinite(expected.detach().numpy()).all()
