"""Which configuration goes with which problem where nobody has measured: one function per operator."""

import functools
import math
from dataclasses import replace

import torch

from kernels.configs.config import (
    MAX_GATHERED_PER_THREAD,
    MIN_BLOCK,
    BottleneckConfig,
    Config,
    ConvConfig,
    HeadConfig,
    PairConfig,
    StemConfig,
    block_mid,
    conv_k_blocks,
    unsupported_reason,
)
from kernels.configs.targets import Target
from kernels.problems import BottleneckProblem, ConvProblem, HeadProblem, Problem, StemProblem

# (block_m, block_n, num_warps), largest first. Beyond 128x128 a tile spills; at 64 rows and fewer the weights are
# read so often that a smaller tile only pays when it is what fills the GPU.
_TENSOR_CORE_TILES = (
    (128, 128, 8),
    (128, 64, 4),
    (64, 64, 4),
    (64, 32, 4),
    (32, 32, 4),
    (128, 16, 4),
    (64, 16, 4),
)
# IEEE float32 runs on the ordinary FMA units: a thread keeps slices of both operands in registers, so 32
# accumulators are enough work and leave room for them. 32x64 and not 64x32: there ptxas squeezes a 3x3 convolution
# into 80 registers for one more block per multiprocessor, and spills on sm_90 and sm_120.
_FMA_TILES = (
    (64, 64, 4),
    (32, 64, 4),
    (32, 32, 4),
    (64, 16, 4),
)
# A split shorter than this many K slices spends more on its partial sum than it saves.
_MIN_SLICES_PER_SPLIT = 4
_MAX_SPLIT_K = 16
# Accumulators per thread beside the addresses of two gathered operands: 64 spill on sm_86 and sm_120, in float32 on
# ordinary FMA units also 32.
_GATHERED_PER_THREAD = 32
# Rows of a fused bottleneck and its warps, largest first; 64 accumulators per thread at most.
_BOTTLENECK_ROWS = ((128, 4), (128, 8), (64, 4), (64, 8), (32, 4), (32, 8))
# Columns, K slice and stages of a fused bottleneck, the deepest pipeline that fits first.
_BOTTLENECK_SLICES = ((64, 64, 3), (64, 64, 2), (64, 32, 3), (64, 32, 2), (32, 32, 2))
# Wider than this, the first convolution's tile leaves too few rows per program to reuse its weights.
_WIDEST_BOTTLENECK = 256


def heuristic_config(problem: Problem, target: Target) -> Config:
    """A configuration that is valid for `problem` on `target`, chosen by rules and not by measurement.

    Raises:
        ValueError: no configuration can run it (dtype, too many output pixels or groups).
    """
    if isinstance(problem, ConvProblem):
        config: Config = _conv_config(problem, target)
    elif isinstance(problem, BottleneckProblem):
        config = _bottleneck_config(problem, target) or PairConfig(
            _conv_config(problem.first, target), _conv_config(problem.second, target)
        )
    elif isinstance(problem, StemProblem):
        config = _stem_config(problem, target)
    else:
        config = _head_config(problem)
    reason = unsupported_reason(problem, config, target)
    if reason is not None:
        raise ValueError(f"no configuration for {problem} on {target.name}: {reason}")
    return config


