"""mean_linear: the ways to write a head that become one operator, and those that are left with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch
from tests.export.networks import fuse_exactly, reason

IMAGES = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """`call` makes the output of the input and a linear layer."""

    def __init__(self, call: Callable[..., object], features: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(features, 3, bias)
        self.drop = nn.Dropout(0.3)
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(x, self)


FUSED: dict[str, nn.Module] = {
    "mean": Head(lambda x, m: m.fc(x.mean((2, 3)))),
    "mean, negative axes": Head(lambda x, m: m.fc(x.mean([-1, -2]))),
    "keepdim and flatten": Head(lambda x, m: m.fc(x.mean((2, 3), keepdim=True).flatten(1))),
    "pool and flatten": Head(lambda x, m: m.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))),
    "pool and view": Head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))),
    "pool and reshape": Head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).reshape(-1, 6))),
    "pool and squeeze": Head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2))),
    "pool and indices": Head(lambda x, m: m.fc(F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)))),
    "dropout": Head(lambda x, m: m.fc(m.drop(x.mean((2, 3))))),
    "dropout before flatten": Head(lambda x, m: m.fc(m.drop(F.adaptive_avg_pool2d(x, 1)).flatten(1))),
    "contiguous": Head(lambda x, m: m.fc(x.mean((2, 3)).contiguous().clone())),
    "no bias": Head(lambda x, m: m.fc(x.mean((2, 3))), bias=False),
    "modules": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity(), nn.Dropout(), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused(case: str) -> None:
    assert fuse_exactly(FUSED[case], IMAGES) == ["mean_linear"]


def test_what_follows_is_left() -> None:
    assert fuse_exactly(Head(lambda x, m: F.log_softmax(m.fc(x.mean((2, 3))), 1)), IMAGES) == [
        "mean_linear",
        "log_softmax",
    ]


def test_a_weight_may_have_two_readers() -> None:
    """The linear layer is called again, on what it made of the mean."""
    model = Head(lambda x, m: F.linear(m.fc(x.mean((2, 3))), m.fc.weight.T[:, :3]))
    assert fuse_exactly(model, IMAGES) == ["mean_linear", "linear"]


def test_a_weight_of_another_layout() -> None:
    model = Head(lambda x, m: m.fc(x.mean((2, 3))))
    model.fc.weight = nn.Parameter(torch.randn(6, 3).T)
    model.fc.bias = nn.Parameter(torch.randn(6)[::2])
    assert fuse_exactly(model, IMAGES) == ["mean_linear"]


def test_a_static_batch() -> None:
    assert fuse_exactly(FUSED["pool and flatten"], IMAGES, Batch(4, 4, 4)) == ["mean_linear"]


def two_linears(x: Tensor, m: Head) -> tuple[Tensor, Tensor]:
    pooled = x.mean((2, 3))
    return m.fc(pooled), pooled


LEFT: dict[str, tuple[nn.Module, str]] = {
    "mean also returned": (Head(two_linears), "not fused with mean: mean has 2 readers"),
    "flattened mean also returned": (
        Head(lambda x, m: (lambda p: (m.fc(p), p.relu()))(x.mean((2, 3), keepdim=True).flatten(1))),
        "has 2 readers",
    ),
    "computed weight": (
        Head(lambda x, m: F.linear(x.mean((2, 3)), m.fc.weight * x.mean())),
        "the weight is computed in the forward pass",
    ),
    "computed bias": (
        Head(lambda x, m: F.linear(x.mean((2, 3)), m.fc.weight, x[0, :3, 0, 0])),
        "the bias is computed in the forward pass",
    ),
    "pixel by pixel": (
        Head(lambda x, m: m.fc(x.mean((2, 3), keepdim=True)), features=1),
        "the mean does not arrive with one row of channels per image",
    ),
    "two rows per image": (
        Head(lambda x, m: m.fc(x.mean((2, 3)).reshape(-1, 3)), features=3),
        "the mean does not arrive with one row of channels per image",
    ),
    "mean over one axis": (Head(lambda x, m: m.fc(x.mean(3).mean(2)), features=6), ""),
    "mean over the channels": (Head(lambda x, m: m.fc(x.mean((1, 3))), features=5), ""),
    "mean in another type": (Head(lambda x, m: m.fc(x.mean((2, 3), dtype=x.dtype))), ""),
    "transposed": (Head(lambda x, m: m.fc(x.mean((2, 3), keepdim=True).permute(0, 2, 3, 1).flatten(1))), ""),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_its_reason(case: str) -> None:
    model, message = LEFT[case]
    assert "mean_linear" not in fuse_exactly(model, IMAGES)
    assert message in reason(model, IMAGES, "linear")


def test_flattening_the_batch_is_not_fused() -> None:
    model = Head(lambda x, m: m.fc(x.mean((2, 3)).flatten(0)), features=24)
    assert fuse_exactly(model, IMAGES, Batch(4, 4, 4)) == ["mean", "linear"]
