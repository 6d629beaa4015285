"""The last two convolutions of a bottleneck: in one kernel, gathered and over boxes, and as a pair of kernels."""

import pytest
import torch

from kernels.configs.config import BottleneckConfig, ConvConfig, PairConfig, unsupported_reason
from kernels.problems import with_dtype
from tests.kernels.cases import BOTTLENECK_CASES, DTYPES
from tests.kernels.launching import check, on_device, quick_boxes, quick_pair

NETWORK_NAMES = [name for name in BOTTLENECK_CASES if name.startswith(("64-", "128-", "256-", "512-"))]
ODD_NAMES = [name for name in BOTTLENECK_CASES if name not in NETWORK_NAMES]
BOXED_NAMES = [
    name
    for name, problem in BOTTLENECK_CASES.items()
    if problem.first.c_in % 16 == 0 and unsupported_reason(problem, quick_boxes(problem), None) is None
]


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_every_bottleneck_of_the_networks_in_fp16(name: str, device: torch.device) -> None:
    check(BOTTLENECK_CASES[name], device)


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_odd_shapes(name: str, dtype: str, device: torch.device) -> None:
    check(with_dtype(BOTTLENECK_CASES[name], DTYPES[dtype]), device)


@pytest.mark.parametrize("name", ["64-projection-s1", *ODD_NAMES])
def test_as_a_pair_of_kernels(name: str, device: torch.device) -> None:
    problem = BOTTLENECK_CASES[name]
    check(problem, device, on_device(quick_pair(problem), device))


@pytest.mark.parametrize("name", ["c_mid-40-residual", "c_mid-40-projection"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_as_a_pair_of_kernels_in_other_dtypes(name: str, dtype: str, device: torch.device) -> None:
    pair = PairConfig(ConvConfig(64, 64, 32, 4, 2, split_k=3), ConvConfig(32, 64, 32, 4, 2))
    check(with_dtype(BOTTLENECK_CASES[name], DTYPES[dtype]), device, pair)


@pytest.mark.parametrize("name", BOXED_NAMES)
def test_over_boxes(name: str, device: torch.device) -> None:
    problem = BOTTLENECK_CASES[name]
    check(problem, device, on_device(quick_boxes(problem), device))


def test_boxes_take_every_kind_of_shortcut() -> None:
    assert {"64-identity", "64-projection-s1", "c_mid-40-projection", "c_mid-40-no-shortcut"} <= {*BOXED_NAMES}
    assert not any("s2" in name or "stride" in name or "dilation" in name for name in BOXED_NAMES)


# "c_mid-40" has 2 images of 6x7 pixels, channels 32 -> 40 -> 72, and a projection of 48.
CONFIGS = {
    "16x64x32": BottleneckConfig(16, 64, 32, 4, 2),
    "32x64x32": BottleneckConfig(32, 64, 32, 4, 2),
    "64x32x64": BottleneckConfig(64, 32, 64, 4, 2),
    "box-2x2x4": BottleneckConfig(16, 32, 32, 4, 2, box=(2, 2, 4)),
    "box-1x4x8": BottleneckConfig(32, 16, 16, 4, 2, box=(1, 4, 8)),
    "box-4x8x2": BottleneckConfig(64, 64, 32, 4, 2, box=(4, 8, 2)),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["c_mid-40-residual", "c_mid-40-projection"])
def test_every_tile_gives_the_same_result(name: str, config: str, device: torch.device) -> None:
    check(BOTTLENECK_CASES[name], device, CONFIGS[config])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_boxes_in_other_dtypes(dtype: str, device: torch.device) -> None:
    check(with_dtype(BOTTLENECK_CASES["c_mid-40-projection"], DTYPES[dtype]), device, CONFIGS["box-1x4x8"])
