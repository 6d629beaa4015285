"""Convolution as one implicit GEMM over gathered pointers: every geometry, every target.

The projection of a block's shortcut is a second range of K in the same accumulator. Where M gives too few blocks to
fill the GPU, K is split between programs.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.epilogue import _bias, _bias_residual_act_store
from kernels.jit.held import _bias_residual_act_store_as_held, _columns, _sum_of_held_splits
from kernels.jit.parts import (
    _accumulate_gathered,
    _let_next_kernel_start,
    _pixels,
    _swizzled_block,
    _wait_for_previous_kernel,
)
from kernels.jit.splits import _sum_of_splits


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "H_S", "W_S"])
def _conv2d_gathered_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    slope_ptr,
    shortcut_ptr,
    shortcut_weight_ptr,
    partials_ptr,
    counters_ptr,
    y_ptr,
    N,
    H,
    W,
    P,
    Q,
    H_S,
    W_S,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    C_S: tl.constexpr,
    STRIDE_S_H: tl.constexpr,
    STRIDE_S_W: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    K_BLOCKS_S: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    WARP_COLUMNS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,p,q,o] = act(sum over r,s,c of x[n,h,w,c] * weight[o,r,s,c]
                      + sum over c of shortcut[n,h_s,w_s,c] * shortcut_weight[o,c] + bias[o] + residual[n,p,q,o])

    with h = p * STRIDE_H + r * DILATION_H - PAD_H, h_s = p * STRIDE_S_H, w and w_s alike, and c over the channels of
    o's group. C_IN and C_OUT are the channels of one group. Grid: (blocks_m * blocks_n * SPLIT_K, GROUPS).
    """
    M = N * P * Q
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(C_OUT, BLOCK_N)
    tile = tl.program_id(0) // SPLIT_K
    split = tl.program_id(0) % SPLIT_K
    group = tl.program_id(1)
    pid_m, pid_n = _swizzled_block(tile, blocks_m, blocks_n)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    n, p, q = _pixels(tl.minimum(offs_m, M - 1), P, Q)  # beyond the last pixel it once more
    lane_n = _columns(BLOCK_N, WARP_ROWS)
    offs_n = pid_n * BLOCK_N + lane_n
    mask_n = offs_n < C_OUT
    first_column = group * C_OUT + pid_n * BLOCK_N
    offs_o = first_column + lane_n

    # The projection's slices are numbered after the convolution's.
    blocks_per_split: tl.constexpr = tl.cdiv(K_BLOCKS + K_BLOCKS_S, SPLIT_K)
    first = 0 if SPLIT_K == 1 else split * blocks_per_split
    last = K_BLOCKS + K_BLOCKS_S if SPLIT_K == 1 else first + blocks_per_split

    _wait_for_previous_kernel(USE_PDL)
    bias = _bias(bias_ptr, offs_o, mask_n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _accumulate_gathered(
        acc,
        x_ptr + group * C_IN,
        weight_ptr + first_column.to(tl.int64) * (R * S * C_IN),
        n,
        p,
        q,
        mask_m,
        lane_n,
        mask_n,
        H,
        W,
        first,
        K_BLOCKS if SPLIT_K == 1 else tl.minimum(last, K_BLOCKS),
        C_IN,
        GROUPS,
        R,
        S,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        DILATION_H,
        DILATION_W,
        BLOCK_K,
        C_OUT % BLOCK_N == 0,
        True,
    )
    if HAS_PROJECTION:
        acc = _accumulate_gathered(
            acc,
            shortcut_ptr,
            shortcut_weight_ptr + first_column.to(tl.int64) * C_S,
            n,
            p,
            q,
            mask_m,
            lane_n,
            mask_n,
            H_S,
            W_S,
            0 if SPLIT_K == 1 else tl.maximum(first - K_BLOCKS, 0),
            K_BLOCKS_S if SPLIT_K == 1 else tl.minimum(last - K_BLOCKS, K_BLOCKS_S),
            C_S,
            1,
            1,
            1,
            STRIDE_S_H,
            STRIDE_S_W,
            0,
            0,
            1,
            1,
            BLOCK_K,
            C_OUT % BLOCK_N == 0,
            True,
        )
    _let_next_kernel_start(USE_PDL)

    last_row = M
    if SPLIT_K > 1:
        index = group * (blocks_m * blocks_n) + tile
        if WARP_ROWS > 0:
            acc, holds_sum = _sum_of_held_splits(
                acc,
                partials_ptr,
                counters_ptr,
                index,
                split,
                M - pid_m * BLOCK_M,
                C_OUT - pid_n * BLOCK_N,
                C_OUT % BLOCK_N == 0,
                SPLIT_K,
                WARP_ROWS,
                WARP_COLUMNS,
            )
        else:
            acc, holds_sum = _sum_of_splits(
                acc, partials_ptr, counters_ptr, index, split, mask_m, pid_n * BLOCK_N, C_OUT, SPLIT_K, BLOCK_M, BLOCK_N
            )
        last_row = tl.where(holds_sum, M, 0)
        mask_m = offs_m < last_row
    if WARP_ROWS > 0:
        _bias_residual_act_store_as_held(
            acc,
            bias,
            residual_ptr,
            slope_ptr,
            y_ptr,
            pid_m * BLOCK_M,
            last_row,
            first_column,
            (group + 1) * C_OUT,
            GROUPS * C_OUT,
            HAS_RESIDUAL,
            APPLY_RELU,
            ACTIVATION,
            NEGATIVE_SLOPE,
            WARP_ROWS,
            WARP_COLUMNS,
        )
    else:
        offs_y = offs_m.to(tl.int64) * (GROUPS * C_OUT)
        _bias_residual_act_store(
            acc,
            bias,
            residual_ptr,
            slope_ptr,
            y_ptr,
            offs_y,
            offs_o,
            mask_m,
            mask_n,
            HAS_RESIDUAL,
            APPLY_RELU,
            ACTIVATION,
            NEGATIVE_SLOPE,
        )
