"""Files of graphs in which all is ours are those that torch.onnx.export writes, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.base.batch import Batch
from export.base.precision import PRECISIONS
from export.fusion.program import fuse
from export.lowering import onnx_file
from export.lowering.onnx_file import lower_onnx
from export.lowering.onnx_writer import written
from resnet.models import Bottleneck, ResNet, create_model
from tests.export.networks import Called

Forward = Callable[[Tensor, Any], object]
OURS: dict[str, Forward] = {
    "activations": lambda x, m: F.hardswish(m.grouped(F.silu(m.second(F.leaky_relu(m.first(x), 0.2))))),
    "gates": lambda x, m: F.hardsigmoid(m.second(torch.sigmoid(m.first(x)))),
    "several outputs": lambda x, m: {"one": (y := F.relu(m.first(x))), "two": m.second(y)},
}
OTHERS: dict[str, Forward] = {
    "a constant in the activation": lambda x, m: F.relu6(m.first(x)),
    "an operator that is not fused": lambda x, m: m.first(x).exp(),
    "the same layer twice": lambda x, m: m.second(m.second(m.first(x))),
    "the same call twice": lambda x, m: m.first(x) + m.grouped(m.first(x)),
    "an output twice": lambda x, m: (y := m.first(x), y),
    "the input returned": lambda x, m: (m.first(x), x),
    "a bias of zeros": lambda x, m: m.unbiased(x),
}


def filled(model: nn.Module) -> nn.Module:
    """In eval mode, with weights none of which is left out for being zero."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if "bias" in name or "running" in name:
            value.copy_(0.1 + torch.rand(value.shape, generator=generator))
    return model.eval()


def both_ways(model: nn.Module, size: int, precision: str, batch: Batch, patch: pytest.MonkeyPatch) -> bool:
    """Whether the file was written without the exporter; AssertionError where that makes a difference."""
    found = []

    def watched(*arguments: Any) -> Any:
        found.append(written(*arguments))
        return found[-1]

    program = fuse(model, torch.zeros(1, 3, size, size), batch)
    patch.setattr(onnx_file, "written", watched)
    ours = lower_onnx(program, PRECISIONS[precision], {"key": "value"})
    patch.setattr(onnx_file, "written", lambda *arguments: None)
    theirs = lower_onnx(program, PRECISIONS[precision], {"key": "value"})
    assert ours.serialize() == theirs.serialize() and ours.values == theirs.values
    return found[0] is not None


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", [lambda: create_model("resnet8"), lambda: ResNet(Bottleneck, (2, 1, 1, 1), 7, 3)])
def test_networks(network: Callable[[], nn.Module], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fused operator, in every precision."""
    torch.manual_seed(0)
    assert both_ways(filled(network()), 32, precision, Batch(1, 8, 32), monkeypatch)


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_what_is_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = {
        "first": nn.Conv2d(3, 4, 3),
        "second": nn.Conv2d(4, 4, 1),
        "grouped": nn.Conv2d(4, 4, 3, 1, 1, groups=2),
        "unbiased": nn.Conv2d(3, 4, 3, bias=False),
    }
    model = filled(Called({**OURS, **OTHERS}[name], **layers))
    batch = Batch(4, 4, 4) if name == "gates" else Batch(2, 4, 9)
    assert both_ways(model, 8, "fp16", batch, monkeypatch) == (name in OURS)
