"""The residual addition taken out of convolutions: the same network, with both summands in view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from export import fuse
from export.fusion.nodes import (
    aten,
    is_call,
    module_path,
    moves_data,
    named_args,
    resnet_deploy,
    schema_name,
    source_name,
)
from export.quantisation.split_addition import split_addition
from tests.export import networks
from tests.export.networks import BATCH, Called, Fused, snapshot, values_of
from tests.export.quantised import name_of

CONV = resnet_deploy.conv2d_bias_act.default


def without_relu() -> nn.Module:
    """Convolutions that are added with no ReLU behind them; one is dilated, so that they stay two."""
    one = nn.Conv2d(3, 8, 3, padding=2, dilation=2)
    return Called(lambda x, m: m.one(x) + m.other(x), one=one, other=nn.Conv2d(3, 8, 1))


@pytest.fixture(scope="module", params=["basic", "resnet8", without_relu, networks.backbone], ids=name_of)
def network(request: pytest.FixtureRequest, fused: Mapping[Any, Fused]) -> tuple[fx.GraphModule, Tensor]:
    """A graph of level b, and inputs."""
    subject = fused[request.param]
    return fuse(subject.model, subject.images, BATCH, "b").master, subject.images[:2].double()


def values(graph_module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What the nodes compute, by `source_name`: no two of one name, but where a value is only moved."""
    computed, found = values_of(graph_module, x), dict[str, Tensor]()
    for node in graph_module.graph.nodes:
        name = source_name(node)
        if node.name in computed and name is not None:
            assert name not in found or moves_data(node)
            found[name] = computed[node.name]
    return found


def residuals(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if is_call(n, CONV) and named_args(n)["residual"] is not None]


def test_every_value_is_the_same(network: tuple[fx.GraphModule, Tensor]) -> None:
    master, x = network
    before, after = values(master, x), values(split_addition(master), x)
    assert before.keys() < after.keys()
    for name, value in before.items():
        assert (after[name] - value).abs().max() <= networks.EXACT * value.abs().max(), name


def test_no_convolution_adds_any_more(network: tuple[fx.GraphModule, Tensor]) -> None:
    master, _ = network
    split = split_addition(master)
    count = len(residuals(master))
    assert count > 0 and not residuals(split)
    fused = [n for n in split.graph.nodes if is_call(n, CONV)]
    assert len(fused) == sum(is_call(n, CONV) for n in master.graph.nodes)
    already, kinds = (Counter(n.target for n in graph_module.graph.nodes) for graph_module in (master, split))
    assert kinds[aten.add.Tensor] - already[aten.add.Tensor] == count
    rectified = sum(named_args(n)["relu"] for n in residuals(master))
    assert kinds[aten.relu.default] - already[aten.relu.default] == rectified


def test_names_stay_with_the_values(network: tuple[fx.GraphModule, Tensor]) -> None:
    """The last node of three has the name of the one it replaces; the convolution that of its own value."""
    master, _ = network
    split = split_addition(master)
    names = {str(source_name(n)): n for n in split.graph.nodes if source_name(n) is not None}
    for node in residuals(master):
        last = names[str(source_name(node))]
        assert is_call(last, aten.relu.default if named_args(node)["relu"] else aten.add.Tensor)
        assert module_path(last) == module_path(node)
        summand = names[str(node.meta["summand"])]
        assert is_call(summand, CONV) and module_path(summand) == module_path(node)
        assert not named_args(summand)["relu"]


def test_the_summand_is_what_the_captured_network_computes(resnet8: Fused) -> None:
    """Behind BatchNorm, before the addition: by that name its range is looked up."""
    program = fuse(resnet8.model, resnet8.images, BATCH, "b")
    x = resnet8.images[:2].double()
    split, folded = values(split_addition(program.master), x), values(program.folded, x)
    summands = [str(node.meta["summand"]) for node in residuals(program.master)]
    assert len(summands) == 3
    for name in summands:
        assert (split[name] - folded[name]).norm() <= networks.EXACT * folded[name].norm(), name


def test_the_graph_is_left_as_it_was(network: tuple[fx.GraphModule, Tensor]) -> None:
    """And one without residuals stays what it is."""
    master, _ = network
    before = snapshot(master)
    split = split_addition(master)
    assert snapshot(master) == before
    assert str(split_addition(split).graph) == str(split.graph)


ACTS: dict[str, nn.Module] = {
    "hardtanh": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(0.2), "prelu": nn.PReLU(3), "silu": nn.SiLU(),
    "gelu": nn.GELU("tanh"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTS)
def test_an_activation_stays_behind_the_sum(kind: str, resnet8: Fused) -> None:
    model = Called(lambda x, m: m.act(m.conv(x.relu()) + x), conv=nn.Conv2d(3, 3, 3, padding=1), act=ACTS[kind])
    master, x = fuse(model.eval(), resnet8.images, BATCH, "b").master, resnet8.images[:2].double()
    split = split_addition(master)
    assert len(residuals(master)) == 1 and not residuals(split)
    assert [schema_name(n) for n in split.graph.nodes][-3:] == ["add", kind, ""]
    assert torch.allclose(split(x), master(x), rtol=0, atol=1e-14)
