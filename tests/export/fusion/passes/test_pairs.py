"""Two convolutions that become one operator, back to back or added, and those that stay two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch, fuse
from tests.export.networks import Called, fuse_exactly, kinds

IMAGES = torch.randn(4, 6, 17, 16, generator=torch.Generator().manual_seed(0))
BACK_TO_BACK, ADDED, APART = ["conv2d_conv1x1_bias_act"], ["conv2d_projection_bias_act"], ["conv2d_bias_act"] * 2


def called(call: Callable[[Tensor, Any], object], expand: dict[str, Any] | None = None, **conv: Any) -> nn.Module:
    """Two convolutions; `call` combines them."""
    first = nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, **conv})
    return Called(call, conv=first, expand=nn.Conv2d(6, 6, **{"kernel_size": 1, **(expand or {})}))


pair = partial(called, lambda x, m: m.expand(F.relu(m.conv(x))))


def projected(stride: int) -> nn.Module:
    conv, expand, shortcut = nn.Conv2d(6, 4, 3, stride, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(6, 8, 1, stride)
    parts = {"conv": conv, "expand": expand, "shortcut": shortcut}
    return Called(lambda x, m: F.relu(m.expand(F.relu(m.conv(x))) + m.shortcut(x)), **parts)


def twice(x: Tensor, m: Any) -> Tensor:
    h = F.relu(m.conv(x))
    return m.expand(h) + h


def returned(x: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    h = F.relu(m.conv(x))
    return m.expand(h), h


def block(call: Callable[[Tensor, Tensor], object], other: dict[str, Any] | None = None, **main: Any) -> nn.Module:
    """Two convolutions, not of one value, which would be one convolution, and what `call` makes of their results."""
    shortcut = {"stride": 2, **(other or {})}
    return called(lambda x, m: call(m.conv(x), m.expand(x.clone())), shortcut, **{"stride": 2, **main})


def added(y: Tensor, s: Tensor) -> Tensor:
    return F.relu(y + s)


def of_itself(x: Tensor, m: Any) -> Tensor:
    s = m.expand(x)
    return m.conv(s) + s


CASES: dict[str, tuple[nn.Module, list[str]]] = {
    "plain": (pair(), BACK_TO_BACK),
    "residual": (called(lambda x, m: F.relu(m.expand(F.relu(m.conv(x))) + x)), BACK_TO_BACK),
    "left residual": (called(lambda x, m: x + m.expand(F.relu(m.conv(x)))), BACK_TO_BACK),
    "geometry": (pair(stride=2, dilation=2, padding=2), BACK_TO_BACK),
    "1x5": (pair(kernel_size=(1, 5), padding=0), BACK_TO_BACK),
    "no bias": (pair(expand={"bias": False}), BACK_TO_BACK),
    "projection": (projected(1), BACK_TO_BACK),
    "projection, stride 2": (projected(2), BACK_TO_BACK),
    "no ReLU between": (called(lambda x, m: m.expand(m.conv(x))), APART),
    "the first adds a residual": (called(lambda x, m: m.expand(F.relu(m.conv(x) + x))), APART),
    "read as input and as residual": (called(twice), APART),
    "also returned": (called(returned), APART),
    "only the shortcut": (called(lambda x, m: m.expand(x) + F.relu(m.conv(x))), APART),
    "first grouped": (pair(groups=2), APART),
    "first 1x1": (pair(kernel_size=1, padding=0), APART),
    "second grouped": (pair(expand={"groups": 3}), APART),
    "second 3x3": (pair(expand={"kernel_size": 3}), APART),
    "second with stride": (pair(expand={"stride": 2}), APART),
    "second with padding": (pair(expand={"padding": 1}), APART),
    "added": (block(added), ADDED),
    "added, no relu": (block(lambda y, s: y + s), ADDED),
    "added, left shortcut": (block(lambda y, s: F.relu(s + y)), ADDED),
    "added in place": (block(lambda y, s: s.add_(y)), ADDED),
    "added, one bias": (block(added, bias=False), ADDED),
    "added, no bias": (block(added, {"bias": False}, bias=False), ADDED),
    "added, dilated": (block(added, dilation=2, padding=2), ADDED),
    "added, two 1x1": (block(added, kernel_size=1, padding=0), ADDED),
    "ReLU on the projection": (block(lambda y, s: y + F.relu(s)), APART),
    "projection also returned": (block(lambda y, s: (y + s, s)), APART),
    "projection also the input": (called(of_itself), APART),
    "grouped convolution": (block(added, groups=2), APART),
    "grouped projection": (block(added, {"groups": 2}), APART),
    "padded projection": (block(added, {"padding": 1, "stride": 1}, padding=2, stride=1), APART),
    "3x3 shortcut": (block(added, {"kernel_size": 3, "padding": 1}), APART),
    "pool on the projection": (block(lambda y, s: y + F.avg_pool2d(s, 3, 1, 1)), ["avg_pool2d", *APART]),
    "weighted sum": (block(lambda y, s: torch.add(y, s, alpha=0.5)), ["add", *APART]),
    "broadcast": (block(lambda y, s: y + s[:, :, :1, :1]), ["add", *APART]),
}


@pytest.mark.parametrize("case", CASES)
def test_which_become_one(case: str) -> None:
    model, expected = CASES[case]
    assert sorted(kinds(fuse_exactly(model, IMAGES))) == expected


def test_of_a_chain_each_convolution_is_taken_once() -> None:
    first, second = (nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU()) for _ in range(2))
    assert kinds(fuse_exactly(nn.Sequential(first, second), IMAGES)) == BACK_TO_BACK * 2


def test_the_bias_is_the_sum_of_both_in_float64() -> None:
    model: Any = block(added).eval()
    master = fuse(model, IMAGES, Batch(1, 4, 8)).master
    bias = next(t for name, t in master.named_buffers() if t.dim() == 1)
    assert torch.equal(bias, model.conv.bias.double() + model.expand.bias.double())


def test_of_two_candidates_the_one_from_the_trunk_is_the_projection() -> None:
    """The branch's last convolution can then join the one before it, though the shortcut's is the left summand."""
    branch = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    model = Called(lambda x, m: F.relu(m.shortcut(x) + m.branch(x)), branch=branch, shortcut=nn.Conv2d(6, 8, 1))
    program = fuse_exactly(model, IMAGES)
    assert kinds(program) == ["conv2d_bias_act", *BACK_TO_BACK]
    assert [operator.name for operator in program.coverage.fused] == ["branch.0", "branch.4"]
