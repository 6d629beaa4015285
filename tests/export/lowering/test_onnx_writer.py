"""Files of graphs that we know all operators of are those that torch.onnx.export writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.base.batch import Batch
from export.base.precision import PRECISIONS, Precision
from export.fusion.program import FusedProgram, fuse, output_names
from export.lowering import onnx_file
from export.lowering.onnx_file import lower_onnx
from export.lowering.onnx_writer import written
from export.quantisation.scheme import Scheme
from resnet.models import Bottleneck, ResNet, create_model
from tests.export import networks
from tests.export import quantised as q8
from tests.export.networks import Called

Forward = Callable[[Tensor, Any], object]


def of_means(x: Tensor, m: Any, layer: str) -> Tensor:
    return F.linear(x.mean((2, 3)), m.matrix, getattr(m, layer).bias)


OURS: dict[str, Forward] = {
    "activations": lambda x, m: F.hardswish(m.grouped(F.silu(m.second(F.leaky_relu(m.first(x), 0.2))))),
    "gates": lambda x, m: F.hardsigmoid(m.second(torch.sigmoid(m.first(x)))),
    "several outputs": lambda x, m: {"one": (y := F.relu(m.first(x))), "two": m.second(y)},
    "the same layer twice": lambda x, m: m.second(m.second(m.first(x))),
    "two biases alike": lambda x, m: m.alike(m.first(x)),
    "shared weights": lambda x, m: m.tied(F.relu(m.second(m.first(x)))),
    "a pool of maxima": lambda x, m: m.second(F.max_pool2d(m.first(x), (3, 2), (2, 1), (1, 0), 1)),
}
RENUMBERED: dict[str, Forward] = {
    "flat means": lambda x, m: m.first(x).mean((2, 3), True).flatten(1),
    "a mean": lambda x, m: m.first(x).mean((1, 3)),
    "a sum of a constant": lambda x, m: m.shift + F.max_pool2d(m.first(x), 2),
    "a sum and its relu": lambda x, m: F.relu(F.max_pool2d(y := m.first(x), 3, 1, 1) + F.max_pool2d(y, 1)),
    "a product of the means": lambda x, m: F.linear(m.first(x).mean((2, 3), True).flatten(1), m.matrix, m.first.bias),
}
OTHERS: dict[str, Forward] = {
    "a constant in the activation": lambda x, m: F.relu6(m.first(x)),
    "a weight in another shape": lambda x, m: F.prelu(m.first(x), m.first.bias),
    "an operator that is not fused": lambda x, m: m.first(x).exp(),
    "the same call twice": lambda x, m: m.first(x) + m.grouped(m.first(x)),
    "an output twice": lambda x, m: (y := m.first(x), y),
    "the input returned": lambda x, m: (m.first(x), x),
    "the same mean twice": lambda x, m: (of_means(y := m.first(x), m, "first"), of_means(y, m, "second")),
    "a bias of zeros": lambda x, m: m.unbiased(x),
    "a pool that rounds up": lambda x, m: F.max_pool2d(m.first(x), 3, 2, ceil_mode=True),
    "a sum of a number": lambda x, m: F.max_pool2d(m.first(x), 2) + 2.0,
    "a sum of parts": lambda x, m: torch.add(F.max_pool2d(y := m.first(x), 1), F.max_pool2d(y, 3, 1, 1), alpha=0.5),
    "a relu of its own": lambda x, m: F.relu(F.max_pool2d(m.first(x), 2)),
    "a sum of whole numbers": lambda x, m: F.max_pool2d(m.first(x), 2) + m.whole,
    "means in a square": lambda x, m: m.first(x).mean((2, 3), True).reshape(-1, 2, 2),
    "the same shape": lambda x, m: m.first(x).mean((2, 3)).reshape(-1, 4),
    "another shape": lambda x, m: m.first(x).flatten(1),
    "a product of maps": lambda x, m: F.linear(m.first(x), m.wide, m.unbiased.weight[:, 0, 0, 0]),
    "a product without a bias": lambda x, m: F.linear(of_means(m.first(x), m, "first"), m.matrix),
}
UNNAMED = re.compile(r"(node_)?(val|add|view|reshape)(_\d+)?")


def filled(model: nn.Module) -> nn.Module:
    """In eval mode, with weights none of which is left out for being zero."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if "bias" in name or "running" in name:
            value.copy_(0.1 + torch.rand(value.shape, generator=generator))
    return model.eval()


