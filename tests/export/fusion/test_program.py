"""Capture and fusion of any user's model: what is fused, what is left, that the result is right and is described so."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from export import Batch, ExportError, fuse
from export.base.precision import PRECISIONS
from export.fusion.casting import converted
from export.fusion.description import describe_graph
from export.fusion.nodes import aten, constant, is_call, module_path, moves_data, schema_name
from export.fusion.program import FusedProgram, operator_nodes, output_names
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.runtime.runner import Runner
from resnet.models import BasicBlock, BlockFactory, Bottleneck, ResNet, create_model
from tests.export import networks
from tests.export.networks import BATCH, Called, Fused, assert_exact, fuse_exactly, judged, snapshot, values_of


@pytest.fixture
def functional(fused: Mapping[Any, Fused]) -> Fused:
    return fused[networks.functional]


@pytest.mark.parametrize("network", networks.ALL, ids=lambda network: network.__name__)
def test_a_users_model_is_right(network: networks.Network, fused: Mapping[Any, Fused]) -> None:
    """In float64 the same; in each precision and form, every operator and every output within its rounding."""
    subject = fused[network]
    program, names = subject.program, output_names(subject.program.graph_module)
    assert_exact(program, subject.model, subject.images)
    for precision, p in PRECISIONS.items():
        runners: list[Runner] = [ProgramRunner(program, p, names)]
        if precision != "fp32" or network in (networks.backbone, networks.two_heads):  # float32 is written like float16
            assert subject.files[precision].output_names == names
            runners.append(TracedOnnxRunner(subject.files[precision], p))
        for runner in runners:
            rung = judged(runner, subject, program, precision)
            assert rung, f"{precision} {runner.name}: {rung.verdict}"


def test_coverage_names_what_was_fused_and_what_was_left(fused: Mapping[Any, Fused]) -> None:
    coverage = fused[networks.squeeze_excite].program.coverage
    parts = {operator.name: operator.parts for operator in coverage.fused}
    assert parts.keys() == {"stem.0", "conv", "gate.1", "gate.3", "fc"}
    assert parts["stem.0"] == ("stem.0", "stem.1", "stem.2") and "stem.0 + stem.1 + stem.2" in str(coverage)
    left = {operator.name: operator.kind for operator in coverage.left}
    assert left["norm"].endswith("group_norm") and parts["gate.3"] == ("gate.3", "gate.4") and "mul" in left.values()
    shared = fused[networks.shared_conv].program.coverage
    reasons = [operator.reason for operator in shared.left if operator.reason]
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
@pytest.mark.usefixtures("captured_once")
def test_number_of_operators(case: str) -> None:
    """Every compute node of a ResNet is a fused operator; before the stem and the head are, three more are left."""
    model, counts = COUNTS[case][0]().eval(), COUNTS[case][1]
    for level, count in counts.items():
        coverage = fuse(model, torch.zeros(1, 3, 64, 64), BATCH, level).coverage
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


def test_the_folded_graph_computes_by_plain_operators_with_the_same_weights(resnet8: Fused) -> None:
    program = resnet8.program
    kinds = {schema_name(node) for node in program.folded.graph.nodes if not moves_data(node)}
    assert kinds == {"conv2d", "relu", "add", "mean", "linear"}
    states = program.folded.state_dict(), program.master.state_dict()
    folded, master = ({t.data_ptr() for t in state.values() if t.dim() == 4} for state in states)
    assert folded == master


def test_what_is_no_batchnorm_of_the_channels_stays_eager(resnet8: Fused) -> None:
    """It normalises by the batch, or the pictures' rows behind a convolution without a batch."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(32, track_running_stats=False)
    by_batch = Called(lambda x, m: F.relu(m.bn(m.conv(x))), conv=nn.Conv2d(3, 32, 3, padding=1), bn=bn)
    (left,) = fuse_exactly(by_batch, resnet8.images, Batch(8, 8, 8)).coverage.left[:1]
    assert (left.name, left.reason) == ("bn", "BatchNorm without running statistics depends on the batch")
    mean, var = torch.randn(32), torch.rand(32) + 0.5
    rows = Called(lambda x, m: F.batch_norm(m.conv(x[0]), m.mean, m.var)[None], conv=by_batch.conv, mean=mean, var=var)
    fuse_exactly(rows, resnet8.images[:1], Batch(1, 1, 1))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_batch_size_in_the_range(size: int, functional: Fused) -> None:
    """Whatever the size of the example."""
    program = fuse(functional.model, functional.images[:1], BATCH)
    assert_exact(program, functional.model, functional.images[:size])


def test_the_model_is_left_as_it_was(resnet8: Fused) -> None:
    images = resnet8.images
    model = networks.make(networks.functional, images)
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


def test_ambient_modes_have_no_influence(functional: Fused) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            got = fuse(functional.model, functional.images, BATCH)(functional.images)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, functional.program(functional.images))