def _conv_config(problem: ConvProblem, target: Target) -> ConvConfig:
    block_m, block_n, num_warps = _tile(problem, target)
    block_k = _block_k(problem)
    if not problem.loads_are_vectors and block_m * block_k > MAX_GATHERED_PER_THREAD * 32 * num_warps:
        num_warps *= 2
    config = ConvConfig(block_m, block_n, block_k, num_warps, num_stages=2)
    slices = sum(conv_k_blocks(problem, block_k))
    programs = _programs(problem, block_m, block_n)
    if 2 * programs <= target.multiprocessors and problem.dtype != torch.float32:
        split_k = min(target.multiprocessors // programs, slices // _MIN_SLICES_PER_SPLIT, _MAX_SPLIT_K)
        config = replace(config, split_k=max(1, split_k))
    boxed = replace(config, box=box_of(problem, block_m))
    if problem.dtype != torch.float32 and unsupported_reason(problem, boxed, target) is None:
        config = boxed
    elif problem.projection is not None and problem.dtype == torch.float32:
        config = replace(config, block_m=min(block_m, 32), block_n=min(block_n, 32), num_warps=4)
    elif problem.projection is not None and block_m * block_n > _GATHERED_PER_THREAD * 32 * num_warps:
        config = replace(config, block_m=min(block_m, 64), block_n=min(block_n, 64), num_warps=4)
    # s stages keep s - 1 slices in flight: as many as there are and as fit. Beyond 4 the extra ones only take shared
    # memory from a second program on the same multiprocessor.
    for num_stages in range(min(4, slices // config.split_k + 1), 2, -1):
        deeper = replace(config, num_stages=num_stages)
        if unsupported_reason(problem, deeper, target) is None:
            return deeper
    return config


def _programs(problem: ConvProblem, block_m: int, block_n: int) -> int:
    return -(-problem.gemm_m // block_m) * -(-problem.gemm_n // block_n) * problem.groups


def _block_k(problem: ConvProblem) -> int:
    if problem.dtype == torch.float32:
        return 16
    # 64 half-precision channels are one 128-byte line per pixel. Not when K would then be a single slice, which
    # leaves nothing to pipeline, nor when element-wise loads would need twice the registers.
    if problem.c_in_per_group >= 64 and problem.gemm_k > 64 and problem.loads_are_vectors:
        return 64
    return 32


def _tile(problem: ConvProblem, target: Target) -> tuple[int, int, int]:
    on_tensor_cores = problem.dtype != torch.float32
    tiles = _TENSOR_CORE_TILES if on_tensor_cores else _FMA_TILES
    # A tile wider than C_OUT computes columns nobody stores; narrower than 32 re-reads x for every 16 columns.
    widest = max(MIN_BLOCK, 1 << (problem.gemm_n - 1).bit_length())
    narrowest = min(32, widest)
    # Below 64 rows sm_90 falls back from WGMMA to the HMMA of its predecessors.
    fewest_rows = 64 if on_tensor_cores and target.has_wgmma else 32
    fitting = [tile for tile in tiles if narrowest <= tile[1] <= widest and tile[0] >= fewest_rows]
    for block_m, block_n, num_warps in fitting:
        if _programs(problem, block_m, block_n) >= target.multiprocessors:
            return block_m, block_n, num_warps
    # Batch 1: no tile fills the GPU, the smallest comes nearest, and splitting K does the rest.
    return fitting[-1]


@functools.cache
def box_of(problem: ConvProblem, block_m: int) -> tuple[int, int, int]:
    """(images, rows, columns) of block_m output pixels such that the fewest lie outside the output.

    A dense convolution is one image of one row. Of equally good boxes the one with the fewest images is taken, whose
    halo of neighbouring pixels is smallest.
    """
    if problem.is_dense:
        return 1, 1, block_m
    powers = [1 << e for e in range(block_m.bit_length())]
    boxes = [(block_m // (p * q), p, q) for p in powers for q in powers if p * q <= block_m]
    sizes = (problem.batch, problem.out_height, problem.out_width)

    def computed(box: tuple[int, int, int]) -> int:
        return math.prod(-(-size // side) * side for size, side in zip(sizes, box, strict=True))

    return min(boxes, key=lambda box: (computed(box), box[0], abs(box[1] - box[2])))


def _bottleneck_config(problem: BottleneckProblem, target: Target) -> BottleneckConfig | None:
    """The fused kernel, where it has enough programs to keep the GPU busy; None: two kernels are better."""
    mid = block_mid(problem)
    if problem.dtype == torch.float32 or problem.first.groups > 1 or mid > _WIDEST_BOTTLENECK:
        return None
    fewest_rows = 64 if target.has_wgmma else 32
    for block_m, num_warps in _BOTTLENECK_ROWS:
        if block_m < fewest_rows or block_m * mid > 64 * 32 * num_warps or block_m * mid <= 16 * 32 * num_warps:
            continue
        # Each program reads all the weights: half the multiprocessors at least must share that work.
        if 2 * -(-problem.first.gemm_m // block_m) < target.multiprocessors:
            continue
        for box in (box_of(problem.first, block_m), None):
            for block_n, block_k, num_stages in _BOTTLENECK_SLICES:
                config = BottleneckConfig(block_m, block_n, block_k, num_warps, num_stages, box=box)
                spills = box is None and block_m * block_n > _GATHERED_PER_THREAD * 32 * num_warps
                if not spills and unsupported_reason(problem, config, target) is None:
                    return config
    return None


def _stem_config(problem: StemProblem, target: Target) -> StemConfig:
    _, c_out, pool_height, pool_width = problem.out_shape
    # On FMA units the row above and both operands' slices share the registers with the accumulators.
    widest = 64 if problem.dtype == torch.float32 else 128
    block_q = min(widest, max(32, 1 << (2 * pool_width + 1).bit_length()))
    block_n = min(64, max(MIN_BLOCK, 1 << (c_out - 1).bit_length()))
    block_k = 16 if problem.dtype == torch.float32 else 32
    num_warps = 8 if problem.dtype == torch.float32 else 4
    while block_q * max(block_n, 2 * block_k) > 32 * MAX_GATHERED_PER_THREAD * 2 * num_warps and num_warps < 8:
        num_warps *= 2
    strips = -(-pool_width // (block_q // 2 - 1)) * -(-c_out // block_n) * problem.batch
    pool_rows = next((r for r in (8, 4, 2) if -(-pool_height // r) * strips >= 2 * target.multiprocessors), 1)
    return StemConfig(block_q, block_n, block_k, pool_rows, num_warps, num_stages=2)


def _head_config(problem: HeadProblem) -> HeadConfig:
    # Few images: many programs of few channels each. Many images: fewer partial sums.
    block_k = 32 if problem.batch <= 16 else 128
    widest = max(MIN_BLOCK, 1 << (problem.c_in - 1).bit_length())
    return HeadConfig(block_m=16, block_n=64, block_k=min(block_k, widest), num_warps=4)
