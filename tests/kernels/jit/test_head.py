"""Global average pooling and the fully connected layer in one kernel."""

import pytest
import torch

from kernels.configs.config import HeadConfig
from kernels.problems import with_dtype
from tests.kernels.cases import DTYPES, HEAD_CASES
from tests.kernels.launching import check


@pytest.mark.parametrize("name", HEAD_CASES)
def test_heads_in_fp16(name: str, device: torch.device) -> None:
    check(HEAD_CASES[name], device)


@pytest.mark.parametrize("name", ["resnet20", "one-pixel", "70-channels"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_heads_in_other_dtypes(name: str, dtype: str, device: torch.device) -> None:
    check(with_dtype(HEAD_CASES[name], DTYPES[dtype]), device)


@pytest.mark.parametrize("tile", [(16, 16, 16), (16, 64, 32), (32, 16, 128)], ids=lambda tile: "x".join(map(str, tile)))
@pytest.mark.parametrize("name", ["70-channels", "70-channels-batch-1", "resnet20"])
def test_every_tile_gives_the_same_head(name: str, tile: tuple[int, int, int], device: torch.device) -> None:
    """Tails of images, classes and channels; 1 to 5 partial sums."""
    check(HEAD_CASES[name], device, HeadConfig(*tile, num_warps=4))
