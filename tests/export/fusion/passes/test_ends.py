"""The two ends of a network, in the ways people write them: what becomes one operator, and what is left and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import Batch
from tests.export.networks import Called, fuse_exactly, kinds, reason

STEM_IMAGES, IMAGES = (
    torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 33, 30), (6, 5, 7))
)


def stem(pool: nn.Module, **conv: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, **{"kernel_size": 3, **conv}), nn.BatchNorm2d(6), nn.ReLU(inplace=True), pool)


def called(call: Callable[[Tensor, Tensor], object]) -> nn.Module:
    """A stem by function calls, of the input and a convolution of it."""
    return Called(lambda x, m: call(x, m.conv(x)), conv=nn.Conv2d(3, 6, 5, padding=2))


def two_readers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu(y)
    return y, F.max_pool2d(y, 3, 2, 1)


def head(call: Callable[[Tensor, Any], object], features: int = 6, bias: bool = True) -> nn.Module:
    """`call` makes the output of the input, a linear layer and a dropout."""
    return Called(call, fc=nn.Linear(features, 3, bias), drop=nn.Dropout(0.3))


def another_layout() -> nn.Module:
    model: Any = head(lambda x, m: m.fc(x.mean((2, 3))))
    model.fc.weight, model.fc.bias = nn.Parameter(torch.randn(6, 3).T), nn.Parameter(torch.randn(6)[::2])
    return model


def two_linears(x: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    pooled = x.mean((2, 3))
    return m.fc(pooled), pooled


def flattened(x: Tensor, m: Any) -> tuple[Tensor, Tensor]:
    pooled = x.mean((2, 3), keepdim=True).flatten(1)
    return m.fc(pooled), pooled.relu()


STEMS: dict[str, nn.Module] = {
    "resnet": stem(nn.MaxPool2d(3, 2, 1), stride=2, padding=1),
    "tuples": stem(nn.MaxPool2d((3, 3), stride=(2, 2), padding=(1, 1))),
    "functional": called(lambda x, y: F.max_pool2d(F.relu(y), 3, 2, 1)),
    "asymmetric": stem(nn.MaxPool2d(3, 2, 1), kernel_size=(1, 4), stride=(2, 1), padding=(0, 3), bias=False),
}
HEADS: dict[str, nn.Module] = {
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


@pytest.mark.parametrize("case", [*STEMS, *HEADS])
def test_fused(case: str) -> None:
    if case in STEMS:
        assert kinds(fuse_exactly(STEMS[case], STEM_IMAGES)) == ["conv2d_bias_relu_maxpool"]
    else:
        assert kinds(fuse_exactly(HEADS[case], IMAGES)) == ["mean_linear"]


def test_what_follows_is_left_though_it_read_the_same_weight() -> None:
    """log_softmax behind a head is in a user's model."""
    again = head(lambda x, m: F.linear(m.fc(x.mean((2, 3))), m.fc.weight.T[:, :3]))
    assert kinds(fuse_exactly(again, IMAGES)) == ["mean_linear", "linear"]


def test_a_static_batch() -> None:
    assert kinds(fuse_exactly(HEADS["pool and flatten"], IMAGES, Batch(4, 4, 4))) == ["mean_linear"]
    flattened = head(lambda x, m: m.fc(x.mean((2, 3)).flatten(0)), features=24)
    assert kinds(fuse_exactly(flattened, IMAGES, Batch(4, 4, 4))) == ["mean", "linear"]


GEOMETRY = "expected kernel 3, stride 2, padding 1, dilation 1 and no ceil_mode"
ROWS = "the mean does not arrive with one row of channels per image"
STEMS_LEFT: dict[str, tuple[nn.Module, str]] = {
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
HEADS_LEFT: dict[str, tuple[nn.Module, str]] = {
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


@pytest.mark.parametrize("case", [*STEMS_LEFT, *HEADS_LEFT])
def test_left_with_its_reason(case: str) -> None:
    model, message = (STEMS_LEFT | HEADS_LEFT)[case]
    program = fuse_exactly(model, STEM_IMAGES if case in STEMS_LEFT else IMAGES)
    if case in STEMS_LEFT:
        assert [kind for kind in kinds(program) if kind != "repeat"] == ["conv2d_bias_act", "max_pool2d"]
    assert "mean_linear" not in kinds(program)
    assert message in reason(program, "max_pool2d" if case in STEMS_LEFT else "linear")