def test_nan_propagates_as_in_the_eager_model(functional: Fused) -> None:
    poisoned = functional.images.clone()
    poisoned[2, 0, 5, 5] = float("nan")
    poisoned[4, 1, 7, 7] = float("inf")
    got, expected = functional.program(poisoned), functional.model(poisoned)
    assert torch.equal(torch.isnan(got), torch.isnan(expected)) and bool(torch.isnan(got[2]).any())


def counting(x: Tensor, m: Any) -> Tensor:
    m.calls += 1
    return F.relu(x)


def training() -> nn.Module:
    model = networks.squeeze_excite().eval()
    model.get_submodule("stem.1").train()
    return model


def set_to(name: str, index: tuple[int, ...], value: float) -> nn.Module:
    model = networks.squeeze_excite().eval()
    model.state_dict()[name][index] = value
    return model


EXAMPLE = torch.zeros(2, 3, 32, 32)
DECIDES = r"cannot capture Called: what forward does depends on .* \(test_program\.py, line \d+: .*{}"
REFUSED: dict[str, tuple[nn.Module, Tensor, str]] = {
    "input written to": (Called(lambda x, m: x.mul_(2)), EXAMPLE, "changes its input in place"),
    "data-dependent branch": (Called(lambda x, m: x * 2 if x.sum() > 0 else x), EXAMPLE, DECIDES.format("x \\* 2 if")),
    "data-dependent size": (Called(lambda x, m: x[:, : int(x.mean().item())]), EXAMPLE, DECIDES.format("x\\[:, : int")),
    "a wrong shape": (Called(lambda x, m: x.view(7, -1, 3)), EXAMPLE, r"is invalid .* \(test_program\.py, line \d+: "),
    "buffer changed by forward": (Called(counting, calls=torch.zeros(())), EXAMPLE, "changes the buffer calls"),
    "batch size fixed in the code": (Called(lambda x, m: x.reshape(4, -1)), EXAMPLE, "cannot capture Called"),
    "lazy modules": (nn.Sequential(nn.LazyConv2d(4, 1)), EXAMPLE, r"0\.weight holds no values"),
    "training mode": (training(), EXAMPLE, r"stem\.1 in training mode"),
    "NaN": (set_to("stem.0.weight", (0, 0, 0, 0), float("nan")), EXAMPLE, r"stem\.0\.weight holds NaN or Inf"),
    "Inf": (set_to("stem.0.weight", (0, 0, 0, 0), float("inf")), EXAMPLE, r"stem\.0\.weight holds NaN or Inf"),
    "negative variance": (set_to("stem.1.running_var", (3,), -0.1), EXAMPLE, r"stem\.1\.running_var holds -0\.1"),
    "three dimensions": (nn.Conv2d(3, 8, 1), EXAMPLE[0], r"expected an example of shape \[N, C, H, W\]"),
    "whole numbers": (nn.Conv2d(3, 8, 1), EXAMPLE.byte(), r"expected an example of shape \[N, C, H, W\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, example, message = REFUSED[case]
    if case != "training mode":
        model.eval()
    with pytest.raises(ExportError, match=message) as error:
        fuse(model, example, BATCH)
    assert "\n" not in str(error.value) and capsys.readouterr().err == ""
    assert "forward" not in vars(model)
    assert case != "training mode" or model.get_submodule("stem.1").training


def test_other_arguments_are_refused(functional: Fused) -> None:
    with pytest.raises(ExportError, match="expected a level of fusion of b, c1, c2, c3, got 'c4'"):
        fuse(functional.model, functional.images, BATCH, "c4")
    for shape in ((9, 3, 32, 32), (0, 3, 32, 32), (2, 3, 16, 16), (2, 1, 32, 32)):
        with pytest.raises(ExportError, match=r"expected an input of shape \[1:4:8, \*\[3, 32, 32\]\]"):
            functional.program(torch.zeros(shape))
    for sizes in ((0, 1, 2), (4, 2, 8), (1, 16, 8)):
        with pytest.raises(ExportError, match="batch must satisfy"):
            Batch(*sizes)


def test_captured_graph_is_functional(functional: Fused) -> None:
    graph = functional.program.source.graph
    schemas = [getattr(node.target, "_schema", None) for node in graph.nodes if node.op == "call_function"]
    assert any(schemas) and not [schema.name for schema in schemas if schema is not None and schema.is_mutable]


def test_any_layout_of_the_input_gives_the_same(functional: Fused) -> None:
    program, images = functional.program, functional.images
    expected = program(images)
    strided = torch.cat([images, images], dim=3)[:, :, :, : images.shape[3]]
    for x in (images.contiguous(memory_format=torch.channels_last), strided):
        assert torch.equal(program(x), expected)


SHORTCUTS = [
    ("stem.0", "blocks.0.expand", "projection"),
    ("blocks.0.expand", "blocks.1.expand", "residual"),
    ("blocks.1.expand", "blocks.2.expand", "projection"),
]


def test_graph_of_two_heads_has_two_outputs(fused: Mapping[Any, Fused]) -> None:
    graph = describe_graph(fused[networks.two_heads].program.master)
    assert [(n["role"], n["name"], n["kind"]) for n in graph["nodes"]] == [
        ("input", "input", ""), ("fused", "conv", "conv2d_bias_act"), ("fused", "head", "mean_linear"),
        ("fused", "mask", "conv2d_bias_act"), ("output", "scores", ""), ("output", "mask", ""),
    ]  # fmt: skip
    pairs = [(e["from"], e["to"]) for e in graph["edges"]]
    assert sorted(pairs) == [(0, 1), (1, 2), (1, 3), (2, 4), (3, 5)]
    assert graph["nodes"][1]["parts"] == ["conv", "bn", "relu"] and graph["nodes"][5]["shape"] == ["N", 2, 32, 32]


def test_graph_names_residuals_projections_and_what_was_left(fused: Mapping[Any, Fused]) -> None:
    backbone = describe_graph(fused[networks.backbone].program.master)
    names = [n["name"] for n in backbone["nodes"]]
    assert [(names[e["from"]], names[e["to"]], e["role"]) for e in backbone["edges"] if e["role"]] == SHORTCUTS


def test_what_forward_computes_itself_is_named_with_the_module_before_it(fused: Mapping[Any, Fused]) -> None:
    names = [operator.name for operator in fused[networks.squeeze_excite].program.coverage.left]
    assert any(re.fullmatch(r"mul_\d+ \(forward, behind norm\)", name) for name in names), names
    assert not [name for name in names if re.fullmatch(r"\w+_\d+", name)], names


@pytest.mark.parametrize("network", networks.ALL, ids=lambda network: network.__name__)
def test_graph_agrees_with_the_coverage(network: networks.Network, fused: Mapping[Any, Fused]) -> None:
    program = fused[network].program
    graph = describe_graph(program.master)
    for role, operators in (("fused", program.coverage.fused), ("left", program.coverage.left)):
        found = [(n["name"], n["kind"], n["reason"], tuple(n["parts"])) for n in graph["nodes"] if n["role"] == role]
        assert found == [(o.name, o.kind, o.reason, o.parts) for o in operators]
    assert len({tuple(e.values()) for e in graph["edges"]}) == len(graph["edges"])
    read = {e["to"] for e in graph["edges"]}
    assert read == {i for i, n in enumerate(graph["nodes"]) if n["role"] != "input"}
    assert json.loads(json.dumps(graph)) == graph


def with_kept(program: FusedProgram, names: Collection[str], dtype: torch.dtype = torch.float16) -> fx.GraphModule:
    return converted(program.master, dtype, lambda node: module_path(node) in names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_operators_compute_in_float32_and_no_others(dtype: torch.dtype, resnet8: Fused) -> None:
    """Of weights that are cast once; the program is left as it was."""
    kept, program = {"layer1.0.conv1", "layer1.0.conv2", "layer3.0.conv2", "fc"}, resnet8.program
    before = snapshot(program.master)
    graph = with_kept(program, kept, dtype)
    values, nodes = values_of(graph, resnet8.images.to(dtype)), {node.name: node for node in graph.graph.nodes}
    for node in operator_nodes(program.master):
        wanted = torch.float32 if module_path(node) in kept else dtype
        assert values[node.name].dtype == wanted, node.name
        master, weight = constant(program.master, node.args[1]), constant(graph, nodes[node.name].args[1])
        assert master is not None and weight is not None and master.dtype == torch.float64
        assert weight.dtype == wanted and torch.equal(weight, master.to(wanted)), node.name
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)
    assert snapshot(program.master) == before


def test_a_cast_lies_only_where_the_type_changes(resnet8: Fused) -> None:
    """Two convolutions in a row: into the first, and out of the second for both that read it."""
    everything = {module_path(node) for node in operator_nodes(resnet8.program.master)}  # but the input
    for kept, count in ({"layer1.0.conv1", "layer1.0.conv2"}, 2), ({"fc"}, 1), (everything, 1), (set(), 0):
        nodes = with_kept(resnet8.program, kept).graph.nodes
        assert sum(is_call(node, aten._to_copy.default) for node in nodes) == count


def test_of_a_shared_weight_only_one_reader_is_kept() -> None:
    """Two convolutions of one weight; what is between keeps them apart."""
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    tied = Called(lambda x, m: m.second(torch.relu(m.first(x))), first=first, second=second)
    graph = with_kept(fuse(tied.eval(), torch.zeros(1, 3, 8, 8), BATCH), {"second"})
    weights = {module_path(n): constant(graph, n.args[1]) for n in operator_nodes(graph) if n.args[1:]}
    types = {name: weight.dtype for name, weight in weights.items() if weight is not None}
    assert types["first"] == torch.float16 and types["second"] == torch.float32


def test_a_weight_outside_the_range_names_its_layer_and_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 1] = 1e5
    program = fuse(model, torch.zeros(1, 3, 8, 8), BATCH)
    message = (
        r"^2: .*weight reaches 1e\+05: expected at most 6\.55e\+04, .*; "
        r"ExportConfig\.keep_fp32=\('2',\) leaves the layer in float32$"
    )
    with pytest.raises(ExportError, match=message):
        program.at(PRECISIONS["fp16"])
    with_kept(program, {"2"})
    converted(program.master, torch.bfloat16)
