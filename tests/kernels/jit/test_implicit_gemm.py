"""The convolution over gathered pointers: plain, projected and with a split K."""

from dataclasses import replace

import pytest
import torch

from kernels.configs.config import ConvConfig
from kernels.problems import ConvProblem
from tests.kernels.cases import (
    CIFAR_RESNET20,
    DTYPES,
    NETWORK_CASES,
    ODD_CASES,
    PROJECTION_CASES,
    RESNET18,
    RESNET50,
)
from tests.kernels.launching import check

SMALL_CASES = ["small", "c_in-5", "c_in-13-1x1", "groups-2", "even-image", "tails-everywhere"]
CASES = {**ODD_CASES, **PROJECTION_CASES}


def is_of_a_resnet(problem: ConvProblem) -> bool:
    shape = (problem.c_in, problem.c_out, problem.kernel[0], problem.stride[0], problem.padding[0], problem.groups)
    return shape in RESNET18 + RESNET50 + CIFAR_RESNET20


# Of a ResNeXt the grouped convolutions only, since every shape of the others is among a ResNet's.
NETWORK_NAMES = [name for name, problem in NETWORK_CASES.items() if problem.groups > 1 or is_of_a_resnet(problem)]


def with_four_groups(problem: ConvProblem) -> ConvProblem:
    """4 of the 32 groups of a ResNeXt: each is a launch of its own to the interpreter."""
    if problem.groups != 32:
        return problem
    return replace(problem, c_in=problem.c_in // 8, c_out=problem.c_out // 8, groups=4)


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_every_convolution_of_the_networks_in_fp16(name: str, device: torch.device) -> None:
    check(with_four_groups(NETWORK_CASES[name]), device)


@pytest.mark.parametrize("name", ["3-64-7x7-s2", "64-256-1x1-s1", "64-128-3x3-s2", "128-128-3x3-s1-g32"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_convolutions_of_the_networks_in_other_dtypes(name: str, dtype: str, device: torch.device) -> None:
    check(replace(with_four_groups(NETWORK_CASES[name]), dtype=DTYPES[dtype]), device)


@pytest.mark.parametrize("name", ODD_CASES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_odd_shapes(name: str, dtype: str, device: torch.device) -> None:
    """bfloat16 is float32 to the interpreter; on a GPU test_operators.py has every case in it."""
    check(replace(ODD_CASES[name], dtype=DTYPES[dtype]), device)


@pytest.mark.parametrize("name", PROJECTION_CASES)
def test_projections_in_fp16(name: str, device: torch.device) -> None:
    check(PROJECTION_CASES[name], device)


@pytest.mark.parametrize("name", ["bottleneck-64-s1", "even-image", "tails-everywhere"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_projections_in_other_dtypes(name: str, dtype: str, device: torch.device) -> None:
    check(replace(PROJECTION_CASES[name], dtype=DTYPES[dtype]), device)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_flags(dtype: str, residual: bool, relu: bool, device: torch.device) -> None:
    for name in ("small", "c_in-5", "groups-2"):
        check(replace(ODD_CASES[name], dtype=DTYPES[dtype], has_residual=residual, relu=relu), device)


@pytest.mark.parametrize(
    "tile",
    [(16, 64, 32, 1), (32, 16, 64, 2), (64, 32, 16, 3), (16, 16, 128, 8)],
    ids=lambda tile: "x".join(map(str, tile)),
)
@pytest.mark.parametrize("name", SMALL_CASES)
def test_every_tile_gives_the_same_convolution(
    name: str, tile: tuple[int, int, int, int], device: torch.device
) -> None:
    """Tiles smaller than the problem: block order, tails of M, N and K, and K slices in and across taps."""
    block_m, block_n, block_k, group_m = tile
    check(replace(CASES[name], batch=1), device, ConvConfig(block_m, block_n, block_k, 4, 2, group_m))


# K slices of 16: "small" has 18, "c_in-5" 3 (across taps), "groups-2" 9 in each group, "even-image" 18 and 3 of its
# projection, "tails-everywhere" 8 (across taps) and 3.
SPLITS = [
    ("small", 2),
    ("small", 5),  # the last program gets 2 slices, the others 4
    ("small", 7),  # the last program gets none
    ("small", 18),
    ("one-pixel-image", 6),
    ("c_in-5", 3),
    ("groups-2", 4),
    ("groups-4-1x1", 1),
    ("dilation-2", 3),
    ("even-image", 4),  # the last program gets the projection's slices and 0 to 3 of the convolution's
    ("even-image", 6),
    ("even-image", 21),
    ("tails-everywhere", 11),
]


@pytest.mark.parametrize(("name", "split_k"), SPLITS, ids=[f"{name}-by-{split_k}" for name, split_k in SPLITS])
def test_a_split_k_gives_the_same_convolution(name: str, split_k: int, device: torch.device) -> None:
    check(CASES[name], device, ConvConfig(64, 64, 16, 4, 2, split_k=split_k))


@pytest.mark.parametrize("name", ["small", "even-image"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_split_k_in_other_dtypes(name: str, dtype: str, device: torch.device) -> None:
    check(replace(CASES[name], dtype=DTYPES[dtype]), device, ConvConfig(32, 64, 16, 4, 2, split_k=5))
