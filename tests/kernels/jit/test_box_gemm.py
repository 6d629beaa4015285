"""The convolution over TMA boxes: dense, with padding, persistent and projected."""

from dataclasses import dataclass, replace

import pytest
import torch

from kernels.configs.convolution import ConvConfig
from kernels.problems import ConvProblem
from tests.kernels.cases import DTYPES, NETWORK_CASES, ODD_CASES, PROJECTION_CASES, SMALL, projected
from tests.kernels.launching import check, on_device, quick_boxes

Box = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    problem: ConvProblem
    box: Box
    block_n: int = 32
    block_k: int = 16


DENSE = replace(SMALL, kernel=(1, 1), padding=(0, 0))

# "small" has 2 images of 6x7 pixels, 32 channels in and 40 out.
CASES = {
    "dense": Case(DENSE, (1, 1, 64)),
    "dense-one-pixel": Case(replace(DENSE, batch=1, height=1, width=1), (1, 1, 16)),
    "tails-in-p-and-q": Case(SMALL, (1, 4, 4)),
    "tail-in-n": Case(replace(SMALL, batch=5), (2, 2, 8)),
    "box-over-everything": Case(SMALL, (4, 8, 8), 64, 32),
    "one-image-per-lane": Case(replace(SMALL, batch=5, height=2, width=3), (16, 1, 1)),
    "one-column-per-lane": Case(ODD_CASES["image-3x50"], (1, 1, 16), 64, 32),
    "one-row-per-lane": Case(ODD_CASES["image-33x1"], (1, 16, 1)),
    "one-pixel-image": Case(ODD_CASES["one-pixel-image"], (2, 4, 2)),
    "c_out-7": Case(replace(SMALL, c_out=7), (1, 4, 8), 16),
    "c_in-48": Case(replace(SMALL, c_in=48), (1, 4, 8)),
    "padding-2x0": Case(ODD_CASES["padding-2x0"], (2, 4, 4)),
    "padding-over-kernel": Case(ODD_CASES["padding-over-kernel"], (1, 4, 4)),
    "kernel-1x7": Case(ODD_CASES["kernel-1x7"], (1, 2, 8)),
    "kernel-is-the-image": Case(ODD_CASES["kernel-is-the-image"], (16, 1, 1)),
    "linear": Case(replace(SMALL, has_residual=False, relu=False), (1, 4, 8)),
    "projection": Case(PROJECTION_CASES["stride-1"], (1, 4, 8)),
    "projection-odd-image": Case(PROJECTION_CASES["odd-image"], (1, 4, 8)),
    "projection-even-image": Case(PROJECTION_CASES["even-image"], (2, 4, 4)),
    "projection-1x3": Case(PROJECTION_CASES["stride-1x3"], (2, 4, 4)),
    "projection-dense": Case(projected(DENSE, 48), (1, 1, 64)),
    "projection-dense-strided": Case(projected(DENSE, 48, (2, 2), beyond=1), (1, 4, 8)),
    "projection-one-pixel": Case(PROJECTION_CASES["one-pixel-image"], (2, 4, 2)),
}


def config_of(case: Case, programs_per_sm: int = 0) -> ConvConfig:
    block_m = case.box[0] * case.box[1] * case.box[2]
    return ConvConfig(block_m, case.block_n, case.block_k, 4, 2, box=case.box, programs_per_sm=programs_per_sm)


@pytest.mark.parametrize("name", CASES)
def test_boxes(name: str, device: torch.device) -> None:
    check(CASES[name].problem, device, config_of(CASES[name]))


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "tails-in-p-and-q"), ("bf16", "projection-even-image")])
def test_boxes_in_other_dtypes(dtype: str, name: str, device: torch.device) -> None:
    case = CASES[name]
    check(case.problem.with_dtype(DTYPES[dtype]), device, config_of(case))


@pytest.mark.parametrize(
    ("name", "programs_per_sm"), [("dense", 1), ("tail-in-n", 2), ("projection-odd-image", 1), ("dense-one-pixel", 2)]
)
def test_persistent_programs(name: str, programs_per_sm: int, device: torch.device) -> None:
    """The interpreter has one multiprocessor: one or two programs take all blocks."""
    check(CASES[name].problem, device, config_of(CASES[name], programs_per_sm))


NETWORKS = {name: NETWORK_CASES[name] for name in ("64-256-1x1-s1", "2048-512-1x1-s1", "256-256-3x3-s1")}
NETWORKS |= {name: PROJECTION_CASES[name] for name in ("basic-512", "bottleneck-256-s2")}


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_of_the_networks(name: str, device: torch.device) -> None:
    check(NETWORKS[name], device, on_device(quick_boxes(NETWORKS[name]), device))