def is_ours(program: FusedProgram, p: Precision, patch: pytest.MonkeyPatch, renumbered: bool = False) -> bool:
    """Whether the file is written without the exporter; AssertionError where that makes a difference."""
    graph_module = program.at(p)
    if written(graph_module, program.inputs, program.batch, p, output_names(graph_module)) is None:
        return False
    ours = lower_onnx(program, p, {"key": "value"})
    patch.setattr(onnx_file, "written", lambda *arguments: None)
    theirs = lower_onnx(program, p, {"key": "value"})
    names = ours_of_theirs(ours.model, theirs.model) if renumbered else {}
    for message in messages(theirs.model):
        message.name = names.get(message.name, message.name)
    for node in theirs.model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    assert ours.serialize() == theirs.serialize()
    assert ours.values == {node: names.get(value, value) for node, value in theirs.values.items()}
    return True


def messages(model: onnx.ModelProto) -> Iterator[Any]:
    for named in (model.graph.node, model.graph.initializer, model.graph.value_info):
        yield from named


def ours_of_theirs(ours: onnx.ModelProto, theirs: onnx.ModelProto) -> dict[str, str]:
    """What we call the nodes and values that the exporter has numbered, by its names for them."""
    names: dict[str, str] = {}
    for a, b in zip(ours.graph.node, theirs.graph.node, strict=True):
        for mine, other in zip([a.name, *a.input, *a.output], [b.name, *b.input, *b.output], strict=True):
            assert names.setdefault(other, mine) == mine
            assert mine == other or (UNNAMED.fullmatch(mine) and UNNAMED.fullmatch(other))
    return names


@pytest.mark.parametrize("network", [lambda: create_model("resnet8"), lambda: ResNet(Bottleneck, (2, 1, 1, 1), 7, 3)])
def test_every_fused_operator(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    program = fuse(filled(network()), torch.zeros(1, 3, 32, 32), Batch(1, 8, 32))
    for precision in PRECISIONS:
        with monkeypatch.context() as patch:
            assert is_ours(program, PRECISIONS[precision], patch)


@pytest.mark.parametrize("network", [networks.detector, networks.functional])
def test_in_8_bits(
    in_8_bits: Mapping[Any, q8.Subject], network: Any, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_ours(in_8_bits[network].quantised[scheme], scheme.arithmetic, monkeypatch, renumbered=True)


def test_residual_network_of_one_size_in_8_bits(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    subject = q8.quantised(filled(create_model("resnet8")), torch.randn(4, 3, 32, 32), Batch(4, 4, 4))
    assert is_ours(subject.quantised[scheme], scheme.arithmetic, monkeypatch, renumbered=True)


def test_weights_in_8_bits_that_two_layers_read(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = filled(Called(lambda x, m: m.layer(m.layer(x)), layer=nn.Conv2d(3, 3, 1)))
    subject = q8.quantised(model, torch.randn(4, 3, 8, 8))
    assert not is_ours(subject.quantised[scheme], scheme.arithmetic, monkeypatch)


@pytest.mark.parametrize("name", [*OURS, *RENUMBERED, *OTHERS])
def test_what_is_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers: dict[str, Any] = {
        "first": nn.Conv2d(3, 4, 3),
        "second": nn.Conv2d(4, 4, 1),
        "grouped": nn.Conv2d(4, 4, 3, 1, 1, groups=2),
        "unbiased": nn.Conv2d(3, 4, 3, bias=False),
        "alike": nn.Conv2d(4, 4, 1),
        "tied": nn.Conv2d(4, 4, 1),
        "shift": torch.rand(4, 1, 1),
        "whole": torch.ones(4, 1, 1, dtype=torch.int32),
        "matrix": nn.Parameter(torch.randn(4, 4)),
        "wide": nn.Parameter(torch.randn(4, 6)),
    }
    layers["tied"].weight = layers["second"].weight
    model = filled(Called({**OURS, **RENUMBERED, **OTHERS}[name], **layers))
    model.load_state_dict(
        {k.replace("first.bias", "alike.bias"): v for k, v in model.state_dict().items() if "first.bias" in k},
        strict=False,
    )
    batch = Batch(4, 4, 4) if name == "gates" else Batch(2, 4, 9)
    program = fuse(model, torch.zeros(1, 3, 8, 8), batch)
    for precision in ("fp32", "fp16"):
        with monkeypatch.context() as patch:
            ours = is_ours(program, PRECISIONS[precision], patch, renumbered=name in RENUMBERED)
            assert ours == (name not in OTHERS)
