"""What the rules choose is valid everywhere, and the boxes waste least."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from kernels.configs.config import conv_k_blocks
from kernels.configs.convolution import BoxedConfig, ConvConfig, box_of
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem, PairConfig
from kernels.operators.mean_linear import HeadConfig, HeadProblem
from kernels.plan import plan
from kernels.problems import ConvProblem, Problem, Projection
from tests.kernels.cases import CASES, DTYPES
from tests.kernels.networks import EXTRA, NETWORKS

BATCHES = (1, 8, 128, 8192)


def every_problem() -> set[Problem]:
    """From a few pixels to many millions."""
    networks = [problem for network in NETWORKS.values() for problem in network(1)]
    return {p.with_batch(batch) for p in (*CASES.values(), *EXTRA.values(), *networks) for batch in BATCHES}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_chosen_config_is_supported_and_fits(target: Target) -> None:
    """No tile is wider than its problem; each has the rows that tensor cores want, and slices to pipeline."""
    for problem, dtype in itertools.product(every_problem(), DTYPES.values()):
        typed = problem.with_dtype(dtype)
        config = heuristic_config(typed, target)
        assert config.unsupported_reason(typed, target) is None, typed
        launches = [(typed, config)]
        if isinstance(config, PairConfig):
            launches = [*zip(typed.parts, (config.first, config.second), strict=True)]
        for conv, chosen in launches:
            if not isinstance(chosen, ConvConfig):
                continue
            assert isinstance(conv, ConvProblem)
            assert chosen.block_n < 2 * max(16, conv.gemm_n), conv
            if dtype != torch.float32:
                rows = chosen.block_n if chosen.box else chosen.block_m
                assert not target.has_wgmma or (rows >= 64 and chosen.num_warps % 4 == 0), conv
                assert conv.gemm_k < 64 or conv_k_blocks(conv, chosen.block_k)[0] > 1, conv


def test_k_is_split_only_where_blocks_are_few() -> None:
    target = TARGETS["sm_90"]
    last = ConvProblem(1, 512, 7, 7, 512, (3, 3), padding=(1, 1), relu=True)
    few, many = heuristic_config(last, target), heuristic_config(replace(last, batch=128), target)
    assert isinstance(few, ConvConfig) and isinstance(many, ConvConfig)
    assert few.split_k > 1 and few.box is not None
    assert many.split_k == 1 and many.box is not None
    slices = sum(conv_k_blocks(last, few.block_k))
    assert -(-slices // few.split_k) * (few.split_k - 1) < slices, "a program without a slice"


def test_the_tile_with_the_least_work_is_chosen() -> None:
    """Where L2 is waited for, the largest; 98 of 128x128 for 132 multiprocessors are no more work than 196 halves."""
    target = TARGETS["sm_90"]
    wide, deep = (ConvProblem(32, c, size, size, c // 2, (1, 1), relu=True) for c, size in ((256, 56), (512, 28)))
    few = ConvProblem(32, 1024, 14, 14, 256, (1, 1), relu=True)
    configs = [heuristic_config(problem, target) for problem in (wide, deep, few)]
    assert [(c.block_m, c.block_n, c.split_k) for c in configs if isinstance(c, ConvConfig)] == [
        (256, 128, 1), (256, 128, 1), (128, 128, 1),
    ]  # fmt: skip
    pair = next(p for p in NETWORKS["resnet50"](32) if isinstance(p, BottleneckProblem) and p.has_residual)
    fused = heuristic_config(pair, target)
    assert isinstance(fused, BottleneckConfig) and (fused.block_m, fused.num_warps) == (256, 8)


def test_three_of_four_rows_exist_at_batch_1_on_few_multiprocessors() -> None:
    target = TARGETS["sm_87"]
    for problem in {problem for network in NETWORKS.values() for problem in network(1)}:
        for launch in heuristic_config(problem, target).launches(problem, target):
            conv, config = getattr(launch.problem, "convolution", None), launch.config
            if isinstance(config, BoxedConfig):
                assert isinstance(conv, ConvProblem)
                assert conv.gemm_m >= 0.75 * -(-conv.gemm_m // config.block_m) * config.block_m, launch.problem


def test_a_head_reads_its_features_again_only_where_images_are_few() -> None:
    """At batch 1 that is little beside the weights, which wait in registers; the partial sums are much less."""
    target, problem = TARGETS["sm_90"], HeadProblem(1, 2048, 7, 7, 1000)
    shares = []
    for batch in (1, 32, 128, 256):
        config = heuristic_config(replace(problem, batch=batch), target)
        assert isinstance(config, HeadConfig)
        shares.append(config.shares)
    assert shares == [4, 4, 2, 1]
    (launch,) = plan(problem, heuristic_config(problem, target), target)
    moved = 4 * problem.activation_bytes + problem.weight_bytes + 2 * 4 * launch.partials
    assert moved < 1.25 * (problem.activation_bytes + problem.weight_bytes)
    assert launch.scalars["N_BLOCKS"] == 1


def test_boxes_and_fusion_are_chosen_where_they_can_be() -> None:
    pair = next(p for p in NETWORKS["resnet50"](32) if isinstance(p, BottleneckProblem) and p.has_residual)
    for target in TARGETS.values():
        config = heuristic_config(pair, target)
        assert isinstance(config, BottleneckConfig)
        assert (config.box is not None) == target.has_tma


@pytest.mark.parametrize("problem", [*CASES.values()][::19], ids=[*CASES][::19])
def test_what_no_config_can_run_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match=r"no configuration for \w+Problem.* on sm_80: dtype is torch.float64"):
        heuristic_config(problem.with_dtype(torch.float64), TARGETS["sm_80"])


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("size", [(1, 56, 56), (2, 28, 28), (32, 14, 14), (5, 7, 7), (1, 7, 7), (3, 33, 1)], ids=str)
def test_the_box_computes_the_fewest_pixels(size: tuple[int, int, int], block_m: int) -> None:
    problem = ConvProblem(size[0], 64, size[1], size[2], 64, (3, 3), padding=(1, 1))
    box = box_of(problem, block_m)

    def computed(size: tuple[int, ...], box: tuple[int, ...]) -> int:
        return math.prod(-(-pixels // side) * side for pixels, side in zip(size, box, strict=True))

    powers = [2**e for e in range(8)]
    boxes = [sides for sides in itertools.product(powers, repeat=3) if math.prod(sides) == block_m]
    least = min(computed(size, sides) for sides in boxes)
    assert computed(size, box) == least
    assert box[0] == min(sides[0] for sides in boxes if computed(size, sides) == least), "fewest images"


def test_the_box_of_a_dense_convolution_is_a_row() -> None:
    assert box_of(ConvProblem(2, 64, 7, 7, 64, (1, 1)), 128) == (1, 1, 128)
    strided = ConvProblem(2, 64, 8, 8, 64, (1, 1), projection=Projection(64, 16, 16, (2, 2)))
    assert box_of(strided, 128) == (2, 8, 8)
