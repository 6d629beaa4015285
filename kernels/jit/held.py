"""Tiles that leave as HMMA holds them: no change of layout through shared memory, sixteen bytes at a time."""

# mypy: allow-untyped-defs
# What a kernel is called with is given types by Triton, one compilation at a time.

import triton
import triton.language as tl

from kernels.jit.epilogue import _biased, _residual_act_store
from kernels.jit.splits import _arrived_last


@triton.jit
def _columns(BLOCK_N: tl.constexpr, WARP_ROWS: tl.constexpr):
    """Which column of the output each column of a tile is: with WARP_ROWS, such that a thread's lie side by side.

    HMMA leaves a thread two of every eight columns. Its share of 32 of the output's are eight in a row: they leave
    as they are held, sixteen bytes at a time, without a way through shared memory.
    """
    column = tl.arange(0, BLOCK_N)
    if WARP_ROWS > 0:
        eights: tl.constexpr = BLOCK_N // 32
        column = column // 8 % eights * 32 + column // 2 % 4 * 8 + column // (8 * eights) * 2 + column % 2
    return column


@triton.jit
def _as_held(tile, WARP_ROWS: tl.constexpr, WARP_COLUMNS: tl.constexpr):
    """A tile with `_columns` as HMMA leaves it in the registers of WARP_ROWS x WARP_COLUMNS warps:

    [rows / (16 * WARP_ROWS), 2, columns / (32 * WARP_COLUMNS), WARP_ROWS, WARP_COLUMNS, 8, 32], its columns in the
    output's order. Stored and loaded like this, Triton gives each thread what it already has.
    """
    ROWS: tl.constexpr = tile.shape[0] // (16 * WARP_ROWS)
    COLUMNS: tl.constexpr = tile.shape[1] // (32 * WARP_COLUMNS)
    tile = tile.reshape(ROWS, WARP_ROWS, 2, 8, 4, COLUMNS, WARP_COLUMNS, 4, 2)
    return tile.permute(0, 2, 5, 1, 6, 3, 7, 4, 8).reshape(ROWS, 2, COLUMNS, WARP_ROWS, WARP_COLUMNS, 8, 32)


