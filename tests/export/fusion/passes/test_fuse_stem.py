"""conv2d_bias_relu_maxpool: what becomes one, and what is left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export.networks import Called, fuse_exactly, kinds, reason

IMAGES = torch.randn(4, 3, 33, 30, generator=torch.Generator().manual_seed(0))


def stem(pool: nn.Module, **conv: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, **{"kernel_size": 3, **conv}), nn.BatchNorm2d(6), nn.ReLU(inplace=True), pool)


def called(call: Callable[[Tensor, Tensor], object]) -> nn.Module:
    """A stem by function calls, of the input and a convolution of it."""
    return Called(lambda x, m: call(x, m.conv(x)), conv=nn.Conv2d(3, 6, 5, padding=2))


FUSED: dict[str, nn.Module] = {
    "resnet": stem(nn.MaxPool2d(3, 2, 1), stride=2, padding=1),
    "tuples": stem(nn.MaxPool2d((3, 3), stride=(2, 2), padding=(1, 1))),
    "functional": called(lambda x, y: F.max_pool2d(F.relu(y), 3, 2, 1)),
    "asymmetric": stem(nn.MaxPool2d(3, 2, 1), kernel_size=(1, 4), stride=(2, 1), padding=(0, 3), bias=False),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused(case: str) -> None:
    assert kinds(fuse_exactly(FUSED[case], IMAGES)) == ["conv2d_bias_relu_maxpool"]


def two_readers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu(y)
    return y, F.max_pool2d(y, 3, 2, 1)


GEOMETRY = "expected kernel 3, stride 2, padding 1, dilation 1 and no ceil_mode"
LEFT: dict[str, tuple[nn.Module, str]] = {
    "kernel 2": (stem(nn.MaxPool2d(2)), GEOMETRY),
    "stride of the kernel": (stem(nn.MaxPool2d(3, padding=1)), GEOMETRY),
    "stride 1": (stem(nn.MaxPool2d(3, 1, 1)), GEOMETRY),
    "no padding": (stem(nn.MaxPool2d(3, 2)), GEOMETRY),
    "dilation": (stem(nn.MaxPool2d(3, 2, 1, dilation=2)), GEOMETRY),
    "ceil_mode": (stem(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), GEOMETRY),
    "grouped convolution": (stem(nn.MaxPool2d(3, 2, 1), groups=3), "the convolution is grouped or dilated"),
    "dilated convolution": (stem(nn.MaxPool2d(3, 2, 1), dilation=2), "the convolution is grouped or dilated"),
    "no ReLU": (called(lambda x, y: F.max_pool2d(y, 3, 2, 1)), "there is no ReLU between them"),
    "residual": (called(lambda x, y: F.max_pool2d(F.relu(y + x.repeat(1, 2, 1, 1)), 3, 2, 1)), "output is a sum"),
    "second reader": (called(two_readers), "the convolution's output has 2 readers"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_its_reason(case: str) -> None:
    model, message = LEFT[case]
    program = fuse_exactly(model, IMAGES)
    assert [kind for kind in kinds(program) if kind != "repeat"] == ["conv2d_bias_act", "max_pool2d"]
    assert message in reason(program, "max_pool2d")
