"""conv2d_projection_bias_act: which two convolutions that are added become one, and which stay two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch, fuse
from tests.export.networks import fuse_exactly

IMAGES = torch.randn(4, 6, 16, 15, generator=torch.Generator().manual_seed(0))
MERGED, APART = ["conv2d_projection_bias_act"], ["conv2d_bias_act", "conv2d_bias_act"]


class Block(nn.Module):
    """Two convolutions of the input and what `call` makes of their results."""

    def __init__(
        self, call: Callable[..., object], main: dict[str, Any] | None = None, other: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.main = nn.Conv2d(6, 8, **{"kernel_size": 3, "padding": 1, "stride": 2, **(main or {})})
        self.other = nn.Conv2d(6, 8, **{"kernel_size": 1, "stride": 2, **(other or {})})
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(self.main(x), self.other(x))


def added(y: Tensor, s: Tensor) -> Tensor:
    return F.relu(y + s)


@pytest.mark.parametrize(
    "model",
    [
        Block(added),
        Block(lambda y, s: y + s),
        Block(lambda y, s: F.relu(s + y)),
        Block(lambda y, s: s.add_(y)),
        Block(added, {"bias": False}),
        Block(added, {"bias": False}, {"bias": False}),
        Block(added, {"dilation": 2, "padding": 2}),
        Block(added, {"kernel_size": 1, "padding": 0}),
    ],
    ids=["resnet", "no relu", "left shortcut", "in place", "one bias", "no bias", "dilated", "two 1x1"],
)
def test_merged(model: nn.Module) -> None:
    assert fuse_exactly(model, IMAGES) == MERGED


def test_the_bias_is_the_sum_of_both_in_float64() -> None:
    model = Block(added).eval()
    master = fuse(model, IMAGES, Batch(1, 4, 8)).master
    bias = next(t for name, t in master.named_buffers() if t.dim() == 1)
    assert torch.equal(bias, model.main.bias.double() + model.other.bias.double())


class LeftBottleneck(nn.Module):
    """The shortcut's convolution is the left summand, and both summands are 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.conv3, self.shortcut = nn.Conv2d(4, 8, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


def test_of_two_candidates_the_one_from_the_trunk_is_the_projection() -> None:
    """The branch's last convolution can then join the one before it."""
    assert fuse_exactly(LeftBottleneck(), IMAGES) == ["conv2d_bias_act", "conv2d_conv1x1_bias_act"]
    names = [operator.name for operator in fuse(LeftBottleneck().eval(), IMAGES).coverage.fused]
    assert names == ["conv1", "conv3"]


class ProjectionOfItself(nn.Module):
    """The projection is also the other convolution's input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.project = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.project(x)
        return self.conv(s) + s


LEFT: dict[str, tuple[nn.Module, list[str]]] = {
    "ReLU on the projection": (Block(lambda y, s: y + F.relu(s)), APART),
    "projection also returned": (Block(lambda y, s: (y + s, s)), APART),
    "projection also the input": (ProjectionOfItself(), APART),
    "grouped convolution": (Block(added, {"groups": 2}), APART),
    "grouped projection": (Block(added, {}, {"groups": 2}), APART),
    "padded projection": (
        Block(added, {"padding": 2, "stride": 1}, {"padding": 1, "stride": 1}),
        APART,
    ),
    "3x3 shortcut": (Block(added, {}, {"kernel_size": 3, "padding": 1}), APART),
    "pool on the projection": (
        Block(lambda y, s: y + F.avg_pool2d(s, 3, 1, 1)),
        ["conv2d_bias_act", "avg_pool2d", "conv2d_bias_act"],
    ),
    "weighted sum": (Block(lambda y, s: torch.add(y, s, alpha=0.5)), [*APART, "add"]),
    "broadcast": (Block(lambda y, s: y + s[:, :, :1, :1]), [*APART, "add"]),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_apart(case: str) -> None:
    model, kinds = LEFT[case]
    assert sorted(fuse_exactly(model, IMAGES)) == sorted(kinds)
