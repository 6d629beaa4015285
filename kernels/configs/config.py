"""How a problem is launched: the configurations, and the one statement of which are valid for which problem.

`unsupported_reason` is what the heuristic, the tuner and the tests share.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

from kernels.configs.targets import Target
from kernels.problems import (
    KERNEL_DTYPES,
    BottleneckProblem,
    ConvProblem,
    HeadProblem,
    Problem,
    StemProblem,
)

INPUT_PRECISIONS = ("ieee", "tf32", "tf32x3")

# Output pixels are numbered in int32 inside the kernels: dividing int64 by P and Q costs several times as much.
MAX_PIXELS = 2**31 - 1
# CUDA's limit on the second and third grid axis; groups lie on the second.
MAX_GROUPS = 65535
# tl.dot's smallest tile side on every target for every dtype here.
MIN_BLOCK = 16
# float32 accumulators per thread. With 128 (128x128 on 4 warps, 128x256 on 8) the epilogue's residual tile spills
# on sm_90, where the accumulators also have to survive the layout change before the store.
MAX_ACCUMULATORS_PER_THREAD = 64
# TMA: pixels per axis of one box, and the barriers that each pipeline stage keeps in shared memory.
MAX_BOX = 256
BARRIER_BYTES = 1024
# 8 rows of blocks share their weights in L2; more only helps when x does not fit there either.
GROUP_M = 8
# Elements of x per thread and K slice when they cannot be loaded 16 bytes at a time: every element then holds its
# own address and mask, and 32 of them spill.
MAX_GATHERED_PER_THREAD = 16


@dataclass(frozen=True)
class ConvConfig:
    """One way to launch a ConvProblem.

    Attributes:
        block_m, block_n, block_k: the tile, in rows, columns and reduction indices.
        num_warps, num_stages: warps per program, stages of the software pipeline.
        group_m: rows of blocks between which the weights stay in L2.
        input_precision: for float32 only. "ieee" is float32 throughout; "tf32" rounds both operands to an 11-bit
            significand and runs on tensor cores.
        split_k: programs that share one tile's reduction.
        box: (images, rows, columns) of one row block, loaded by TMA; None gathers through pointers.
        programs_per_sm: with a box, how many persistent programs a multiprocessor gets; 0 is one program per block.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = GROUP_M
    input_precision: str = "ieee"
    split_k: int = 1
    box: tuple[int, int, int] | None = None
    programs_per_sm: int = 0


@dataclass(frozen=True)
class BottleneckConfig:
    """One kernel for both convolutions: block_m rows through all channels in between, then block_n columns at a time.

    `box` as in ConvConfig, for the first convolution.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    input_precision: str = "ieee"
    box: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class PairConfig:
    """Two kernels, one for each convolution of a BottleneckProblem."""

    first: ConvConfig
    second: ConvConfig


@dataclass(frozen=True)
class StemConfig:
    """block_q columns of the convolution by block_n channels, walking down pool_rows pooled rows."""

    block_q: int
    block_n: int
    block_k: int
    pool_rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class HeadConfig:
    """block_m images by block_k channels per program, block_n classes at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


Config: TypeAlias = ConvConfig | BottleneckConfig | PairConfig | StemConfig | HeadConfig


