"""Small networks in the styles users write, none of them this project's own, and what is asked of them once fused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export import Batch, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.operators import check_operators
from export.criteria.references import run_oracle, run_rounded
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import moves_data, schema_name
from export.fusion.program import output_names
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.runtime.parity.ladder import References, execute, judge
from export.runtime.parity.rungs import Rung
from export.runtime.runner import Runner
from tests.captured import captured_once
from tests.conftest import Made

BATCH = Batch(1, 4, 8)
EXACT = 2.0**-40  # relative: float64 sums of thousands of products, in any order


class Called(nn.Module):
    """What `call` makes of the input and of the modules, parameters and buffers it is given by name."""

    def __init__(self, call: Callable[[Tensor, Any], object], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> object:
        return self.call(x, self)


def functional() -> nn.Module:
    """Convolutions and BatchNorm by function call, in-place ReLU and `+=`."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = F.relu_(F.batch_norm(F.conv2d(x, m.weight, padding=1), m.mean, m.var))
        y = m.conv(x)
        y += x
        return m.fc(F.relu(y).mean((2, 3)))

    weight, mean, var = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.3), torch.randn(8) * 0.2, torch.rand(8) + 0.5
    return Called(call, weight=weight, mean=mean, var=var, conv=nn.Conv2d(8, 8, 3, padding=1), fc=nn.Linear(8, 5))


def squeeze_excite() -> nn.Module:
    """A residual block whose branch is weighted by a gate, behind a GroupNorm."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.conv(x))
        return m.fc(torch.relu(y * m.gate(y) + x).mean((2, 3)))

    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    conv, norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16)
    squeeze, excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())
    return Called(call, stem=stem, conv=conv, norm=norm, gate=gate, fc=nn.Linear(16, 5))


def two_heads() -> nn.Module:
    """Returns a dictionary: class scores and a feature map."""

    def call(x: Tensor, m: Any) -> dict[str, Tensor]:
        y = F.relu(m.bn(m.conv(x)))
        return {"scores": m.head(y.mean((2, 3))), "mask": m.mask(y)}

    conv, bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    return Called(call, conv=conv, bn=bn, head=nn.Linear(8, 5), mask=nn.Conv2d(8, 2, 1))


def shared_conv() -> nn.Module:
    """One convolution with two BatchNorms, a pair called twice, and an output with two readers."""

    def call(x: Tensor, m: Any) -> Tensor:
        shared = m.conv(m.stem(x))
        y = F.relu(m.bn_a(shared)) + m.bn_b(shared)
        y = F.relu(m.bn_a(m.conv(y)))
        return m.fc(F.relu(m.bn_a(m.conv(y))).mean((2, 3)))

    stem, conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    return Called(call, stem=stem, conv=conv, bn_a=nn.BatchNorm2d(8), bn_b=nn.BatchNorm2d(8), fc=nn.Linear(8, 5))


def oddments() -> nn.Module:
    """Groups, dilation, 'same' padding, BatchNorm without affine or behind a pool, Dropout and Identity."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = torch.relu(m.bn1(m.conv1(x)))
        x = m.bn3(m.rest(torch.relu(m.bn2(m.conv2(x)))))
        return m.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    conv1, bn1 = nn.Conv2d(3, 8, 5, padding="same", dilation=2), nn.BatchNorm2d(8, affine=False)
    conv2, bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
    rest, bn3 = nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.AvgPool2d(2)), nn.BatchNorm2d(8)
    return Called(call, conv1=conv1, bn1=bn1, conv2=conv2, bn2=bn2, rest=rest, bn3=bn3, fc=nn.Linear(8, 5))


def parametrized() -> nn.Module:
    """Weight normalisation: the weight is computed from two parameters."""
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
    bn, fc = nn.BatchNorm2d(8), nn.Linear(8, 5)
    return Called(lambda x, m: m.fc(F.relu(m.bn(m.conv(x))).mean((2, 3))), conv=conv, bn=bn, fc=fc)


def doubled() -> nn.Module:
    """Adds a convolution to itself, and to something that is broadcast."""

    def call(x: Tensor, m: Any) -> Tensor:
        y = m.conv(x)
        return m.fc((y + y + torch.add(m.conv(x) + m.offset, y, alpha=0.5)).mean((2, 3)))

    return Called(call, conv=nn.Conv2d(3, 8, 1), offset=nn.Parameter(torch.randn(8, 1, 1)), fc=nn.Linear(8, 5))


def casts() -> nn.Module:
    """Has a cast of its own and flattens feature maps, whose layout then matters."""

    def call(x: Tensor, m: Any) -> Tensor:
        return m.fc(torch.flatten(F.relu(m.bn(m.conv(x * (x > 0).to(x.dtype)))), 1))

    return Called(call, conv=nn.Conv2d(3, 8, 3, 2, 1), bn=nn.BatchNorm2d(8), fc=nn.Linear(8 * 16 * 16, 5))


class UserBottleneck(nn.Module):
    """A bottleneck as people write it: the shortcut on the left of the sum, dilation instead of stride."""

    def __init__(self, channels: int, width: int, out: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, groups=groups)
        self.expand = nn.Conv2d(width, out, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(out)
        self.project = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv(self.reduce(x))), inplace=True)
        return F.relu(self.project(x) + self.bn2(self.expand(y)))


