"""Global average pooling and the fully connected layer in one kernel."""

import pytest
import torch

from kernels.operators.mean_linear import HeadConfig
from tests.kernels.cases import DTYPES, HEAD_CASES
from tests.kernels.launching import check


@pytest.mark.parametrize("name", HEAD_CASES)
def test_heads_in_fp16(name: str, device: torch.device) -> None:
    check(HEAD_CASES[name], device)


# Tails of images, classes and channels; 1 to 5 partial sums.
TILES = [
    ("70-channels", "fp32", (16, 16, 16)),
    ("resnet20", "bf16", (16, 64, 32)),
    ("70-channels-batch-1", "fp16", (32, 16, 128)),
]


@pytest.mark.parametrize(("name", "dtype", "tile"), TILES, ids=[name for name, _, _ in TILES])
def test_every_tile_gives_the_same_head(
    name: str, dtype: str, tile: tuple[int, int, int], device: torch.device
) -> None:
    check(HEAD_CASES[name].with_dtype(DTYPES[dtype]), device, HeadConfig(*tile, num_warps=4))
