"""Capture and fusion of any user's model: what is fused, what is left, and that the result is right."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch, ExportError, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.references import run_oracle, run_rounded
from export.fusion.capture import capture
from export.fusion.nodes import moves_data, schema_name
from export.fusion.program import output_names
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import OnnxRuntimeRunner, ProgramRunner
from export.runtime.runner import Runner
from resnet.models import BasicBlock, BlockFactory, Bottleneck, ResNet, create_model
from tests.conftest import Made
from tests.export import networks
from tests.export.networks import BATCH, Called, assert_exact, judged


@pytest.fixture(scope="module")
def images(pictures: dict[str, Tensor]) -> Tensor:
    return pictures["resnet8"]


Fused = Mapping[type[nn.Module], tuple[nn.Module, FusedProgram]]


@pytest.fixture(scope="module")
def fused(images: Tensor) -> Fused:
    def make(network: type[nn.Module]) -> tuple[nn.Module, FusedProgram]:
        model = networks.make(network, images)
        return model, fuse(model, images, BATCH)

    return Made(make)


@pytest.mark.parametrize("network", networks.ALL, ids=lambda network: network.__name__)
def test_a_users_model_is_right(network: type[nn.Module], fused: Fused, images: Tensor) -> None:
    """In float64 the same; in each precision and form, every operator and every output within its rounding."""
    model, program = fused[network]
    assert_exact(program, model, images)
    names = output_names(program.graph_module)
    oracle = run_oracle(model, program, names, images.numpy())
    for precision, p in PRECISIONS.items():
        references = run_rounded(oracle, model, program, p)
        runners: list[Runner] = [ProgramRunner(program, p, names)]
        if precision != "fp32" or network in (networks.Backbone, networks.TwoHeads):  # float32 is written as float16 is
            file = lower_onnx(program, images, p, {})
            assert file.output_names == names
            runners.append(OnnxRuntimeRunner(file, p))
        for runner in runners:
            rung = judged(runner, model, program, images, precision, references)
            assert rung, f"{precision} {runner.name}: {rung.verdict}"


def test_coverage_names_what_was_fused_and_what_was_left(fused: Fused) -> None:
    coverage = fused[networks.SqueezeExcite][1].coverage
    parts = {operator.name: operator.parts for operator in coverage.fused}
    assert parts.keys() == {"stem.0", "conv", "gate.1", "gate.3", "fc"}
    assert parts["stem.0"] == ("stem.0", "stem.1", "stem.2") and "stem.0 + stem.1 + stem.2" in str(coverage)
    left = {operator.name: operator.kind for operator in coverage.left}
    assert left["norm"].endswith("group_norm") and "gate.4" in left
    reasons = [operator.reason for operator in fused[networks.SharedConv][1].coverage.left if operator.reason]
    assert reasons == ["BatchNorm not folded: the convolution's output has 2 readers"] * 2


def small(block: BlockFactory, *depths: int) -> Callable[[], nn.Module]:
    return lambda: ResNet(block, depths, 10, 3)


# what is fused at which level -> how many operators there are
COUNTS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "basic": (small(BasicBlock, 1, 1, 1, 1), {"b": 15, "c2": 10}),
    "bottleneck": (small(Bottleneck, 2, 1, 1, 1), {"b": 23, "c1": 21, "c2": 17, "c3": 12}),
    # grouped: the 3x3 convolutions stay on their own
    "resnext": (small(partial(Bottleneck, groups=32, width_per_group=4), 2, 1, 1, 1), {"c3": 17}),
    "resnet8": (lambda: create_model("resnet8"), {"c3": 8}),
    "plain8": (lambda: create_model("plain8"), {"c3": 8}),
    "resnet50": (lambda: create_model("resnet50"), {"c3": 34}),
}


@pytest.mark.parametrize("case", COUNTS)
def test_number_of_operators(case: str) -> None:
    """Every compute node of a ResNet is a fused operator; before the stem and the head are, three more are left."""
    model, counts = COUNTS[case]
    for level, count in counts.items():
        coverage = fuse(model().eval(), torch.zeros(1, 3, 64, 64), BATCH, level).coverage
        left = ["max_pool2d", "mean", "linear"] if level == "b" else []
        assert [operator.kind for operator in coverage.left] == left
        assert len(coverage.fused) + len(left) == count
    if case != "resnet50":
        return
    kinds = Counter(operator.kind for operator in coverage.fused)
    assert (kinds.pop("conv2d_bias_relu_maxpool"), kinds.pop("mean_linear")) == (1, 1)
    assert kinds == {"conv2d_bias_act": 16, "conv2d_conv1x1_bias_act": 16}
    parts = {operator.name: operator.parts for operator in coverage.fused}
    assert parts["conv1"] == ("conv1", "bn1", "relu", "maxpool")
    assert parts["layer1.0.conv1"] == ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu")
    second = ("layer1.0.conv2", "layer1.0.bn2", "layer1.0.relu")
    projection = ("layer1.0.downsample.0", "layer1.0.downsample.1")
    third = ("layer1.0.conv3", "layer1.0.bn3", "layer1.0", "layer1.0.relu")  # the addition is the block's own
    assert parts["layer1.0.conv3"] == second + projection + third
    assert parts["fc"] == ("avgpool", "fc")


def test_the_folded_graph_computes_by_plain_operators_with_the_same_weights(
    calibrated: dict[str, nn.Module], images: Tensor
) -> None:
    model = calibrated["resnet8"]
    program = fuse(model, images, BATCH)
    kinds = {schema_name(node) for node in program.folded.graph.nodes if not moves_data(node)}
    assert kinds == {"conv2d", "relu", "add", "mean", "linear"}
    with torch.no_grad():
        expected, got = copy.deepcopy(model).double()(images.double()), program.folded(images.double())
    assert (got - expected).norm() <= networks.EXACT * expected.norm()
    folded, master = (
        {t.data_ptr() for t in graph.state_dict().values() if t.dim() == 4}
        for graph in (program.folded, program.master)
    )
    assert folded == master


def test_batch_statistics_stay_eager(images: Tensor) -> None:
    model = networks.make(networks.BatchStatistics, images)
    program = fuse(model, images, Batch(8, 8, 8))
    assert [op.reason for op in program.coverage.left if op.name == "bn"] == [
        "BatchNorm without running statistics depends on the batch"
    ]
    assert_exact(program, model, images)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_batch_size_in_the_range(size: int, images: Tensor) -> None:
    """Whatever the size of the example."""
    model = networks.make(networks.Functional, images)
    assert_exact(fuse(model, images[:1], BATCH), model, images[:size])


def test_the_model_is_left_as_it_was(images: Tensor) -> None:
    model = networks.make(networks.Functional, images)
    calls: list[int] = []
    fc = model.get_submodule("fc")
    fc.register_forward_hook(lambda *_: calls.append(1))
    state = model.state_dict(keep_vars=True)
    before = {name: (t.clone(), t.data_ptr(), t.stride(), t.dtype) for name, t in state.items()}
    example = images.clone()
    fuse(model, example, BATCH).at(PRECISIONS["fp16"])
    after = model.state_dict(keep_vars=True)
    for name, (value, *facts) in before.items():
        assert torch.equal(after[name], value), name
        assert [after[name].data_ptr(), after[name].stride(), after[name].dtype] == facts, name
    assert not model.training and len(fc._forward_hooks) == 1 and torch.equal(example, images)


def test_ambient_modes_have_no_influence(fused: Fused, images: Tensor) -> None:
    model, program = fused[networks.Functional]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            got = fuse(model, images, BATCH)(images)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, program(images))


def test_nan_propagates_as_in_the_eager_model(fused: Fused, images: Tensor) -> None:
    model, program = fused[networks.Functional]
    poisoned = images.clone()
    poisoned[2, 0, 5, 5] = float("nan")
    poisoned[4, 1, 7, 7] = float("inf")
    got, expected = program(poisoned), model(poisoned)
    assert torch.equal(torch.isnan(got), torch.isnan(expected)) and bool(torch.isnan(got[2]).any())


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(x)


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    """A network with one thing wrong."""
    model = networks.SqueezeExcite().eval()
    with torch.no_grad():
        change(model)
    return model


def set_to(name: str, index: tuple[int, ...], value: float) -> nn.Module:
    return changed(lambda model: model.get_submodule(name[:6]).state_dict()[name[7:]].__setitem__(index, value))


EXAMPLE = torch.zeros(2, 3, 32, 32)
REFUSED: dict[str, tuple[nn.Module, Tensor, str]] = {
    "input written to": (Called(lambda x, m: x.mul_(2)), EXAMPLE, "changes its input in place"),
    "data-dependent branch": (Called(lambda x, m: x * 2 if x.sum() > 0 else x), EXAMPLE, "cannot capture Called"),
    "buffer changed by forward": (Counting(), EXAMPLE, "changes the buffer calls"),
    "batch size fixed in the code": (Called(lambda x, m: x.reshape(4, -1)), EXAMPLE, "cannot capture Called"),
    "lazy modules": (nn.Sequential(nn.LazyConv2d(4, 1)), EXAMPLE, r"0\.weight holds no values"),
    "training mode": (changed(lambda m: m.get_submodule("stem.1").train()), EXAMPLE, r"stem\.1 in training mode"),
    "NaN": (set_to("stem.0.weight", (0, 0, 0, 0), float("nan")), EXAMPLE, r"stem\.0\.weight holds NaN or Inf"),
    "Inf": (set_to("stem.0.weight", (0, 0, 0, 0), float("inf")), EXAMPLE, r"stem\.0\.weight holds NaN or Inf"),
    "negative variance": (set_to("stem.1.running_var", (3,), -0.1), EXAMPLE, r"stem\.1\.running_var holds -0\.1"),
    "three dimensions": (nn.Conv2d(3, 8, 1), EXAMPLE[0], r"expected an example of shape \[N, C, H, W\]"),
    "whole numbers": (nn.Conv2d(3, 8, 1), EXAMPLE.byte(), r"expected an example of shape \[N, C, H, W\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    model, example, message = REFUSED[case]
    if case != "training mode":
        model.eval()
    with pytest.raises(ExportError, match=message) as error:
        fuse(model, example, BATCH)
    assert "\n" not in str(error.value)
    assert case != "training mode" or model.get_submodule("stem.1").training


def test_other_arguments_are_refused(fused: Fused, images: Tensor) -> None:
    model, program = fused[networks.Functional]
    with pytest.raises(ExportError, match="expected a level of fusion of b, c1, c2, c3, got 'c4'"):
        fuse(model, images, BATCH, "c4")
    for shape in ((9, 3, 32, 32), (0, 3, 32, 32), (2, 3, 16, 16), (2, 1, 32, 32)):
        with pytest.raises(ExportError, match=r"expected an input of shape \[1:4:8, \*\[3, 32, 32\]\]"):
            program(torch.zeros(shape))
    for sizes in ((0, 1, 2), (4, 2, 8), (1, 16, 8)):
        with pytest.raises(ExportError, match="batch must satisfy"):
            Batch(*sizes)


def test_batchnorm_after_an_unbatched_convolution_is_not_folded(images: Tensor) -> None:
    """Its channels are the picture's rows."""

    def unbatched(x: Tensor, m: Any) -> Tensor:
        return F.batch_norm(m.conv(x[0]), m.mean, m.var)[None]

    mean, var = (nn.Parameter(value, requires_grad=False) for value in (torch.randn(32), torch.rand(32) + 0.5))
    model = Called(unbatched, conv=nn.Conv2d(3, 32, 3, padding=1), mean=mean, var=var).eval()
    assert_exact(fuse(model, images[:1], Batch(1, 1, 1)), model, images[:1])


def test_folded_weight_outside_the_fp16_range_is_refused() -> None:
    model = set_to("stem.1.running_var", (3,), 0.0)
    model.get_parameter("stem.1.weight").data[3] = 1e6
    program = fuse(model, EXAMPLE, BATCH)
    with pytest.raises(ExportError, match=r"stem_0_weight reaches .*expected at most 6\.55e\+04"):
        program.at(PRECISIONS["fp16"])


def test_captured_graph_is_functional(images: Tensor) -> None:
    graph = capture(networks.make(networks.Functional, images), images, BATCH).graph
    schemas = [getattr(node.target, "_schema", None) for node in graph.nodes if node.op == "call_function"]
    assert any(schemas) and not [schema.name for schema in schemas if schema is not None and schema.is_mutable]


def test_any_layout_of_the_input_gives_the_same(fused: Fused, images: Tensor) -> None:
    program = fused[networks.SqueezeExcite][1]
    expected = program(images)
    strided = torch.cat([images, images], dim=3)[:, :, :, : images.shape[3]]
    for x in (images.contiguous(memory_format=torch.channels_last), strided):
        assert torch.equal(program(x), expected)
    assert bool(torch.isfinite(expected).all())
