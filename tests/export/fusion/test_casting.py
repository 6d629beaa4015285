"""A graph in another type, whole or in part."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import fx, nn

from export import ExportError, fuse
from export.base.precision import PRECISIONS
from export.fusion.casting import converted
from export.fusion.nodes import aten, constant, is_call, module_path
from export.fusion.program import FusedProgram, operator_nodes
from tests.export.networks import BATCH, Called, Fused, snapshot, values_of


@pytest.fixture
def program(resnet8: Fused) -> FusedProgram:
    return resnet8.program


def with_kept(program: FusedProgram, names: Collection[str], dtype: torch.dtype = torch.float16) -> fx.GraphModule:
    return converted(program.master, dtype, lambda node: module_path(node) in names)


def casts(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if is_call(node, aten._to_copy.default)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_operators_compute_in_float32_and_no_others(dtype: torch.dtype, resnet8: Fused) -> None:
    kept, program = {"layer1.0.conv1", "layer1.0.conv2", "layer3.0.conv2", "fc"}, resnet8.program
    graph = with_kept(program, kept, dtype)
    values = values_of(graph, resnet8.images.to(dtype))
    for node in operator_nodes(program.master):
        wanted = torch.float32 if module_path(node) in kept else dtype
        assert values[node.name].dtype == wanted, node.name
    weights = {module_path(next(iter(n.users))): constant(graph, n) for n in graph.graph.nodes if n.op == "get_attr"}
    assert {name for name, weight in weights.items() if weight is not None and weight.dtype == torch.float32} == kept


def test_a_cast_lies_only_where_the_type_changes(program: FusedProgram) -> None:
    """Two convolutions in a row: into the first, and out of the second for both that read it."""
    assert len(casts(with_kept(program, {"layer1.0.conv1", "layer1.0.conv2"}))) == 2
    assert len(casts(with_kept(program, {"fc"}))) == 1
    everything = {module_path(node) for node in operator_nodes(program.master)}
    assert len(casts(with_kept(program, everything))) == 1  # of the input
    assert casts(with_kept(program, ())) == []


def test_kept_weights_are_cast_once(program: FusedProgram) -> None:
    node = next(node for node in operator_nodes(program.master) if module_path(node) == "layer1.0.conv1")
    master = constant(program.master, node.args[1])
    graph = with_kept(program, {"layer1.0.conv1"})
    kept = next(n for n in graph.graph.nodes if n.name == node.name)
    weight = constant(graph, kept.args[1])
    assert master is not None and weight is not None and master.dtype == torch.float64
    assert torch.equal(weight, master.float()) and weight.is_contiguous(memory_format=torch.channels_last)


def test_of_a_shared_weight_only_one_reader_is_kept() -> None:
    """Two convolutions of one weight; what is between keeps them apart."""
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    tied = Called(lambda x, m: m.second(torch.relu(m.first(x))), first=first, second=second)
    graph = with_kept(fuse(tied.eval(), torch.zeros(1, 3, 8, 8), BATCH), {"second"})
    weights = {module_path(n): constant(graph, n.args[1]) for n in operator_nodes(graph) if n.args[1:]}
    types = {name: weight.dtype for name, weight in weights.items() if weight is not None}
    assert types["first"] == torch.float16 and types["second"] == torch.float32


def test_the_master_is_left_as_it_was(program: FusedProgram) -> None:
    before = snapshot(program.master)
    with_kept(program, {"layer1.0.conv1", "fc"})
    assert snapshot(program.master) == before


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