def backbone() -> nn.Module:
    """Stem with max-pool, bottlenecks dilated and grouped, a head with dropout, and log-probabilities."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    first, second = UserBottleneck(8, 4, 16), UserBottleneck(16, 4, 16, dilation=2)
    blocks = nn.Sequential(first, second, UserBottleneck(16, 8, 24, groups=4))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 5, bias=False))
    parts = {"stem": stem, "pool": nn.MaxPool2d(3, 2, 1), "blocks": blocks, "head": head}
    return Called(lambda x, m: F.log_softmax(m.head(m.blocks(m.pool(m.stem(x)))), 1), **parts)


def detector() -> nn.Module:
    """Two heads on one pooled tensor, a projection that is also returned, and a pool of another kind."""

    def call(x: Tensor, m: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = m.pool(F.relu(m.conv1(x)))
        identity = m.project(x)
        pooled = F.relu(m.conv2(x) + identity).mean((2, 3))
        return m.classes(pooled), m.box(pooled), identity

    conv1, conv2, project = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)
    heads = {"classes": nn.Linear(12, 5), "box": nn.Linear(12, 4)}
    return Called(call, conv1=conv1, pool=nn.MaxPool2d(2), conv2=conv2, project=project, **heads)


def pools_the_input() -> nn.Module:
    """A max-pool before any layer, two in a row behind one, and a linear layer without a bias."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = F.max_pool2d(F.max_pool2d(m.conv(F.max_pool2d(x, 2)), 3, 2, 1), 2)
        return m.fc(x.mean((2, 3)))

    return Called(call, conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 5, bias=False))


Network = Callable[[], nn.Module]
LAYERS: dict[Network, int] = {  # that quantisation finds in each network
    backbone: 13, casts: 2, detector: 5, doubled: 3, functional: 3, oddments: 3, pools_the_input: 2, shared_conv: 5,
    squeeze_excite: 5, two_heads: 3,
}  # fmt: skip
ALL = [*LAYERS, parametrized]


@dataclass(frozen=True)
class Fused:
    """A network, inputs that it was made for, and the network fused; by precision its references and its file."""

    model: nn.Module
    images: Tensor
    batch: Batch = BATCH

    @cached_property
    def program(self) -> FusedProgram:
        with captured_once():
            return fuse(self.model, self.images, self.batch)

    @cached_property
    def references(self) -> Mapping[str, References]:
        oracle = run_oracle(
            self.model, self.program, output_names(self.program.graph_module), {"input": self.images.numpy()}
        )
        return Made(lambda precision: run_rounded(oracle, self.model, self.program, PRECISIONS[precision]))

    @cached_property
    def files(self) -> Mapping[str, OnnxFile]:
        metadata = {"made": "by tests"}
        return Made(lambda precision: lower_onnx(self.program, PRECISIONS[precision], metadata))


def make(network: Network, images: Tensor) -> nn.Module:
    """An instance with seeded weights and BatchNorm statistics of `images`, in eval mode."""
    torch.manual_seed(0)
    model = network()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.6, 1.4)
                module.bias.normal_(0, 0.3)
        for _ in range(3):
            model.train()(images)
    return model.eval()


def fuse_exactly(model: nn.Module, images: Tensor, batch: Batch = BATCH) -> FusedProgram:
    """`model` once fused; asserts that it computes the same."""
    program = fuse(model.eval(), images, batch)
    assert_exact(program, model, images)
    return program


def kinds(program: FusedProgram) -> list[str]:
    """Of its operators, in order."""
    calls = [node for node in program.master.graph.nodes if node.op == "call_function" and not moves_data(node)]
    return [schema_name(node) for node in calls]


def assert_exact(program: FusedProgram, model: nn.Module, images: Tensor) -> None:
    """In float64 the fused graph is the model."""
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        got = program.master(images.double())
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for y, y64 in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert y.shape == y64.shape and (y - y64).norm() <= EXACT * y64.norm()


def values_of(graph_module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What each node of a graph computes."""
    interpreter = GraphInterpreter(graph_module, {})
    interpreter.values = {}
    with torch.no_grad():
        interpreter.run(x)
    return interpreter.values


def snapshot(graph_module: fx.GraphModule) -> tuple[object, ...]:
    """All of a graph that a pass could change, to be compared."""
    tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    meta = [dict(node.meta) for node in graph_module.graph.nodes]
    return str(graph_module.graph), meta, [(name, tensor.tolist()) for name, tensor in tensors]


def judged(runner: Runner, network: Fused, program: FusedProgram, precision: str) -> Rung:
    """What the export says of a form of a network: each operator by its rounding, the outputs by the eager model's."""
    p = PRECISIONS[precision]
    execution = execute(runner, {"input": network.images.numpy().copy()}, program.batch)
    operators = check_operators(program, p, execution.trace, runner.name == "onnx")
    return judge(execution, network.references[precision], p, p.network_factor, operators)


def reason(program: FusedProgram, kind: str) -> str:
    """Why the operator of this kind was left as it was."""
    (left,) = (operator for operator in program.coverage.left if operator.kind == kind)
    return left.reason
