"""The last two convolutions of a bottleneck: in one kernel, gathered and over boxes, and as a pair of kernels."""

import pytest
import torch

from kernels.configs.convolution import ConvConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, PairConfig
from tests.kernels.cases import BOTTLENECK_CASES, DTYPES
from tests.kernels.launching import check, on_device, quick_boxes, quick_pair

ODD_NAMES = [name for name in BOTTLENECK_CASES if not name.startswith(("64-", "128-", "256-", "512-"))]
BOXED_NAMES = [
    name
    for name, problem in BOTTLENECK_CASES.items()
    if problem.first.c_in % 16 == 0 and quick_boxes(problem).unsupported_reason(problem, None) is None
]


@pytest.mark.parametrize("name", BOTTLENECK_CASES)
def test_bottlenecks_in_fp16(name: str, device: torch.device) -> None:
    check(BOTTLENECK_CASES[name], device)


@pytest.mark.parametrize("name", ["c_mid-40-residual", "tails-everywhere"])
def test_bottlenecks_in_fp32(name: str, device: torch.device) -> None:
    check(BOTTLENECK_CASES[name].with_dtype(torch.float32), device)


@pytest.mark.parametrize("name", ["64-projection-s1", *ODD_NAMES])
def test_as_a_pair_of_kernels(name: str, device: torch.device) -> None:
    problem = BOTTLENECK_CASES[name]
    check(problem, device, on_device(quick_pair(problem), device))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_as_a_pair_of_kernels_in_other_dtypes(dtype: str, device: torch.device) -> None:
    pair = PairConfig(ConvConfig(64, 64, 32, 4, 2, split_k=3), ConvConfig(32, 64, 32, 4, 2))
    check(BOTTLENECK_CASES["c_mid-40-projection"].with_dtype(DTYPES[dtype]), device, pair)


@pytest.mark.parametrize("name", BOXED_NAMES)
def test_over_boxes(name: str, device: torch.device) -> None:
    problem = BOTTLENECK_CASES[name]
    check(problem, device, on_device(quick_boxes(problem), device))


def test_boxes_take_every_kind_of_shortcut() -> None:
    assert {"64-identity", "64-projection-s1", "c_mid-40-projection", "c_mid-40-no-shortcut"} <= {*BOXED_NAMES}
    assert not any("s2" in name or "stride" in name or "dilation" in name for name in BOXED_NAMES)


# "c_mid-40" has 2 images of 6x7 pixels, channels 32 -> 40 -> 72, and a projection of 48.
TILES = [
    ("c_mid-40-projection", "fp16", BottleneckConfig(16, 64, 32, 4, 2)),
    ("c_mid-40-residual", "bf16", BottleneckConfig(64, 32, 64, 4, 2)),
    ("c_mid-40-residual", "fp16", BottleneckConfig(16, 32, 32, 4, 2, box=(2, 2, 4))),
    ("c_mid-40-projection", "fp32", BottleneckConfig(32, 16, 16, 4, 2, box=(1, 4, 8))),
    ("c_mid-40-projection", "fp16", BottleneckConfig(64, 64, 32, 4, 2, box=(4, 8, 2))),
]


@pytest.mark.parametrize(("name", "dtype", "config"), TILES, ids=range(len(TILES)))
def test_every_tile_gives_the_same_result(
    name: str, dtype: str, config: BottleneckConfig, device: torch.device
) -> None:
    check(BOTTLENECK_CASES[name].with_dtype(DTYPES[dtype]), device, config)
