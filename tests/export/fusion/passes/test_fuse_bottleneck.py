"""conv2d_conv1x1_bias_act: which pairs of convolutions run back to back, and which do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export.networks import Called, fuse_exactly, kinds

IMAGES = torch.randn(4, 6, 17, 16, generator=torch.Generator().manual_seed(0))
FUSED, APART = ["conv2d_conv1x1_bias_act"], ["conv2d_bias_act", "conv2d_bias_act"]


Call = Callable[[Tensor, Any], object]


def pair(
    call: Call = lambda x, m: m.expand(F.relu(m.conv(x))),
    conv: dict[str, Any] | None = None,
    expand: dict[str, Any] | None = None,
) -> nn.Module:
    """Two convolutions; `call` combines them."""
    first = nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, **(conv or {})})
    return Called(call, conv=first, expand=nn.Conv2d(6, 6, **{"kernel_size": 1, **(expand or {})}))


def projected(stride: int) -> nn.Module:
    return Called(
        lambda x, m: F.relu(m.expand(F.relu(m.conv(x))) + m.shortcut(x)),
        conv=nn.Conv2d(6, 4, 3, stride, 1),
        expand=nn.Conv2d(4, 8, 1),
        shortcut=nn.Conv2d(6, 8, 1, stride),
    )


TOGETHER: dict[str, nn.Module] = {
    "plain": pair(),
    "residual": pair(lambda x, m: F.relu(m.expand(F.relu(m.conv(x))) + x)),
    "left residual": pair(lambda x, m: x + m.expand(F.relu(m.conv(x)))),
    "geometry": pair(conv={"stride": 2, "dilation": 2, "padding": 2}),
    "1x5": pair(conv={"kernel_size": (1, 5), "padding": 0}),
    "no bias": pair(expand={"bias": False}),
    "projection": projected(1),
    "projection, stride 2": projected(2),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_fused(case: str) -> None:
    assert kinds(fuse_exactly(TOGETHER[case], IMAGES)) == FUSED


def twice(x: Tensor, m: Any) -> Tensor:
    h = F.relu(m.conv(x))
    return m.expand(h) + h


def returned(x: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    h = F.relu(m.conv(x))
    return m.expand(h), h


LEFT: dict[str, nn.Module] = {
    "no ReLU between": pair(lambda x, m: m.expand(m.conv(x))),
    "the first adds a residual": pair(lambda x, m: m.expand(F.relu(m.conv(x) + x))),
    "read as input and as residual": pair(twice),
    "also returned": pair(returned),
    "only the shortcut": pair(lambda x, m: m.expand(x) + F.relu(m.conv(x))),
    "first grouped": pair(conv={"groups": 2}),
    "first 1x1": pair(conv={"kernel_size": 1, "padding": 0}),
    "second grouped": pair(expand={"groups": 3}),
    "second 3x3": pair(expand={"kernel_size": 3}),
    "second with stride": pair(expand={"stride": 2}),
    "second with padding": pair(expand={"padding": 1}),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_apart(case: str) -> None:
    assert kinds(fuse_exactly(LEFT[case], IMAGES)) == APART


def test_of_a_chain_each_convolution_is_taken_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    assert kinds(fuse_exactly(model, IMAGES)) == FUSED * 2
