"""Partial sums of programs that share the K of a tile, and the program that adds them up: the last to arrive."""

# mypy: allow-untyped-defs
# What a kernel is called with is given types by Triton, one compilation at a time.

import triton
import triton.language as tl


@triton.jit
def _store_partial(pointer, acc, mask_m, offs_n, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a partial tile, but for rows outside mask_m and columns from N on: a row's first four of every eight
    columns, then its other fours.

    A thread holds four or eight columns of a row and moves four at a time: in both cases those of its neighbours lie
    beside them, and no sector is touched twice.
    """
    column = tl.arange(0, BLOCK_N)
    column = column // 4 % 2 * (BLOCK_N // 2) + column // 8 * 4 + column % 4
    offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + column[None, :]
    # In whole fours: what lies beyond N is not used.
    tl.store(pointer + offsets, acc, mask=mask_m[:, None] & (offs_n < tl.cdiv(N, 4) * 4)[None, :])


@triton.jit
def _arrived_last(counters_ptr, tile, SPLIT_K: tl.constexpr):
    """Whether the other SPLIT_K - 1 programs of the tile have arrived; the last leaves its counter at 0, as found."""
    tl.debug_barrier()  # all that this program stores is written before it counts as arrived
    last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    tl.store(counters_ptr + tile, 0, mask=last)
    return last


@triton.jit
def _sum_of_partials(
    partials,
    mask_m,
    first_column,
    is_last,
    N: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of SPLIT_K partial tiles, the first at `partials`, in their order; 0 if not `is_last`.

    Rows outside mask_m are the first row once more, which costs no access to memory; with ALL_COLUMNS no tile has
    columns from N on.
    """
    # As they lie in memory, [BLOCK_M, 2, BLOCK_N // 2], and as many on their way to shared memory as
    # config.PARTIAL_SUM_BYTES hold; of small ones, registers hold enough.
    IN_FLIGHT: tl.constexpr = max(1, min(SPLIT_K, 8192 // (BLOCK_M * BLOCK_N)))
    STAGES: tl.constexpr = 1 if BLOCK_M * BLOCK_N <= 1024 else IN_FLIGHT + 1
    half, lane = tl.arange(0, 2), tl.arange(0, BLOCK_N // 2)
    row = tl.where(mask_m, tl.arange(0, BLOCK_M), 0)
    offsets = row[:, None, None] * BLOCK_N + (half[:, None] * (BLOCK_N // 2) + lane[None, :])[None, :, :]
    column = first_column + half[:, None] * 4 + (lane // 4 * 8 + lane % 4)[None, :]
    total = tl.zeros((BLOCK_M, 2, BLOCK_N // 2), dtype=tl.float32)
    for split in tl.range(0, tl.where(is_last, SPLIT_K, 0), num_stages=STAGES):
        pointers = partials + split * (BLOCK_M * BLOCK_N) + offsets
        if ALL_COLUMNS:
            total += tl.load(pointers, cache_modifier=".cg")
        else:
            there = (column < tl.cdiv(N, 4) * 4)[None, :, :]
            total += tl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
    return total.reshape(BLOCK_M, 2, BLOCK_N // 8, 4).permute(0, 2, 1, 3).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _sum_of_splits(
    acc,
    partials_ptr,
    counters_ptr,
    tile,
    split,
    mask_m,
    first_column,
    N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(sum of the SPLIT_K partial tiles, whether this program is the one that holds it).

    Every program stores its partial tile; the last to arrive adds them up, always in the order of the splits, so the
    sum does not depend on who came last. Of rows outside mask_m and columns from N on nothing is stored.
    """
    partials = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
    offs_n = first_column + tl.arange(0, BLOCK_N)
    _store_partial(partials + split * (BLOCK_M * BLOCK_N), acc, mask_m, offs_n, N, BLOCK_M, BLOCK_N)
    last = _arrived_last(counters_ptr, tile, SPLIT_K)
    total = _sum_of_partials(partials, mask_m, first_column, last, N, N % BLOCK_N == 0, SPLIT_K, BLOCK_M, BLOCK_N)
    return total, last