@triton.jit
def _held_rows(BLOCK_M: tl.constexpr, WARP_ROWS: tl.constexpr):
    """The row of each element of a tile `_as_held`, [rows / (16 * WARP_ROWS), 2, 1, WARP_ROWS, 1, 8, 1]."""
    row = (tl.arange(0, BLOCK_M // (16 * WARP_ROWS)) * (16 * WARP_ROWS))[:, None, None, None, None, None, None]
    row += (tl.arange(0, 2) * 8)[None, :, None, None, None, None, None]
    row += (tl.arange(0, WARP_ROWS) * 16)[None, None, None, :, None, None, None]
    return row + tl.arange(0, 8)[None, None, None, None, None, :, None]


@triton.jit
def _held_columns(BLOCK_N: tl.constexpr, WARP_COLUMNS: tl.constexpr):
    """The output's column of each element of a tile `_as_held`, [1, 1, columns / ..., 1, WARP_COLUMNS, 1, 32]."""
    COLUMNS: tl.constexpr = BLOCK_N // (32 * WARP_COLUMNS)
    column = (tl.arange(0, COLUMNS) * (32 * WARP_COLUMNS))[None, None, :, None, None, None, None]
    column += (tl.arange(0, WARP_COLUMNS) * 32)[None, None, None, None, :, None, None]
    return column + tl.arange(0, 32)[None, None, None, None, None, None, :]


@triton.jit
def _partial_as_held(tile, WARP_ROWS: tl.constexpr, WARP_COLUMNS: tl.constexpr):
    """A tile with `_columns` in one dimension, in the order in which warps that hold it store sixteen bytes at a time.

    From the outside in: what a thread has beside those four elements, warps, the 8 x 4 threads of one.
    """
    ROWS: tl.constexpr = tile.shape[0] // (16 * WARP_ROWS)
    COLUMNS: tl.constexpr = tile.shape[1] // (32 * WARP_COLUMNS)
    tile = tile.reshape(ROWS, WARP_ROWS, 2, 8, 2, 2, COLUMNS, WARP_COLUMNS, 4, 2)
    return tile.permute(0, 2, 6, 4, 1, 7, 3, 8, 5, 9).reshape(ROWS * COLUMNS * WARP_ROWS * WARP_COLUMNS * 512)


@triton.jit
def _tile_of_held(
    partial, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARP_ROWS: tl.constexpr, WARP_COLUMNS: tl.constexpr
):
    """The tile of which `_partial_as_held` made this."""
    ROWS: tl.constexpr = BLOCK_M // (16 * WARP_ROWS)
    COLUMNS: tl.constexpr = BLOCK_N // (32 * WARP_COLUMNS)
    partial = partial.reshape(ROWS, 2, COLUMNS, 2, WARP_ROWS, WARP_COLUMNS, 8, 4, 2, 2)
    return partial.permute(0, 4, 1, 6, 3, 8, 2, 5, 7, 9).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _sum_of_held_splits(
    acc,
    partials_ptr,
    counters_ptr,
    tile,
    split,
    rows,
    columns,
    ALL_COLUMNS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    WARP_COLUMNS: tl.constexpr,
):
    """`_sum_of_splits` of tiles with `_columns`, of which only so many rows and columns exist."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    WARPS: tl.constexpr = WARP_ROWS * WARP_COLUMNS
    COLUMNS: tl.constexpr = BLOCK_N // (32 * WARP_COLUMNS)
    place = tl.arange(0, BLOCK_M * BLOCK_N)
    warp, beside = place // 128 % WARPS, place // (128 * WARPS)
    row = beside // (4 * COLUMNS) * (16 * WARP_ROWS) + beside // (2 * COLUMNS) % 2 * 8
    there = row + warp // WARP_COLUMNS * 16 + place // 16 % 8 < rows
    if not ALL_COLUMNS:  # in whole fours: what lies beyond the last column is not used
        column = (beside // 2 % COLUMNS * WARP_COLUMNS + warp % WARP_COLUMNS) * 32 + place // 4 % 4 * 8 + beside % 2 * 4
        there &= column < columns
    partials = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N) + place
    tl.store(partials + split * (BLOCK_M * BLOCK_N), _partial_as_held(acc, WARP_ROWS, WARP_COLUMNS), mask=there)
    last = _arrived_last(counters_ptr, tile, SPLIT_K)
    total = tl.zeros((BLOCK_M * BLOCK_N,), dtype=tl.float32)
    for other in tl.range(0, tl.where(last, SPLIT_K, 0), num_stages=1):
        total += tl.load(partials + other * (BLOCK_M * BLOCK_N), mask=there, other=0.0, cache_modifier=".cg")
    return _tile_of_held(total, BLOCK_M, BLOCK_N, WARP_ROWS, WARP_COLUMNS), last


@triton.jit
def _bias_residual_act_store_as_held(
    acc,
    bias,
    residual_ptr,
    slope_ptr,
    y_ptr,
    first_row,
    last_row,
    first_column,
    last_column,
    CHANNELS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    WARP_COLUMNS: tl.constexpr,
):
    """The same of a tile with `_columns`: rows first_row to last_row of y, dense and of so many channels, and columns
    first_column to last_column, the last ones not included.
    """
    rows = first_row + _held_rows(acc.shape[0], WARP_ROWS)
    columns = first_column + _held_columns(acc.shape[1], WARP_COLUMNS)
    _residual_act_store(
        _as_held(_biased(acc, bias), WARP_ROWS, WARP_COLUMNS),
        residual_ptr,
        slope_ptr,
        y_ptr,
        rows.to(tl.int64) * CHANNELS,
        columns,
        rows < last_row,
        columns < last_column,
        HAS_RESIDUAL,
        APPLY_RELU,
        ACTIVATION,
        NEGATIVE_SLOPE,
    )
