"""Convolution, ReLU and max-pool in one kernel."""

import pytest
import torch

from kernels.operators.conv2d_bias_relu_maxpool import StemConfig
from tests.kernels.cases import DTYPES, STEM_CASES
from tests.kernels.launching import check


@pytest.mark.parametrize("name", STEM_CASES)
def test_stems_in_fp16(name: str, device: torch.device) -> None:
    check(STEM_CASES[name], device)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_stems_in_other_dtypes(dtype: str, device: torch.device) -> None:
    check(STEM_CASES["c_out-40"].with_dtype(DTYPES[dtype]), device)


# block_q columns of the convolution are block_q / 2 - 1 pooled ones: 7, 15, 31, of which "resnet-odd" has 6 and
# "wide-image" 38; neighbouring strips both compute the column between them. "resnet-odd" has 5 pooled rows.
TILES = [
    ("resnet-odd", StemConfig(16, 64, 64, 1, 4, 2)),
    ("resnet-odd", StemConfig(64, 32, 128, 3, 4, 2)),
    ("resnet-odd", StemConfig(16, 64, 64, 8, 4, 2)),
    ("wide-image", StemConfig(16, 64, 64, 1, 4, 2)),
    ("wide-image", StemConfig(32, 32, 128, 2, 4, 2)),
]


@pytest.mark.parametrize(("name", "config"), TILES, ids=range(len(TILES)))
def test_every_tile_gives_the_same_stem(name: str, config: StemConfig, device: torch.device) -> None:
    check(STEM_CASES[name].with_batch(1), device, config)
