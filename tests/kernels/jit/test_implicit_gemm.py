"""The convolution over gathered pointers: plain, projected and with a split K."""

from dataclasses import replace

import pytest
import torch

from kernels.configs.convolution import ConvConfig
from kernels.problems import ConvProblem
from tests.kernels.cases import DTYPES, NETWORK_CASES, ODD_CASES, PROJECTION_CASES, SMALL
from tests.kernels.launching import check

CASES = {**NETWORK_CASES, **ODD_CASES, **PROJECTION_CASES}
# bfloat16 is float32 to the interpreter; on a GPU test_operators.py has every case in it.
OTHER_DTYPES = [("bf16", "small"), ("fp32", "3-64-7x7-s2"), ("fp32", "c_in-5"), ("fp32", "groups-2")]
OTHER_DTYPES += [("bf16", "even-image"), ("fp32", "tails-everywhere"), ("fp32", "kernel-5x2-stride-1x3")]


@pytest.mark.parametrize("name", CASES)
def test_convolutions_in_fp16(name: str, device: torch.device) -> None:
    check(CASES[name], device)


@pytest.mark.parametrize(("dtype", "name"), OTHER_DTYPES)
def test_convolutions_in_other_dtypes(dtype: str, name: str, device: torch.device) -> None:
    check(CASES[name].with_dtype(DTYPES[dtype]), device)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_epilogue_flags(residual: bool, relu: bool, device: torch.device) -> None:
    check(replace(ODD_CASES["groups-2"], has_residual=residual, relu=relu), device)
    check(replace(ODD_CASES["c_in-5"], dtype=torch.float32, has_residual=residual, relu=relu), device)


# Tiles smaller than the problem: block order, tails of M, N and K, and K slices in and across taps.
TILES: list[tuple[ConvProblem, tuple[int, int, int]]] = [
    (replace(SMALL, batch=5), (16, 16, 32)),  # 14 rows of blocks: more than share their weights
    (replace(SMALL, batch=1), (32, 16, 64)),
    (ODD_CASES["c_in-5"], (64, 32, 16)),
    (ODD_CASES["c_in-13-1x1"], (16, 64, 128)),
    (ODD_CASES["groups-2"], (32, 16, 16)),
    (PROJECTION_CASES["even-image"], (16, 16, 32)),
    (PROJECTION_CASES["tails-everywhere"], (64, 32, 16)),
]


@pytest.mark.parametrize(("problem", "tile"), TILES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_tile_gives_the_same_convolution(
    problem: ConvProblem, tile: tuple[int, int, int], device: torch.device
) -> None:
    check(problem, device, ConvConfig(*tile, 4, 2))


# K slices of 16: "small" has 18, "c_in-5" 3 (across taps), "groups-2" 9 in each group, "even-image" 18 and 3 of its
# projection, "tails-everywhere" 8 (across taps) and 3.
SPLITS = [
    ("small", 5),  # the last program gets 2 slices, the others 4
    ("small", 7),  # the last program gets none
    ("one-pixel-image", 6),
    ("c_in-5", 3),
    ("groups-2", 4),
    ("even-image", 4),  # the last program gets the projection's slices and 0 to 3 of the convolution's
    ("even-image", 21),
    ("tails-everywhere", 11),
]


@pytest.mark.parametrize(("name", "split_k"), SPLITS, ids=[f"{name}-by-{split_k}" for name, split_k in SPLITS])
def test_a_split_k_gives_the_same_convolution(name: str, split_k: int, device: torch.device) -> None:
    check(CASES[name], device, ConvConfig(64, 64, 16, 4, 2, split_k=split_k))


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "small"), ("bf16", "even-image")])
def test_a_split_k_in_other_dtypes(dtype: str, name: str, device: torch.device) -> None:
    check(CASES[name].with_dtype(DTYPES[dtype]), device, ConvConfig(32, 64, 16, 4, 2, split_k=5))
