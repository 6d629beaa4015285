"""conv2d_conv1x1_bias_act: which pairs of convolutions run back to back, and which do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export.networks import fuse_exactly

IMAGES = torch.randn(4, 6, 17, 16, generator=torch.Generator().manual_seed(0))
FUSED, APART = ["conv2d_conv1x1_bias_act"], ["conv2d_bias_act", "conv2d_bias_act"]


class Pair(nn.Module):
    """Two convolutions; `call` combines them."""

    def __init__(
        self,
        call: Callable[..., object] = lambda x, conv, expand: expand(F.relu(conv(x))),
        conv: dict[str, Any] | None = None,
        expand: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, **(conv or {})})
        self.expand = nn.Conv2d(6, 6, **{"kernel_size": 1, **(expand or {})})
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(x, self.conv, self.expand)


class Projected(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv, self.expand = nn.Conv2d(6, 4, 3, stride, 1), nn.Conv2d(4, 8, 1)
        self.shortcut = nn.Conv2d(6, 8, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.expand(F.relu(self.conv(x))) + self.shortcut(x))


@pytest.mark.parametrize(
    "model",
    [
        Pair(),
        Pair(lambda x, conv, expand: F.relu(expand(F.relu(conv(x))) + x)),
        Pair(lambda x, conv, expand: x + expand(F.relu(conv(x)))),
        Pair(conv={"stride": 2, "dilation": 2, "padding": 2}),
        Pair(conv={"kernel_size": (1, 5), "padding": 0}),
        Pair(expand={"bias": False}),
        Projected(1),
        Projected(2),
    ],
    ids=["plain", "residual", "left residual", "geometry", "1x5", "no bias", "projection", "projection, stride 2"],
)
def test_fused(model: nn.Module) -> None:
    assert fuse_exactly(model, IMAGES) == FUSED


def twice(x: Tensor, conv: nn.Module, expand: nn.Module) -> Tensor:
    h = F.relu(conv(x))
    return expand(h) + h


def returned(x: Tensor, conv: nn.Module, expand: nn.Module) -> tuple[Tensor, Tensor]:
    h = F.relu(conv(x))
    return expand(h), h


LEFT: dict[str, tuple[nn.Module, list[str]]] = {
    "no ReLU between": (Pair(lambda x, conv, expand: expand(conv(x))), APART),
    "the first adds a residual": (Pair(lambda x, conv, expand: expand(F.relu(conv(x) + x))), APART),
    "read as input and as residual": (Pair(twice), APART),
    "also returned": (Pair(returned), APART),
    "only the shortcut": (Pair(lambda x, conv, expand: expand(x) + F.relu(conv(x))), APART),
    "first grouped": (Pair(conv={"groups": 2}), APART),
    "first 1x1": (Pair(conv={"kernel_size": 1, "padding": 0}), APART),
    "second grouped": (Pair(expand={"groups": 3}), APART),
    "second 3x3": (Pair(expand={"kernel_size": 3}), APART),
    "second with stride": (Pair(expand={"stride": 2}), APART),
    "second with padding": (Pair(expand={"padding": 1}), APART),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_apart(case: str) -> None:
    model, kinds = LEFT[case]
    assert fuse_exactly(model, IMAGES) == kinds


def test_of_a_chain_each_convolution_is_taken_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    assert fuse_exactly(model, IMAGES) == FUSED * 2
