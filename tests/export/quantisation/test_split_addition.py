"""The residual addition taken out of convolutions: the same network, with both summands in view."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from export import Batch, fuse
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import aten, is_call, module_path, moves_data, named_args, resnet_deploy, source_name
from export.quantisation.split_addition import split_addition
from tests.export import networks

CONV = resnet_deploy.conv2d_bias_act.default
BATCH = Batch(1, 4, 8)


class Linear(nn.Module):
    """Convolutions that are added with no ReLU behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


@pytest.fixture(scope="module", params=["resnet18", "resnet20", "without-relu", "backbone"])
def network(
    request: pytest.FixtureRequest, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> tuple[fx.GraphModule, Tensor]:
    """A graph of level b, and inputs."""
    torch.manual_seed(0)
    images = pictures[request.param if request.param in pictures else "resnet20"]
    made: dict[str, Callable[[], nn.Module]] = {
        "without-relu": Linear,
        "backbone": lambda: networks.make(networks.Backbone, images),
    }
    model = calibrated.get(request.param) or made[request.param]()
    return fuse(model.eval(), images, BATCH, "b").master, images[:2].double()


def values(graph_module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What the nodes compute, by `source_name`: no two of one name, but where a value is only moved."""
    interpreter = GraphInterpreter(graph_module, {})
    interpreter.values = {}
    with torch.no_grad():
        interpreter.run(x)
    found = {}
    for node in graph_module.graph.nodes:
        name = source_name(node)
        if node.name in interpreter.values and name is not None:
            assert name not in found or moves_data(node)
            found[name] = interpreter.values[node.name]
    return found


def residuals(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if is_call(n, CONV) and named_args(n)["residual"] is not None]


def test_every_value_is_the_same(network: tuple[fx.GraphModule, Tensor]) -> None:
    master, x = network
    before, after = values(master, x), values(split_addition(master), x)
    assert before.keys() < after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-12, atol=1e-12 * float(value.abs().max()))


def test_no_convolution_adds_any_more(network: tuple[fx.GraphModule, Tensor]) -> None:
    master, _ = network
    split = split_addition(master)
    count = len(residuals(master))
    assert count > 0 and not residuals(split)
    fused = [n for n in split.graph.nodes if is_call(n, CONV)]
    assert len(fused) == sum(is_call(n, CONV) for n in master.graph.nodes)
    kinds = [n.target for n in split.graph.nodes]
    already = [n.target for n in master.graph.nodes]
    assert kinds.count(aten.add.Tensor) - already.count(aten.add.Tensor) == count
    rectified = sum(named_args(n)["relu"] for n in residuals(master))
    assert kinds.count(aten.relu.default) - already.count(aten.relu.default) == rectified


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


def test_the_summand_is_what_the_captured_network_computes(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    """Behind BatchNorm, before the addition: by that name its range is looked up."""
    program = fuse(calibrated["resnet20"], pictures["resnet20"], BATCH, "b")
    x = pictures["resnet20"][:2].double()
    split, folded = values(split_addition(program.master), x), values(program.folded, x)
    summands = [str(node.meta["summand"]) for node in residuals(program.master)]
    assert len(summands) == 9
    for name in summands:
        torch.testing.assert_close(split[name], folded[name], rtol=1e-9, atol=1e-9)


def test_the_graph_is_left_as_it_was(network: tuple[fx.GraphModule, Tensor]) -> None:
    master, _ = network
    code = str(master.graph)
    meta = [dict(node.meta) for node in master.graph.nodes]
    split_addition(master)
    assert str(master.graph) == code and [dict(node.meta) for node in master.graph.nodes] == meta


def test_a_graph_without_residuals_stays_what_it_is(network: tuple[fx.GraphModule, Tensor]) -> None:
    split = split_addition(network[0])
    assert str(split_addition(split).graph) == str(split.graph)