def k_blocks(taps: int, channels: int, block_k: int) -> int:
    """Slices of block_k into which K is cut: across taps where one tap has fewer channels than a slice is long."""
    if taps > 1 and channels < block_k:
        return -(-taps * channels // block_k)
    return taps * -(-channels // block_k)


def conv_k_blocks(problem: ConvProblem, block_k: int) -> tuple[int, int]:
    """K slices of the convolution and of its projection."""
    taps = problem.kernel[0] * problem.kernel[1]
    projected = k_blocks(1, problem.projection.c_in, block_k) if problem.projection else 0
    return k_blocks(taps, problem.c_in_per_group, block_k), projected


def block_mid(problem: BottleneckProblem) -> int:
    """Columns of the first tile of a fused bottleneck: all its channels, rounded up to a power of two."""
    return max(MIN_BLOCK, 1 << (problem.first.c_out - 1).bit_length())


def shared_memory_bound(problem: Problem, config: Config) -> int:
    """Upper bound, in bytes, on the shared memory of one program (of a pair: of the larger one).

    A kernel's phases are not alive at the same time: the pipeline's buffers, then the tile that changes layout in the
    epilogue.
    """
    size = problem.dtype.itemsize
    if isinstance(config, PairConfig):
        assert isinstance(problem, BottleneckProblem)
        return max(shared_memory_bound(problem.first, config.first), shared_memory_bound(problem.second, config.second))
    if isinstance(config, BottleneckConfig):
        assert isinstance(problem, BottleneckProblem)
        mid = block_mid(problem)
        first = config.num_stages * (config.block_m + mid) * config.block_k
        expand = config.num_stages * mid * config.block_n
        if problem.projection:
            expand = mid * config.block_n + config.num_stages * (config.block_m + config.block_n) * config.block_k
        second = config.block_m * mid + max(expand, config.block_m * config.block_n)
        # The boxes of the first convolution are still in place when the second's first tile changes layout.
        beside_boxes = 2 * config.block_m * config.block_n * size + BARRIER_BYTES if config.box else 0
        return max(first, second) * size + beside_boxes
    if isinstance(config, StemConfig):
        pipeline = config.num_stages * (config.block_q + config.block_n) * config.block_k * size
        return max(pipeline, config.block_q * config.block_n * 4)
    if isinstance(config, HeadConfig):
        return (config.block_m * config.block_k + config.block_k * config.block_n) * size + 4 * (
            config.block_m * config.block_n
        )
    pipeline = config.num_stages * (config.block_m + config.block_n) * config.block_k * size
    # Partial sums change layout in float32.
    epilogue = config.block_m * config.block_n * (4 if config.split_k > 1 else size)
    if config.box is None:
        return max(pipeline, epilogue)
    assert isinstance(problem, ConvProblem)
    # Boxes of the projection are loaded while those of the convolution are still in place.
    return BARRIER_BYTES + (max(pipeline, epilogue) if problem.projection is None else 2 * pipeline + epilogue)


def unsupported_reason(problem: Problem, config: Config, target: Target | None) -> str | None:
    """Why `config` cannot run `problem` on `target`, or None if it can. No target means Triton's interpreter."""
    if problem.dtype not in KERNEL_DTYPES:
        return f"dtype is {problem.dtype}, expected one of {', '.join(map(str, KERNEL_DTYPES))}"
    if isinstance(problem, BottleneckProblem) and isinstance(config, PairConfig):
        return unsupported_reason(problem.first, config.first, target) or unsupported_reason(
            problem.second, config.second, target
        )
    expected = {
        ConvProblem: ConvConfig,
        BottleneckProblem: BottleneckConfig,
        StemProblem: StemConfig,
        HeadProblem: HeadConfig,
    }[type(problem)]
    if not isinstance(config, expected):
        return f"{config} is a {type(config).__name__}, expected a {expected.__name__}"
    reason = _block_reason(config)
    if reason is None and isinstance(problem, ConvProblem) and isinstance(config, ConvConfig):
        reason = _conv_reason(problem, config, target)
    if reason is None and isinstance(problem, BottleneckProblem) and isinstance(config, BottleneckConfig):
        reason = _bottleneck_reason(problem, config, target)
    if reason is None and isinstance(problem, StemProblem):
        reason = _pixel_reason(problem.conv.gemm_m, 0)
        if problem.conv.groups != 1 or problem.conv.dilation != (1, 1):
            reason = f"groups {problem.conv.groups} and dilation {problem.conv.dilation}, expected 1 and (1, 1)"
    if reason is not None or target is None:
        return reason
    accumulators = _accumulators(problem, config)
    if accumulators > MAX_ACCUMULATORS_PER_THREAD:
        return f"{accumulators} accumulators per thread, expected at most {MAX_ACCUMULATORS_PER_THREAD}"
    shared = shared_memory_bound(problem, config)
    if shared > target.shared_memory:
        return f"up to {shared} bytes of shared memory, expected at most {target.shared_memory} on {target.name}"
    return None


def _block_reason(config: Config) -> str | None:
    for name in ("block_m", "block_n", "block_k", "block_q"):
        block = getattr(config, name, MIN_BLOCK)
        if block < MIN_BLOCK or block & (block - 1):
            return f"{name} is {block}, expected a power of two of at least {MIN_BLOCK}"
    if getattr(config, "num_warps", 1) not in (1, 2, 4, 8, 16):
        return f"num_warps is {getattr(config, 'num_warps', 1)}, expected 1, 2, 4, 8 or 16"
    for name in ("num_stages", "group_m", "split_k", "pool_rows"):
        if getattr(config, name, 1) < 1:
            return f"{name} is {getattr(config, name, 1)}, expected at least 1"
    precision = getattr(config, "input_precision", "ieee")
    if precision not in INPUT_PRECISIONS:
        return f"input_precision is {precision!r}, expected one of {', '.join(INPUT_PRECISIONS)}"
    return None


def _pixel_reason(pixels: int, block_m: int) -> str | None:
    if pixels + block_m > MAX_PIXELS:
        return f"{pixels} output pixels, expected at most {MAX_PIXELS} less one tile of {block_m}"
    return None


def _conv_reason(problem: ConvProblem, config: ConvConfig, target: Target | None) -> str | None:
    if problem.groups > MAX_GROUPS:
        return f"{problem.groups} groups, expected at most {MAX_GROUPS}"
    if problem.projection is not None and problem.groups > 1:
        return f"{problem.groups} groups beside a projection, expected 1"
    if config.split_k > sum(conv_k_blocks(problem, config.block_k)):
        return f"split_k is {config.split_k}, expected at most the {sum(conv_k_blocks(problem, config.block_k))} slices"
    if config.box is not None:
        if config.split_k > 1:
            return f"split_k is {config.split_k} with a box, expected 1"
        if problem.projection is not None and problem.projection.c_in % config.block_k:
            return f"{problem.projection.c_in} projected channels, expected a multiple of block_k {config.block_k}"
        reason = _box_reason(problem, config.box, config.block_m, config.block_k, target)
        if reason is not None:
            return reason
    return _pixel_reason(problem.gemm_m, config.block_m)


def _bottleneck_reason(problem: BottleneckProblem, config: BottleneckConfig, target: Target | None) -> str | None:
    if problem.first.groups != 1:
        return f"{problem.first.groups} groups, expected 1"
    if config.box is not None:
        reason = _box_reason(problem.first, config.box, config.block_m, config.block_k, target)
        if reason is not None:
            return reason
    return _pixel_reason(problem.first.gemm_m, config.block_m)


def _box_reason(
    problem: ConvProblem, box: tuple[int, int, int], block_m: int, block_k: int, target: Target | None
) -> str | None:
    if target is not None and not target.has_tma:
        return f"a box needs TMA, expected sm_90 or newer instead of {target.name}"
    if math.prod(box) != block_m or max(box) > MAX_BOX:
        return f"box is {box}, expected {block_m} (block_m) pixels and at most {MAX_BOX} along each axis"
    if (problem.stride, problem.dilation, problem.groups) != ((1, 1), (1, 1), 1):
        return (
            f"stride {problem.stride}, dilation {problem.dilation}, {problem.groups} groups with a box,"
            f" expected (1, 1), (1, 1), 1"
        )
    if problem.c_in % block_k:
        return f"{problem.c_in} channels with a box, expected a multiple of block_k {block_k}"
    return None


def _accumulators(problem: Problem, config: Config) -> int:
    """float32 accumulators per thread of the larger tile."""
    if isinstance(config, StemConfig):
        tile = config.block_q * config.block_n
    elif isinstance(config, BottleneckConfig):
        assert isinstance(problem, BottleneckProblem)
        tile = config.block_m * max(block_mid(problem), config.block_n)
    else:
        assert isinstance(config, (ConvConfig, HeadConfig))
        tile = config.block_m * config.block_n
    return tile // (32 * config.num_warps)
