"""Every kernel on every case, and under configurations that the property tests do not draw."""

from dataclasses import replace

import pytest
import torch

from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemProblem, StemWindowsConfig
from kernels.operators.mean_linear import HeadConfig, HeadProblem
from kernels.problems import Problem
from tests.kernels.cases import (
    CASES,
    ODD_CASES,
    PROJECTION_CASES,
    SMALL,
    STEM_CASES,
    projected,
)
from tests.kernels.launching import check


@pytest.mark.parametrize("name", CASES)
def test_every_case_in_fp16(name: str, device: torch.device) -> None:
    check(CASES[name], device)


def split(parts: int) -> ConvConfig:
    return ConvConfig(64, 64, 16, 4, 2, split_k=parts)


def boxed(n: int, p: int, q: int, block_n: int = 32, block_k: int = 16, programs_per_sm: int = 0) -> ConvConfig:
    return ConvConfig(n * p * q, block_n, block_k, 4, 2, box=(n, p, q), programs_per_sm=programs_per_sm)


HEAD = HeadProblem(5, 70, 5, 7, 33)
WINDOWS = StemWindowsConfig(32, 64, 32, 2, 4, 2)
DENSE = replace(SMALL, kernel=(1, 1), padding=(0, 0))
DEEP = replace(SMALL, c_in=256, height=3, width=4)
# "small" has 2 images of 6x7 pixels, 32 channels in and 40 out.
LAUNCHES: dict[str, tuple[Problem, Config]] = {
    # 14 rows of blocks: more than share their weights.
    "tiles-14-rows": (replace(SMALL, batch=5), ConvConfig(16, 16, 32, 4, 2)),
    "tiles-c_in-13-1x1": (ODD_CASES["c_in-13-1x1"], ConvConfig(16, 64, 128, 4, 2)),
    "tiles-tails-everywhere": (PROJECTION_CASES["tails-everywhere"], ConvConfig(64, 32, 16, 4, 2)),
    # K slices of 16: "small" has 18, "groups-2" 9 in each group, "even-image" 18 and 3 of its projection,
    # "tails-everywhere" 8 (across taps) and 3.
    "split-last-gets-2-slices": (SMALL, split(5)),
    "split-last-gets-none": (SMALL, split(7)),
    "split-one-pixel-image": (ODD_CASES["one-pixel-image"], split(6)),
    "split-groups-2": (ODD_CASES["groups-2"], split(4)),
    "split-slice-each": (PROJECTION_CASES["even-image"], split(21)),
    "split-tails-everywhere": (PROJECTION_CASES["tails-everywhere"], split(11)),
    # A slice of 128 channels is loaded in two parts; 36 taps do not fit one word of masks.
    "slices-of-128": (DEEP, ConvConfig(16, 32, 128, 4, 2)),
    "slices-of-128-channels-left": (replace(DEEP, c_in=200), ConvConfig(16, 32, 128, 4, 2)),
    "kernel-6x6": (replace(SMALL, c_in=16, kernel=(6, 6), padding=(3, 2)), ConvConfig(32, 64, 16, 4, 2)),
    "boxes-slices-of-128": (DEEP, boxed(2, 2, 4, 64, 128)),
    "boxes-split-last-gets-2-slices": (SMALL, replace(boxed(1, 4, 8), split_k=4)),
    "boxes-split-last-gets-none": (SMALL, replace(boxed(1, 4, 8), split_k=7)),
    "boxes-split-dense-persistent": (DENSE, replace(boxed(1, 1, 32, programs_per_sm=3), split_k=2)),
    "boxes-split-over-projection": (PROJECTION_CASES["even-image"], replace(boxed(2, 4, 4), split_k=8)),
    "boxes-dense": (DENSE, boxed(1, 1, 64)),
    "boxes-dense-persistent": (DENSE, boxed(1, 1, 64, programs_per_sm=1)),
    "boxes-tail-in-n": (replace(SMALL, batch=5), boxed(2, 2, 8)),
    "boxes-tail-in-n-persistent": (replace(SMALL, batch=5), boxed(2, 2, 8, programs_per_sm=2)),
    "boxes-over-everything": (SMALL, boxed(4, 8, 8, 64, 32)),
    "boxes-one-image-per-lane": (replace(SMALL, batch=5, height=2, width=3), boxed(16, 1, 1)),
    "boxes-one-column-per-lane": (ODD_CASES["image-3x50"], boxed(1, 1, 16, 64, 32)),
    "boxes-one-row-per-lane": (ODD_CASES["image-33x1"], boxed(1, 16, 1)),
    "boxes-one-pixel-image": (ODD_CASES["one-pixel-image"], boxed(2, 4, 2)),
    "boxes-c_out-7": (replace(SMALL, c_out=7), boxed(1, 4, 8, 16)),
    "boxes-c_in-48": (replace(SMALL, c_in=48), boxed(1, 4, 8)),
    "boxes-padding-2x0": (ODD_CASES["padding-2x0"], boxed(2, 4, 4)),
    "boxes-padding-over-kernel": (ODD_CASES["padding-over-kernel"], boxed(1, 4, 4)),
    "boxes-kernel-1x7": (ODD_CASES["kernel-1x7"], boxed(1, 2, 8)),
    "boxes-kernel-is-the-image": (ODD_CASES["kernel-is-the-image"], boxed(16, 1, 1)),
    "boxes-projection-even-image": (PROJECTION_CASES["even-image"], boxed(2, 4, 4)),
    "boxes-projection-1x3": (PROJECTION_CASES["stride-1x3"], boxed(2, 4, 4)),
    "boxes-projection-dense": (projected(DENSE, 48), boxed(1, 1, 64)),
    "boxes-projection-dense-strided": (projected(DENSE, 48, (2, 2), beyond=1), boxed(1, 4, 8)),
    "boxes-projection-one-pixel": (PROJECTION_CASES["one-pixel-image"], boxed(2, 4, 2)),
    # block_q columns of the convolution are block_q / 2 - 1 pooled ones: 7, 15, 31, of which "resnet-odd" has 6 and
    # "wide-image" 38; neighbouring strips both compute the column between them. "resnet-odd" has 5 pooled rows.
    "stem-one-row": (STEM_CASES["resnet-odd"].with_batch(1), StemConfig(16, 64, 64, 1, 4, 2)),
    "stem-3-rows": (STEM_CASES["resnet-odd"].with_batch(1), StemConfig(64, 32, 128, 3, 4, 2)),
    "stem-8-rows": (STEM_CASES["resnet-odd"].with_batch(1), StemConfig(16, 64, 64, 8, 4, 2)),
    "stem-6-strips": (STEM_CASES["wide-image"], StemConfig(16, 64, 64, 1, 4, 2)),
    "stem-3-strips": (STEM_CASES["wide-image"], StemConfig(32, 32, 128, 2, 4, 2)),
    # 33 classes in blocks of 16: two programs of two blocks each, the last of which has none.
    "head-one-image": (HEAD, HeadConfig(1, 64, 32, 8)),
    "head-4-images-2-shares": (HEAD, HeadConfig(4, 16, 16, 4, shares=2)),
    "head-32-images-3-shares": (HEAD, HeadConfig(32, 16, 128, 4, shares=3)),
    # Windows of several images in one strip, 2 images of 5 pooled columns and one strip to a row of 7; blocks of 4 and
    # 3 pooled rows; K across slices; of float32, where every element is a vector.
    "windows-strip-per-row": (STEM_CASES["resnet-even"], StemWindowsConfig(16, 64, 16, 1, 4, 2)),
    "windows-3-rows": (STEM_CASES["resnet-even"], StemWindowsConfig(32, 32, 64, 3, 4, 2)),
    "windows-odd-sizes": (StemProblem(replace(STEM_CASES["resnet-odd"].conv, height=17, width=22)), WINDOWS),
    "windows-fp32": (STEM_CASES["resnet-odd"].with_dtype(torch.float32), WINDOWS),
    "windows-heads-and-tails": (StemProblem(replace(STEM_CASES["resnet-even"].conv, padding=(3, 2))), WINDOWS),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_tile_gives_the_same_result(name: str, device: torch.device) -> None:
    problem, config = LAUNCHES[name]
    check(problem, device, config)
