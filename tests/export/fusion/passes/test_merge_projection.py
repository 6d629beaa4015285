"""conv2d_projection_bias_act: which two convolutions that are added become one, and which stay two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch, fuse
from tests.export.networks import Called, fuse_exactly, kinds

IMAGES = torch.randn(4, 6, 16, 15, generator=torch.Generator().manual_seed(0))
MERGED, APART = ["conv2d_projection_bias_act"], ["conv2d_bias_act", "conv2d_bias_act"]


def block(call: Callable[[Tensor, Tensor], object], other: dict[str, Any] | None = None, **main: Any) -> nn.Module:
    """Two convolutions, not of one value, which would be one convolution, and what `call` makes of their results."""
    first = nn.Conv2d(6, 8, **{"kernel_size": 3, "padding": 1, "stride": 2, **main})
    second = nn.Conv2d(6, 8, **{"kernel_size": 1, "stride": 2, **(other or {})})
    return Called(lambda x, m: call(m.main(x), m.other(x.clone())), main=first, other=second)


def added(y: Tensor, s: Tensor) -> Tensor:
    return F.relu(y + s)


TOGETHER: dict[str, nn.Module] = {
    "resnet": block(added),
    "no relu": block(lambda y, s: y + s),
    "left shortcut": block(lambda y, s: F.relu(s + y)),
    "in place": block(lambda y, s: s.add_(y)),
    "one bias": block(added, bias=False),
    "no bias": block(added, {"bias": False}, bias=False),
    "dilated": block(added, dilation=2, padding=2),
    "two 1x1": block(added, kernel_size=1, padding=0),
}


def test_the_bias_is_the_sum_of_both_in_float64() -> None:
    model: Any = block(added).eval()
    master = fuse(model, IMAGES, Batch(1, 4, 8)).master
    bias = next(t for name, t in master.named_buffers() if t.dim() == 1)
    assert torch.equal(bias, model.main.bias.double() + model.other.bias.double())


def test_of_two_candidates_the_one_from_the_trunk_is_the_projection() -> None:
    """The branch's last convolution can then join the one before it, though the shortcut's is the left summand."""
    branch = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    model = Called(lambda x, m: F.relu(m.shortcut(x) + m.branch(x)), branch=branch, shortcut=nn.Conv2d(6, 8, 1))
    program = fuse_exactly(model, IMAGES)
    assert kinds(program) == ["conv2d_bias_act", "conv2d_conv1x1_bias_act"]
    assert [operator.name for operator in program.coverage.fused] == ["branch.0", "branch.4"]


def of_itself(x: Tensor, m: Any) -> Tensor:
    s = m.project(x)
    return m.conv(s) + s


LEFT: dict[str, nn.Module] = {
    "ReLU on the projection": block(lambda y, s: y + F.relu(s)),
    "projection also returned": block(lambda y, s: (y + s, s)),
    "projection also the input": Called(of_itself, conv=nn.Conv2d(8, 8, 3, padding=1), project=nn.Conv2d(6, 8, 1)),
    "grouped convolution": block(added, groups=2),
    "grouped projection": block(added, {"groups": 2}),
    "padded projection": block(added, {"padding": 1, "stride": 1}, padding=2, stride=1),
    "3x3 shortcut": block(added, {"kernel_size": 3, "padding": 1}),
    "pool on the projection": block(lambda y, s: y + F.avg_pool2d(s, 3, 1, 1)),
    "weighted sum": block(lambda y, s: torch.add(y, s, alpha=0.5)),
    "broadcast": block(lambda y, s: y + s[:, :, :1, :1]),
}
BESIDE = {"pool on the projection": ["avg_pool2d"], "weighted sum": ["add"], "broadcast": ["add"]}


@pytest.mark.parametrize("case", [*TOGETHER, *LEFT])
def test_which_are_merged(case: str) -> None:
    expected = MERGED if case in TOGETHER else [*APART, *BESIDE.get(case, [])]
    assert sorted(kinds(fuse_exactly((TOGETHER | LEFT)[case], IMAGES))) == sorted(expected)
