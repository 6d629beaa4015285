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
from export.fusion.program import FusedProgram, fuse, output_names
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
    "a weight in another shape": lambda x, m: F.prelu(m.first(x), m.first.bias),
    "an operator that is not fused": lambda x, m: m.first(x).exp(),
    "the same layer twice": lambda x, m: m.second(m.second(m.first(x))),
    "the same call twice": lambda x, m: m.first(x) + m.grouped(m.first(x)),
    "an output twice": lambda x, m: (y := m.first(x), y),
    "the input returned": lambda x, m: (m.first(x), x),
    "a bias of zeros": lambda x, m: m.unbiased(x),
    "two biases alike": lambda x, m: m.alike(m.first(x)),
}


def filled(model: nn.Module) -> nn.Module:
    """In eval mode, with weights none of which is left out for being zero."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if "bias" in name or "running" in name:
            value.copy_(0.1 + torch.rand(value.shape, generator=generator))
    return model.eval()


def is_ours(program: FusedProgram, precision: str, patch: pytest.MonkeyPatch) -> bool:
    """Whether the file is written without the exporter; AssertionError where that makes a difference."""
    p = PRECISIONS[precision]
    graph_module = program.at(p)
    if written(graph_module, program.inputs, program.batch, p, output_names(graph_module)) is None:
        return False
    ours = lower_onnx(program, p, {"key": "value"})
    patch.setattr(onnx_file, "written", lambda *arguments: None)
    theirs = lower_onnx(program, p, {"key": "value"})
    assert ours.serialize() == theirs.serialize() and ours.values == theirs.values
    return True


@pytest.mark.parametrize("network", [lambda: create_model("resnet8"), lambda: ResNet(Bottleneck, (2, 1, 1, 1), 7, 3)])
def test_every_fused_operator(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    program = fuse(filled(network()), torch.zeros(1, 3, 32, 32), Batch(1, 8, 32))
    for precision in PRECISIONS:
        with monkeypatch.context() as patch:
            assert is_ours(program, precision, patch)


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_what_is_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = {
        "first": nn.Conv2d(3, 4, 3),
        "second": nn.Conv2d(4, 4, 1),
        "grouped": nn.Conv2d(4, 4, 3, 1, 1, groups=2),
        "unbiased": nn.Conv2d(3, 4, 3, bias=False),
        "alike": nn.Conv2d(4, 4, 1),
    }
    model = filled(Called({**OURS, **OTHERS}[name], **layers))
    model.load_state_dict(
        {k.replace("first.bias", "alike.bias"): v for k, v in model.state_dict().items() if "first.bias" in k},
        strict=False,
    )
    batch = Batch(4, 4, 4) if name == "gates" else Batch(2, 4, 9)
    program = fuse(model, torch.zeros(1, 3, 8, 8), batch)
    assert is_ours(program, "fp16", monkeypatch) == (name in OURS)
