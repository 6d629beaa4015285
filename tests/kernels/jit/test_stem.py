"""Convolution, ReLU and max-pool in one kernel."""

from dataclasses import replace

import pytest
import torch

from kernels.configs.config import StemConfig
from kernels.problems import StemProblem, with_dtype
from tests.kernels.cases import DTYPES, STEM_CASES
from tests.kernels.launching import check


@pytest.mark.parametrize("name", STEM_CASES)
def test_stems_in_fp16(name: str, device: torch.device) -> None:
    check(STEM_CASES[name], device)


@pytest.mark.parametrize("name", ["resnet-odd", "c_out-40"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_stems_in_other_dtypes(name: str, dtype: str, device: torch.device) -> None:
    check(with_dtype(STEM_CASES[name], DTYPES[dtype]), device)


# block_q columns of the convolution are block_q / 2 - 1 pooled ones: 7, 15, 31, of which "resnet-odd" has 6 and
# "wide-image" 38. "resnet-odd" has 5 pooled rows.
CONFIGS = {
    "16-columns-1-row": StemConfig(16, 64, 64, 1, 4, 2),
    "32-columns-2-rows": StemConfig(32, 32, 128, 2, 4, 2),
    "64-columns-3-rows": StemConfig(64, 32, 128, 3, 4, 2),
    "32-columns-5-rows": StemConfig(32, 64, 32, 5, 4, 2),
    "16-columns-8-rows": StemConfig(16, 64, 64, 8, 4, 2),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_tile_gives_the_same_stem(config: str, device: torch.device) -> None:
    check(StemProblem(replace(STEM_CASES["resnet-odd"].conv, batch=1)), device, CONFIGS[config])


@pytest.mark.parametrize("config", ["16-columns-1-row", "32-columns-2-rows"])
def test_strips_of_columns_meet(config: str, device: torch.device) -> None:
    """Neighbouring strips both compute the column between them."""
    check(STEM_CASES["wide-image"], device, CONFIGS[config])
