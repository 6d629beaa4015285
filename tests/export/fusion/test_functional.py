"""A captured graph without in-place operators: with no second trace, what torch.export's own way makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from export.base.batch import DEFAULT_BATCH
from export.base.errors import ExportError
from export.fusion import capture as capturing
from export.fusion.capture import capture
from export.fusion.functional import made_functional
from export.fusion.nodes import aten, is_call
from resnet.models import create_model
from tests.export.networks import Called
from tests.export.zoo import ZOO

Forward = Callable[[Tensor, Any], object]
ALONE: dict[str, Forward] = {  # what is made functional without another trace
    "gelu": lambda y, m: F.gelu(y, approximate="tanh"),
    "activations": lambda y, m: F.hardswish(F.hardsigmoid(F.leaky_relu(F.relu6(y), 0.2))) * torch.sigmoid(F.silu(y)),
    "prelu, pools": lambda y, m: F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(m.prelu(y), 2, 1), 3, 2, 1), 1),
    "in place": lambda y, m: F.hardtanh_(F.hardswish(F.silu(F.leaky_relu_(y.sigmoid_()), True), True).mul_(2), 0, 1),
    "read before and after": lambda y, m: (z := torch.cat([y, y * 2]), F.relu_(y), y.add_(y, alpha=2), z)[1:],
    "returned": lambda y, m: (y, F.relu_(y)),
    "flattened": lambda y, m: F.dropout(y.flatten(2), training=False).mean(2),
}
WITH_A_TRACE: dict[str, Forward] = {  # what shares memory with what is changed in place, or is not known
    "a view of it": lambda y, m: (v := y.flatten(1), F.relu_(y), v)[2],
    "it is a view": lambda y, m: (F.relu_(y.flatten(1)), y)[1],
    "a dropout of it": lambda y, m: (v := F.dropout(y, training=False), F.relu_(y), v)[2],
    "another type": lambda y, m: y.add_(torch.ones(4, 1, 1, dtype=torch.int32)),
    "another layout": lambda y, m: y.contiguous(memory_format=torch.channels_last).flatten(1),
    "unknown": lambda y, m: F.relu_(y).permute(0, 2, 3, 1),
    "statistics of the batch": lambda y, m: F.batch_norm(y, None, None, training=True),
}


def listing(graph_module: fx.GraphModule) -> list[tuple[str, ...]]:
    """Each call with its arguments by their place, its shape and the modules it comes from.

    Without clones, which a dropout is in eval mode, and from PyTorch 2.14 on is not.
    """
    names: dict[fx.Node, str] = {}
    lines: list[tuple[str, ...]] = []
    for node in graph_module.graph.nodes:
        names[node] = str(node.target) if node.op != "call_function" else f"%{len(lines)}"
        if is_call(node, aten.clone.default):
            names[node] = names[node.all_input_nodes[0]]
        if node.op == "get_attr" or is_call(node, aten.clone.default):
            continue
        said = fx.node.map_arg((node.args, node.kwargs), lambda n: names[n])
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        shape = getattr(node.meta.get("val"), "shape", ())
        lines.append((str(node.target), str(said), str(shape), " ".join(stack)))
    return lines


def both_ways(model: nn.Module, size: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether no trace was needed; AssertionError where that makes a difference."""
    found: list[bool] = []
    example, real = torch.zeros(1, 3, size, size), made_functional

    def watched(graph_module: fx.GraphModule) -> bool:
        found.append(real(graph_module))
        return found[-1]

    monkeypatch.setattr(capturing, "made_functional", watched)
    graph = capture(model.eval(), example, DEFAULT_BATCH)
    if found != [True]:
        return False
    monkeypatch.setattr(capturing, "made_functional", lambda graph: False)
    assert listing(graph) == listing(capture(model, example, DEFAULT_BATCH))
    return True


@pytest.mark.parametrize("name", [*ALONE, *WITH_A_TRACE])
def test_what_forward_changes_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = {**ALONE, **WITH_A_TRACE}[name]
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "prelu": nn.PReLU(4)}
    model = Called(lambda x, m: forward(m.norm(m.conv(x)), m), **layers)
    assert both_ways(model, 8, monkeypatch) == (name in ALONE)


@pytest.mark.parametrize("name", ["resnet8", "repvgg", "mobilenet_v2", "densenet", "hrnet"])
def test_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZOO[name]() if name in ZOO else create_model(name)
    assert both_ways(model, 32, monkeypatch) == (name != "hrnet")


def test_an_input_that_is_changed_is_refused() -> None:
    with pytest.raises(ExportError, match="changes its input in place"):
        capture(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)).eval(), torch.zeros(1, 3, 8, 8), DEFAULT_BATCH)
