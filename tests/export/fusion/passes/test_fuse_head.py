"""mean_linear: the ways to write a head that become one operator, and those that are left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch
from tests.export.networks import Called, fuse_exactly, kinds, reason

IMAGES = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))


def head(call: Callable[[Tensor, Any], object], features: int = 6, bias: bool = True) -> nn.Module:
    """`call` makes the output of the input, a linear layer and a dropout."""
    return Called(call, fc=nn.Linear(features, 3, bias), drop=nn.Dropout(0.3))


def another_layout() -> nn.Module:
    model: Any = head(lambda x, m: m.fc(x.mean((2, 3))))
    model.fc.weight, model.fc.bias = nn.Parameter(torch.randn(6, 3).T), nn.Parameter(torch.randn(6)[::2])
    return model


FUSED: dict[str, nn.Module] = {
    "weight and bias of another layout": another_layout(),
    "mean": head(lambda x, m: m.fc(x.mean((2, 3)))),
    "mean, negative axes": head(lambda x, m: m.fc(x.mean([-1, -2]))),
    "keepdim and flatten": head(lambda x, m: m.fc(x.mean((2, 3), keepdim=True).flatten(1))),
    "pool and flatten": head(lambda x, m: m.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))),
    "pool and view": head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))),
    "pool and reshape": head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).reshape(-1, 6))),
    "pool and squeeze": head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2))),
    "pool and indices": head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)))),
    "dropout": head(lambda x, m: m.fc(m.drop(x.mean((2, 3))))),
    "dropout before flatten": head(lambda x, m: m.fc(m.drop(F.adaptive_avg_pool2d(x, 1)).flatten(1))),
    "contiguous": head(lambda x, m: m.fc(x.mean((2, 3)).contiguous().clone())),
    "no bias": head(lambda x, m: m.fc(x.mean((2, 3))), bias=False),
    "modules": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity(), nn.Dropout(), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused(case: str) -> None:
    assert kinds(fuse_exactly(FUSED[case], IMAGES)) == ["mean_linear"]


def test_what_follows_is_left_though_it_read_the_same_weight() -> None:
    """log_softmax behind a head is in a user's model."""
    again = head(lambda x, m: F.linear(m.fc(x.mean((2, 3))), m.fc.weight.T[:, :3]))
    assert kinds(fuse_exactly(again, IMAGES)) == ["mean_linear", "linear"]


def test_a_static_batch() -> None:
    assert kinds(fuse_exactly(FUSED["pool and flatten"], IMAGES, Batch(4, 4, 4))) == ["mean_linear"]
    flattened = head(lambda x, m: m.fc(x.mean((2, 3)).flatten(0)), features=24)
    assert kinds(fuse_exactly(flattened, IMAGES, Batch(4, 4, 4))) == ["mean", "linear"]


def two_linears(x: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    pooled = x.mean((2, 3))
    return m.fc(pooled), pooled


def flattened(x: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    pooled = x.mean((2, 3), keepdim=True).flatten(1)
    return m.fc(pooled), pooled.relu()


ROWS = "the mean does not arrive with one row of channels per image"
LEFT: dict[str, tuple[nn.Module, str]] = {
    "mean also returned": (head(two_linears), "not fused with mean: mean has 2 readers"),
    "flattened mean also returned": (head(flattened), "has 2 readers"),
    "computed weight": (head(lambda x, m: F.linear(x.mean((2, 3)), m.fc.weight * x.mean())), "the weight is computed"),
    "computed bias": (head(lambda x, m: F.linear(x.mean((2, 3)), m.fc.weight, x[0, :3, 0, 0])), "the bias is computed"),
    "pixel by pixel": (head(lambda x, m: m.fc(x.mean((2, 3), keepdim=True)), features=1), ROWS),
    "two rows per image": (head(lambda x, m: m.fc(x.mean((2, 3)).reshape(-1, 3)), features=3), ROWS),
    "mean over one axis": (head(lambda x, m: m.fc(x.mean(3).mean(2)), features=6), ""),
    "mean over the channels": (head(lambda x, m: m.fc(x.mean((1, 3))), features=5), ""),
    "mean in another type": (head(lambda x, m: m.fc(x.mean((2, 3), dtype=x.dtype))), ""),
    "transposed": (head(lambda x, m: m.fc(x.mean((2, 3), keepdim=True).permute(0, 2, 3, 1).flatten(1))), ""),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_its_reason(case: str) -> None:
    model, message = LEFT[case]
    program = fuse_exactly(model, IMAGES)
    assert "mean_linear" not in kinds(program)
    assert message in reason(program, "linear")
