"""Small networks in the styles users write, none of them this project's own, and what is asked of them once fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from export import Batch, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.operators import check_operators
from export.criteria.references import run_references
from export.fusion.nodes import moves_data, schema_name
from export.fusion.program import output_names
from export.runtime.parity.ladder import References, execute, judge
from export.runtime.parity.rungs import Rung
from export.runtime.runner import Runner

BATCH = Batch(1, 4, 8)
EXACT = 2.0**-40  # relative: float64 sums of thousands of products, in any order


class Called(nn.Module):
    """What `call` makes of the input and of the modules and parameters it is given by name."""

    def __init__(self, call: Callable[[Tensor, Any], object], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.call(x, self)


class Functional(nn.Module):
    """Convolutions and BatchNorm by function call, in-place ReLU and `+=`."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.3)
        self.register_buffer("mean", torch.randn(8) * 0.2)
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(F.batch_norm(F.conv2d(x, self.weight, padding=1), self.mean, self.var))
        y = self.conv(x)
        y += x
        return self.fc(F.relu(y).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """A residual block whose branch is weighted by a gate, behind a GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16)
        squeeze, excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.conv(x))
        return self.fc(torch.relu(y * self.gate(y) + x).mean((2, 3)))


class TwoHeads(nn.Module):
    """Returns a dictionary: class scores and a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head, self.mask = nn.Linear(8, 5), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.bn(self.conv(x)))
        return {"scores": self.head(y.mean((2, 3))), "mask": self.mask(y)}


class SharedConv(nn.Module):
    """One convolution with two BatchNorms, a pair called twice, and an output with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn_a, self.bn_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv(self.stem(x))
        y = F.relu(self.bn_a(shared)) + self.bn_b(shared)
        y = F.relu(self.bn_a(self.conv(y)))
        y = F.relu(self.bn_a(self.conv(y)))
        return self.fc(y.mean((2, 3)))


class Oddments(nn.Module):
    """Groups, dilation, 'same' padding, BatchNorm without affine or behind a pool, Dropout and Identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 5, padding="same", dilation=2), nn.BatchNorm2d(8, affine=False)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.rest, self.bn3 = nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.AvgPool2d(2)), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn3(self.rest(torch.relu(self.bn2(self.conv2(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Parametrized(nn.Module):
    """Weight normalisation: the weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class BatchStatistics(nn.Module):
    """BatchNorm that keeps no running statistics: it normalises by the batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Doubled(nn.Module):
    """Adds a convolution to itself, and to something that is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.offset, self.fc = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(8, 1, 1)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = torch.add(self.conv(x) + self.offset, y, alpha=0.5)
        return self.fc((y + y + z).mean((2, 3)))


class Casts(nn.Module):
    """Has a cast of its own and flattens feature maps, whose layout then matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x * (x > 0).to(x.dtype))
        return self.fc(torch.flatten(F.relu(self.bn(y)), 1))


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


class Backbone(nn.Module):
    """Stem with max-pool, bottlenecks dilated and grouped, a head with dropout, and log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(
            UserBottleneck(8, 4, 16), UserBottleneck(16, 4, 16, dilation=2), UserBottleneck(16, 8, 24, groups=4)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.blocks(self.pool(self.stem(x)))), 1)


class Detector(nn.Module):
    """Two heads on one pooled tensor, a projection that is also returned, and a pool of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)
        self.conv2, self.project = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)
        self.classes, self.box = nn.Linear(12, 5), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.pool(F.relu(self.conv1(x)))
        identity = self.project(x)
        pooled = F.relu(self.conv2(x) + identity).mean((2, 3))
        return self.classes(pooled), self.box(pooled), identity


class IdentityFirst(nn.Module):
    """x + f(x), the way most people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.fc(F.relu(x + self.block(x)).mean((2, 3)))


class ProjectionFirst(nn.Module):
    """The projection is the left summand: it is what takes the other as its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.project, self.fc = nn.Conv2d(3, 12, 1, 2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.project(x) + self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class TwoReaders(nn.Module):
    """One convolution read by two, and returned too; groups, depthwise, dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        return self.left(F.relu(self.depthwise(F.relu(self.grouped(F.relu(x)))))), self.right(x), x


class Weighted(nn.Module):
    """A branch multiplied with a gate computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.reduce, self.expand, self.fc = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv(x)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.fc(F.relu(y * gate + x).mean((2, 3)))


class PoolsTheInput(nn.Module):
    """A max-pool before any layer, two in a row behind one, and a linear layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.max_pool2d(self.conv(F.max_pool2d(x, 2)), 3, 2, 1), 2)
        return self.fc(x.mean((2, 3)))


ALL = [Backbone, Casts, Detector, Doubled, Functional, Oddments, Parametrized, SharedConv, SqueezeExcite, TwoHeads]
# Those that quantisation alone has to get right, as they are constructed, and how many layers each network calls.
QUANTISED = [IdentityFirst, ProjectionFirst, TwoReaders, Weighted, PoolsTheInput]
LAYERS: dict[type[nn.Module], int] = {
    **dict(zip(QUANTISED, (4, 4, 5, 5, 2), strict=True)),
    **dict(zip((network for network in ALL if network is not Parametrized), (13, 2, 5, 3, 3, 3, 5, 5, 3), strict=True)),
}


def make(network: type[nn.Module], images: Tensor) -> nn.Module:
    """An instance with seeded weights and BatchNorm statistics of `images`, in eval mode."""
    torch.manual_seed(0)
    model = network()
    if network in QUANTISED:
        return model.eval()
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


def judged(
    runner: Runner,
    model: nn.Module,
    program: FusedProgram,
    images: Tensor,
    precision: str = "fp32",
    references: References | None = None,
) -> Rung:
    """What the export says of a form of `model`: each operator by its rounding, the outputs by the eager model's."""
    p, inputs = PRECISIONS[precision], images.numpy().copy()
    execution = execute(runner, inputs, program.batch)
    if references is None:
        references = run_references(model, program, output_names(program.graph_module), inputs, p)
    operators = check_operators(program, p, execution.trace, runner.name == "onnx")
    return judge(execution, references, p, p.network_factor, operators)


def reason(program: FusedProgram, kind: str) -> str:
    """Why the operator of this kind was left as it was."""
    (left,) = (operator for operator in program.coverage.left if operator.kind == kind)
    return left.reason
