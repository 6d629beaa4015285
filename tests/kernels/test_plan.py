"""A launch names every parameter of its kernel once, and its grid covers the output."""

from dataclasses import replace

import pytest

from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemWindowsConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig
from kernels.operators.mean_linear import HeadConfig
from kernels.plan import kernel_of, plan
from kernels.problems import Problem
from tests.kernels.cases import BOTTLENECK_CASES, CASES, HEAD_CASES, SMALL, STEM_CASES
from tests.kernels.networks import NETWORKS

CONFIG = ConvConfig(32, 16, 16, 4, 2)
SPLIT = replace(CONFIG, split_k=5)
BOXES = replace(CONFIG, box=(1, 4, 8))


@pytest.mark.parametrize("target", [*TARGETS.values(), None], ids=[*TARGETS, "interpreter"])
def test_every_parameter_of_the_kernel_is_given_once(target: Target | None) -> None:
    for problem in CASES.values():
        for launch in plan(problem, heuristic_config(problem, target or TARGETS["sm_90"]), target):
            given = [*launch.operands, *launch.scalars]
            assert sorted(given) == sorted(kernel_of(launch).arg_names), problem
            assert launch.options.get("launch_pdl", False) == launch.scalars["USE_PDL"]
            assert launch.scalars["USE_PDL"] == (target is not None and target.has_pdl)


GRIDS: dict[str, tuple[Problem, Config, tuple[int, ...], int]] = {
    # 2 images of 6x7 pixels, 40 channels: 3 x 3 blocks, or 2 x 2 x 1 boxes of 1x4x8 by 3 blocks of channels.
    "gathered": (SMALL, CONFIG, (9, 1), 0),
    "grouped": (replace(SMALL, groups=2), CONFIG, (6, 2), 0),
    "split": (SMALL, SPLIT, (45, 1), 9),
    "split-grouped": (replace(SMALL, groups=2), SPLIT, (30, 2), 12),
    "boxes": (SMALL, BOXES, (12,), 0),
    "persistent": (SMALL, replace(BOXES, programs_per_sm=2), (2,), 0),
    "dense-boxes": (replace(SMALL, kernel=(1, 1), padding=(0, 0)), replace(CONFIG, box=(1, 1, 32)), (9,), 0),
    "bottleneck": (BOTTLENECK_CASES["c_mid-40-residual"], BottleneckConfig(32, 16, 16, 4, 2), (3,), 0),
    "bottleneck-boxes": (
        BOTTLENECK_CASES["c_mid-40-residual"], BottleneckConfig(32, 16, 16, 4, 2, box=(1, 4, 8)), (4,), 0,
    ),
    # 2 images of 5x6 pooled pixels, 64 channels: 3 strips of 2 rows, one strip of 7 columns, 4 blocks of channels.
    "stem": (STEM_CASES["resnet-odd"], StemConfig(16, 16, 16, 2, 4, 2), (6, 1, 4), 0),
    "stem-strips": (STEM_CASES["wide-image"], StemConfig(16, 64, 16, 2, 4, 2), (1, 6, 1), 0),
    # 2 images of 4x5 pooled pixels, next to each other: 2 strips of 7 columns, 2 strips of rows, 4 blocks of channels.
    "stem-windows": (STEM_CASES["resnet-even"], StemWindowsConfig(16, 16, 16, 2, 1, 2), (2, 2, 4), 0),
    # 17 images, 64 channels, 10 classes: 2 blocks of images by 4 splits.
    "head": (HEAD_CASES["resnet20"], HeadConfig(16, 16, 16, 4), (8,), 2),
    # 5 images in 2 blocks, 16 splits of channels, 16 blocks of classes: 7 shares would be 3 each, and so are 6.
    "head-shares": (HEAD_CASES["resnet18"], HeadConfig(4, 64, 32, 8, shares=7), (192,), 12),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_the_grid_covers_the_output(name: str) -> None:
    problem, config, grid, tiles = GRIDS[name]
    (launch,) = plan(problem, config, None)
    assert (launch.grid, launch.tiles) == (grid, tiles)
    splits = launch.scalars.get("SPLIT_K", 1)
    block = launch.scalars.get("BLOCK_M", 0) * launch.scalars["BLOCK_N"] * launch.scalars.get("N_BLOCKS", 1)
    assert launch.partials == tiles * splits * block


def test_persistent_programs_are_at_most_the_blocks() -> None:
    (launch,) = plan(SMALL, replace(BOXES, programs_per_sm=1), TARGETS["sm_90"])
    assert launch.grid == (12,)
    (launch,) = plan(replace(SMALL, batch=128), replace(BOXES, programs_per_sm=2), TARGETS["sm_90"])
    assert launch.grid == (2 * 132,)


# What fusion is for: the launches of one forward pass, at most; more where a fused bottleneck would have fewer programs
# than there are multiprocessors.
@pytest.mark.parametrize(("network", "most", "larger"), [("resnet18", 18, 18), ("resnet50", 37, 43)])
def test_a_network_is_few_launches(network: str, most: int, larger: int) -> None:
    problems = NETWORKS[network](32)
    for target in TARGETS.values():
        launches = [plan(problem, heuristic_config(problem, target), target) for problem in problems]
        many = not target.has_tma and target.multiprocessors > 6272 // 64  # pixels of layer 3 by those of a tile
        assert len(problems) <= sum(map(len, launches)) <= (larger if many else most)
