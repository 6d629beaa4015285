"""Constant scales, shifts and branches become part of one layer: which, and that the network stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export.networks import Called, fuse_exactly, kinds, make

CONV, HEAD = "conv2d_bias_act", "mean_linear"


class Frozen(nn.Module):
    """BatchNorm worked out of four buffers at each call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.3, "bias": 0.2, "running_mean": 0.1, "running_var": 0.6}.items():
            self.register_buffer(name, value + 0.1 * torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        weight, bias = m.weight.reshape(1, -1, 1, 1), m.bias.reshape(1, -1, 1, 1)
        scale = weight * (m.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (bias - m.running_mean.reshape(1, -1, 1, 1) * scale)


class Standardised(nn.Conv2d):
    """Weight standardisation, as `how` spells it."""

    def __init__(self, how: str) -> None:
        super().__init__(3, 8, 3, padding=1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.how == "var_mean":
            var, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
            weight = (weight - mean) / torch.sqrt(var + 1e-10)
        elif self.how == "batch_norm":
            rows = weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(weight)
        else:
            weight = weight - weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
            weight = weight / (weight.view(len(weight), -1).std(1).view(-1, 1, 1, 1) + 1e-5).expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class RepVgg(nn.Module):
    """3x3, 1x1 and, where the shape stays, the input, each with its BatchNorm, added up in some order."""

    def __init__(self, c: int, out: int, stride: int = 1, groups: int = 1, identity_first: bool = False) -> None:
        super().__init__()
        settings: dict[str, Any] = {"stride": stride, "groups": groups, "bias": False}
        self.dense = nn.Sequential(nn.Conv2d(c, out, 3, padding=1, **settings), nn.BatchNorm2d(out))
        self.pointwise = nn.Sequential(nn.Conv2d(c, out, 1, **settings), nn.BatchNorm2d(out))
        self.identity = nn.BatchNorm2d(c) if c == out and stride == 1 else None
        self.identity_first = identity_first

    def forward(self, x: Tensor) -> Tensor:
        if self.identity is None:
            return F.relu(self.dense(x) + self.pointwise(x))
        if self.identity_first:
            return F.relu(self.identity(x) + (self.pointwise(x) + self.dense(x)))
        return F.relu(self.dense(x) + self.pointwise(x) + self.identity(x))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plainly(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, m: call(x)


def sequence(*parts: nn.Module | Callable[[Tensor], Tensor], channels: int = 8) -> nn.Module:
    """The parts one after the other, and a head."""
    modules = [part if isinstance(part, nn.Module) else Called(plainly(part)) for part in parts]
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def conv(c: int = 3, out: int = 8, size: int = 3, padding: int = 1, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, size, padding=padding, **settings)


FACTORS = torch.rand(8, 1, 1) + 0.5
BUFFER = {"s": torch.rand(1, 8, 1, 1) + 0.5, "t": torch.randn(8, 1, 1)}
# Network -> the operators that are left of it.
FOLDED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "frozen": (lambda: sequence(conv(), Frozen(8), nn.ReLU(), conv(8), Frozen(8)), [CONV, CONV, HEAD]),
    "scale layer": (lambda: sequence(conv(), Called(lambda x, m: x * m.s + m.t, **BUFFER)), [CONV, HEAD]),
    "arithmetic": (lambda: sequence(conv(bias=False), lambda x: 1 - (0.5 - x / 2) * 3), [CONV, HEAD]),
    "without affine": (lambda: sequence(conv(), nn.BatchNorm2d(8, affine=False)), [CONV, HEAD]),
    "native": (
        lambda: sequence(
            conv(), Called(lambda x, m: torch.native_batch_norm(x, m.g, None, m.t, m.v, False, 0.1, 1e-3)[0],
                           g=torch.rand(8) + 0.5, t=torch.randn(8), v=torch.rand(8) + 0.5)
        ), [CONV, HEAD],
    ),
    "transposed": (
        lambda: sequence(nn.ConvTranspose2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8)), ["conv_transpose2d", HEAD],
    ),
    "transposed groups": (
        lambda: sequence(conv(), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)),
        [CONV, "conv_transpose2d", HEAD],
    ),
    "linear": (
        lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6)),
        [CONV, HEAD],
    ),
    "before": (lambda: sequence(conv(), nn.ReLU(), nn.BatchNorm2d(8), conv(8, padding=0)), [CONV, CONV, HEAD]),
    "frozen before groups": (
        lambda: sequence(conv(), nn.ReLU(), Frozen(8), conv(8, 6, 1, 0, groups=2), channels=6), [CONV, CONV, HEAD],
    ),
    "scale before padding": (lambda: sequence(conv(), nn.ReLU(), lambda x: x * FACTORS, conv(8)), [CONV, CONV, HEAD]),
    "before linear": (
        lambda: nn.Sequential(
            conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.BatchNorm1d(6),
            nn.Linear(6, 5),
        ), [CONV, HEAD, "relu", "linear"],
    ),
    "standardised by var_mean": (lambda: sequence(Standardised("var_mean"), nn.ReLU()), [CONV, HEAD]),
    "standardised by batch_norm": (lambda: sequence(Standardised("batch_norm"), nn.ReLU()), [CONV, HEAD]),
    "standardised by hand": (lambda: sequence(Standardised("means"), nn.BatchNorm2d(8)), [CONV, HEAD]),
    "repvgg": (lambda: sequence(RepVgg(3, 8, 2), RepVgg(8, 8), RepVgg(8, 8, 1, 4, True)), [CONV] * 3 + [HEAD]),
    "depthwise branches": (
        lambda: sequence(conv(), Called(lambda x, m: F.relu(sum(b(x) for b in m.branches)), branches=nn.ModuleList(
            [nn.Sequential(conv(8, groups=8), nn.BatchNorm2d(8)) for _ in range(2)] + [nn.BatchNorm2d(8)])
        )), [CONV, CONV, HEAD],
    ),
    "2x2 among 3x3": (
        lambda: sequence(
            Called(lambda x, m: m.a(x) + m.b(x), a=conv(stride=2, padding=1), b=conv(size=2, padding=0, stride=2))
        ), [CONV, HEAD],
    ),
    "strips": (
        lambda: sequence(Called(
            lambda x, m: m.a(x) + m.b(x) + m.c(x), a=conv(), b=nn.Conv2d(3, 8, (1, 3), padding=(0, 1)),
            c=nn.Conv2d(3, 8, (3, 1), padding=(1, 0)),
        )), [CONV, HEAD],
    ),
}  # fmt: skip
LEFT: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "padding sees the shift": (
        lambda: sequence(conv(), nn.ReLU(), nn.BatchNorm2d(8), conv(8)), [CONV, "mul", "add", CONV, HEAD],
    ),
    "two readers": (lambda: sequence(conv(), lambda x: x * 2 + F.relu(x)), [CONV, "mul", "relu", "add", HEAD]),
    "a value per pixel": (
        lambda: sequence(conv(), Called(lambda x, m: x + m.t, t=torch.randn(8, 32, 32))), [CONV, "add", HEAD],
    ),
    "channels made of one": (lambda: sequence(conv(out=1), lambda x: x * FACTORS), [CONV, "mul", HEAD]),
    "too small for 16 bits": (lambda: sequence(conv(), lambda x: x * 1e-5), [CONV, "mul", HEAD]),
    "shift of many deviations": (
        lambda: sequence(conv(), nn.ReLU(), lambda x: x + 9.0, conv(8, 8, 1, 0)), [CONV, "add", CONV, HEAD],
    ),
    "branches of two inputs": (
        lambda: sequence(conv(), Called(lambda x, m: m.a(x) + m.b(F.relu(x)), a=conv(8), b=conv(8))),
        [CONV, CONV, "relu", CONV, HEAD],
    ),
    "branches of two crops": (
        lambda: sequence(Called(
            lambda x, m: m.a(x) + m.b(x[:, :, 1:-1, 1:-1]), a=conv(padding=0), b=conv(size=1, padding=0),
        )), ["conv2d_projection_bias_act", HEAD],
    ),
    "a dilated branch": (
        lambda: sequence(Called(lambda x, m: m.a(x) + m.b(x), a=conv(), b=conv(padding=2, dilation=2))),
        [CONV, CONV, HEAD],
    ),
    "a residual": (lambda: sequence(conv(), Called(lambda x, m: m.a(x) + x, a=conv(8))), [CONV, CONV, HEAD]),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FOLDED, *LEFT])
def test_what_folds_is_one_layer_and_what_does_not_stays(name: str, images: Tensor) -> None:
    network, expected = {**FOLDED, **LEFT}[name]
    model = make(network, images)
    program = fuse_exactly(model, images)
    assert kinds(program) == expected, str(program.coverage)


def test_a_folded_layer_names_what_it_replaces(images: Tensor) -> None:
    program = fuse_exactly(make(FOLDED["repvgg"][0], images), images)
    parts = program.coverage.fused[1].parts
    names = ["1.dense.0", "1.dense.1", "1.pointwise.0", "1.pointwise.1", "1", "1.identity"]
    assert set(names) <= set(parts), parts
