"""Which configuration goes with which problem where nobody has measured: a rule for each kind of problem.

Here are the rules of a convolution; those of the other kinds lie beside their operators.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kernels.configs.config import MIN_BLOCK, Config, conv_k_blocks, warps_of
from kernels.configs.convolution import ConvConfig, box_of, held_by
from kernels.configs.targets import Target
from kernels.problems import ConvProblem, Problem

Tile = tuple[int, int, int]  # block_m, block_n, num_warps
_Rule = TypeVar("_Rule", bound=Callable[[Any, Target], Config])
_Starts = Callable[[Any, Target, Sequence[Config]], list[Config]]
_RULES: dict[type, Callable[[Any, Target], Config]] = {}
_STARTS: dict[type, _Starts] = {}

# Elements of x per thread and K slice when they cannot be loaded 16 bytes at a time: every element then holds its
# own address and mask, and 32 of them spill.
MAX_GATHERED_PER_THREAD = 16
# Largest first. Beyond 128x128 a tile spills; at 64 rows and fewer the weights are read so often that a smaller tile
# only pays when it is what fills the GPU.
_TENSOR_CORE_TILES = (
    (128, 128, 8),
    (128, 64, 4),
    (64, 64, 4),
    (64, 32, 4),
    (32, 32, 4),
    (128, 16, 4),
    (64, 16, 4),
)
# Over boxes the filters are WGMMA's rows, which come 64 at a time, and the pixels its columns.
_BOX_TILES = (
    (128, 128, 8),
    (128, 64, 4),
    (64, 64, 4),
    (32, 64, 4),
)
# As wide as WGMMA gets: L2 is what many blocks wait for, and a tile of twice the area reads three quarters as much.
_LARGE_BOX_TILES = (
    (256, 128, 16),
    (128, 256, 16),
    (256, 64, 8),
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
# A split shorter than this many reduction indices spends more on its partial sum than it saves, and a reduction
# shorter than four of them is over before the partial sums are.
_MIN_K_PER_SPLIT = 256
_LONG_K = 4 * _MIN_K_PER_SPLIT
# Two programs on a multiprocessor wait for memory in turns, which pays where each is still this long.
_MIN_K_OF_TWO = 512
_MAX_SPLIT_K = 16
# Cycles that kernels/prediction finds of a program on its own: to its first product; of a slice beside its products,
# where there are taps twice that; more where 4 warps have 64 accumulators a thread and HMMA waits for its operands; of
# each element that a thread stores or adds up; and until the last has arrived.
_START, _TAP, _WAIT, _ELEMENT, _ARRIVAL = 900, 100, 250, 5, 700
# A tile computes this share of rows that exist, if a smaller one can.
_USEFUL_ROWS = 0.75
# Accumulators per thread beside the addresses of two gathered operands: 64 spill on sm_86 and sm_120, in float32 on
# ordinary FMA units also 32.
GATHERED_PER_THREAD = 32


def rule(kind: type, starts: _Starts | None = None) -> Callable[[_Rule], _Rule]:
    """Makes a function the rule of a kind of problem.

    `starts` makes of a problem, a target and the best configurations of its parts where a search begins; without it
    that is what the rule says.
    """

    def register(function: _Rule) -> _Rule:
        _RULES[kind] = function
        if starts is not None:
            _STARTS[kind] = starts
        return function

    return register


def heuristic_config(problem: Problem, target: Target) -> Config:
    """A configuration that is valid for `problem` on `target`, chosen by rules and not by measurement.

    Raises:
        ValueError: no configuration can run it (dtype, too many output pixels or groups).
    """
    config = _RULES[type(problem)](problem, target)
    reason = config.unsupported_reason(problem, target)
    if reason is not None:
        raise ValueError(f"no configuration for {problem} on {target.name}: {reason}")
    return config


def starting_configs(problem: Problem, target: Target, parts: Sequence[Config]) -> list[Config]:
    """Where a search for the fastest configuration begins, given the fastest of `problem.parts`."""
    starts = _STARTS.get(type(problem))
    return [heuristic_config(problem, target)] if starts is None else starts(problem, target, parts)


@rule(ConvProblem)
def conv_config(problem: ConvProblem, target: Target) -> ConvConfig:
    boxed = _boxed_config(problem, target)
    if boxed is not None:
        # A box is on its way for longer than copies of pointers that no tap changes, and such a tile is soon done.
        small = boxed.block_m * boxed.block_n <= 32 * 32 and problem.is_dense and problem.projection is None
        return replace(boxed, box=None) if small else boxed
    configs = [_gathered_config(problem, target, tile) for tile in _tiles(problem, target)]
    return _best(configs, problem, target)


def _gathered_config(problem: ConvProblem, target: Target, tile: Tile) -> ConvConfig:
    block_m, block_n, num_warps = tile
    block_k = _block_k(problem)
    if not problem.loads_are_vectors and block_m * block_k > MAX_GATHERED_PER_THREAD * 32 * num_warps:
        num_warps *= 2
    config = ConvConfig(block_m, block_n, block_k, num_warps, num_stages=2)
    if problem.projection is not None and problem.dtype == torch.float32:
        config = replace(config, block_m=min(block_m, 32), block_n=min(block_n, 32), num_warps=4)
    elif problem.projection is not None and not held_by(config, target, problem.dtype)["WARP_ROWS"]:
        if block_m * block_n <= GATHERED_PER_THREAD * 32 * num_warps:
            return config
        config = replace(config, block_m=min(block_m, 64), block_n=min(block_n, 64), num_warps=4)
    return config


def _boxed_config(problem: ConvProblem, target: Target) -> ConvConfig | None:
    """Through TMA, where the target has it and the problem is one for it."""
    if problem.dtype == torch.float32 or problem.gemm_n < 64:
        return None
    # Of HMMA's rows, 16 are enough.
    small = ((32, 32, 4),) if target.matrix_instruction(64) == "HMMA" else ()
    tiles = _fitting(problem, (*_LARGE_BOX_TILES, *_BOX_TILES) if target.has_wgmma else (*_BOX_TILES, *small))
    configs = [
        ConvConfig(block_m, block_n, _block_k(problem), num_warps, 2, box_of(problem, block_m))
        for block_m, block_n, num_warps in tiles
    ]
    boxed = [config for config in configs if config.unsupported_reason(problem, target) is None]
    return _best(boxed, problem, target) if boxed else None


def _best(whole: Sequence[ConvConfig], problem: ConvProblem, target: Target) -> ConvConfig:
    """Of configurations with ever smaller tiles, the same with K divided, and fewer or more stages: the least time."""
    if problem.dtype == torch.float32:
        filling = (c for c in whole if _programs(problem, c.block_m, c.block_n) >= target.multiprocessors)
        return _staged(next(filling, whole[-1]), problem, target)[0]
    configs = [config for one in whole for config in (one, _split(one, problem, target))]
    staged = [deeper for config in configs for deeper in _staged(config, problem, target)]
    return min(staged, key=lambda config: _cycles(config, problem, target))


def _cycles(config: ConvConfig, problem: ConvProblem, target: Target) -> float:
    """Cycles that a convolution takes at least: an estimate of what kernels/prediction finds in its machine code.

    The longest of what the busiest multiprocessor's tensor cores and shared memory take, L2 for all of them, and one
    program after the other on its own; then the sum over splits of one tile, at the 64 bytes per cycle that a
    multiprocessor takes from L2.
    """
    block_m, block_n, splits = config.block_m, config.block_n, config.split_k
    sides, area, size = block_m + block_n, block_m * block_n, problem.dtype.itemsize
    tiles = _programs(problem, block_m, block_n)
    slices = sum(conv_k_blocks(problem, config.block_k))
    k, partials = slices * config.block_k, 8 * splits * area if splits > 1 else 0  # bytes, written and read
    share = -(-tiles * splits // target.multiprocessors) / splits  # tiles of the busiest one

    tensor = share * 2 * area * k / target.tensor_flops_per_cycle
    l2 = tiles * (sides * k * size + partials) / target.l2_bandwidth * target.clock
    shared = 0.0
    if target.matrix_instruction(block_m if config.box is None else block_n) == "HMMA":
        # Written once, as zeros what the pipeline asks for beyond the last slice; read by every warp that needs it.
        rows, columns = warps_of(block_m, block_n, config.num_warps)
        ahead = (config.num_stages - 1) * config.block_k * splits
        shared = share * (sides * (k + ahead) + (columns * block_m + rows * block_n) * k) * size / 128
        if config.box or not held_by(config, target, problem.dtype)["WARP_ROWS"]:
            # The result, and partial sums, change layout.
            shared += -(-tiles // target.multiprocessors) * (5 * area * size + partials) / 128

    threads = 32 * config.num_warps
    of_warp = 8 * area * config.block_k / config.num_warps / target.tensor_flops_per_cycle
    of_slice = _TAP if problem.kernel == (1, 1) else 2 * _TAP
    if shared and area >= 64 * threads and config.num_warps == 4 and slices > 4 * splits:  # in a loop
        of_slice += _WAIT
    alone = _START + -(-slices // splits) * (of_warp + of_slice)
    alone += area / threads * (_ELEMENT + (_ELEMENT * splits if splits > 1 else 0)) + (_ARRIVAL if splits > 1 else 0)
    buffers = config.num_stages - (config.box is None)
    by_shared = target.shared_memory_per_multiprocessor // (buffers * sides * config.block_k * size + 1024)
    by_registers = target.registers // (threads * (area // threads + 64))
    held = max(1, min(by_shared, by_registers, target.warps // config.num_warps))
    waves = -(-tiles * splits // (held * target.multiprocessors))
    return max(tensor, shared, l2, waves * alone) + (splits * area / 16 if splits > 1 else 0)


def _split(config: ConvConfig, problem: ConvProblem, target: Target) -> ConvConfig:
    """K of few tiles divided between programs; where those stay few, in slices of two lines of channels."""
    if problem.dtype == torch.float32:
        return config
    programs = _programs(problem, config.block_m, config.block_n)
    one, two = (share * target.multiprocessors // programs for share in (1, 2))
    channels = (problem.c_in_per_group, problem.projection.c_in if problem.projection else 0)
    small = two > 0 and config.block_k == 64 and config.block_m * config.block_n <= 64 * 64
    length = _length(problem)
    split_k = max(min(one, length // _MIN_K_PER_SPLIT), min(two, length // _MIN_K_OF_TWO))
    split_k = min(split_k, _MAX_SPLIT_K)
    if length < _LONG_K:
        split_k = 1
    wide = small and problem.gemm_k > (128 if target.has_wgmma else 256) and not any(c % 128 for c in channels)
    for block_k in (128, config.block_k) if wide else (config.block_k,):
        slices = sum(conv_k_blocks(problem, block_k))
        # None of the programs is without a slice.
        divided = replace(config, block_k=block_k, split_k=-(-slices // -(-slices // max(1, split_k))))
        if divided.unsupported_reason(problem, target) is None:
            return divided
    return config


def _staged(config: ConvConfig, problem: ConvProblem, target: Target) -> list[ConvConfig]:
    """As many stages as there are slices for and as fit, and fewer."""
    # s stages keep s - 1 slices in flight. Beyond 4 the extra ones only take shared memory from a second program on
    # the same multiprocessor.
    slices = sum(conv_k_blocks(problem, config.block_k))
    most = 4 if config.block_k <= 64 else 3
    stages = [replace(config, num_stages=n) for n in range(min(most, slices // config.split_k + 1), 2, -1)]
    return [c for c in stages if c.unsupported_reason(problem, target) is None] or [config]


def _length(problem: ConvProblem) -> int:
    """Reduction indices of the convolution and its projection."""
    return problem.gemm_k + (problem.projection.c_in if problem.projection else 0)


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


def _tiles(problem: ConvProblem, target: Target) -> list[Tile]:
    """Those over gathered pointers."""
    if problem.dtype == torch.float32:
        return _fitting(problem, _FMA_TILES)
    # Below 64 rows sm_90 falls back from WGMMA to the HMMA of its predecessors.
    return _fitting(problem, [tile for tile in _TENSOR_CORE_TILES if tile[0] >= 64 or not target.has_wgmma])


def _fitting(problem: ConvProblem, tiles: Sequence[Tile]) -> list[Tile]:
    # A tile wider than C_OUT computes columns nobody stores; narrower than 32 re-reads x for every 16 columns.
    widest = max(MIN_BLOCK, 1 << (problem.gemm_n - 1).bit_length())
    fitting = [tile for tile in tiles if min(32, widest) <= tile[1] <= widest]
    most_useful = max(_useful_rows(problem, block_m) for block_m, _, _ in fitting)
    return [tile for tile in fitting if _useful_rows(problem, tile[0]) >= min(_USEFUL_ROWS, most_useful)]


def _useful_rows(problem: ConvProblem, block_m: int) -> float:
    """The share of rows, of all that tiles of block_m compute, that exist."""
    return problem.gemm_m / (-(-problem.gemm_m // block_m) * block_m)
