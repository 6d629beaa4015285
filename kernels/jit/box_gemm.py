"""Convolution of stride 1 as an implicit GEMM over TMA boxes: sm_90 and newer.

One row block is a box of TILE_N images x TILE_P rows x TILE_Q columns of output pixels; under each tap it is a box of
x of the same shape, shifted. A dense 1x1 convolution is passed as one image of one row: a plain GEMM. Where boxes are
few, K is split between programs as in implicit_gemm.py.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.epilogue import _bias, _bias_residual_act_store
from kernels.jit.parts import (
    _accumulate_boxes,
    _box_corner,
    _box_pixels,
    _let_next_kernel_start,
    _pixel_offset,
    _wait_for_previous_kernel,
)
from kernels.jit.splits import _sum_of_splits


@triton.jit(do_not_specialize=["N", "P", "Q"])
def _conv2d_boxes_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    residual_ptr,
    slope_ptr,
    shortcut_desc,
    shortcut_weight_desc,
    partials_ptr,
    counters_ptr,
    y_ptr,
    N,
    P,
    Q,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    C_S: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,p,q,o] = act(sum over r,s,c of x[n, p + r - PAD_H, q + s - PAD_W, c] * weight[o,r,s,c]
                      + sum over c of shortcut[n,p,q,c] * shortcut_weight[o,c] + bias[o] + residual[n,p,q,o])

    shortcut_desc sees only the pixels that the projection's stride reads. Persistent: each program of the
    one-dimensional grid takes every num_programs-th block, those of one box of pixels one after the other.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_P * TILE_Q
    blocks_n = tl.cdiv(C_OUT, BLOCK_N)
    boxes = tl.cdiv(N, TILE_N) * tl.cdiv(P, TILE_P) * tl.cdiv(Q, TILE_Q)
    _wait_for_previous_kernel(USE_PDL)
    slices: tl.constexpr = R * S * (C_IN // BLOCK_K)
    slices_s: tl.constexpr = C_S // BLOCK_K if HAS_PROJECTION else 0
    slices_per_split: tl.constexpr = tl.cdiv(slices + slices_s, SPLIT_K)
    for block in tl.range(tl.program_id(0), boxes * blocks_n * SPLIT_K, tl.num_programs(0)):
        tile = block // SPLIT_K
        split = block % SPLIT_K
        n0, p0, q0 = _box_corner(tile // blocks_n, P, Q, TILE_N, TILE_P, TILE_Q)
        first_column = tile % blocks_n * BLOCK_N
        offs_n = first_column + tl.arange(0, BLOCK_N)
        bias = _bias(bias_ptr, offs_n, offs_n < C_OUT)
        # The projection's slices are numbered after the convolution's.
        first = split * slices_per_split
        last = first + slices_per_split
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        acc = _accumulate_boxes(
            acc,
            x_desc,
            weight_desc,
            n0,
            p0 - PAD_H,
            q0 - PAD_W,
            first_column,
            0 if SPLIT_K == 1 else first,
            slices if SPLIT_K == 1 else tl.minimum(last, slices),
            C_IN,
            R,
            S,
            BLOCK_M,
            BLOCK_K,
        )
        if HAS_PROJECTION:
            acc = _accumulate_boxes(
                acc,
                shortcut_desc,
                shortcut_weight_desc,
                n0,
                p0,
                q0,
                first_column,
                0 if SPLIT_K == 1 else tl.maximum(first - slices, 0),
                slices_s if SPLIT_K == 1 else tl.minimum(last - slices, slices_s),
                C_S,
                1,
                1,
                BLOCK_M,
                BLOCK_K,
            )
        _let_next_kernel_start(USE_PDL)

        n, p, q = _box_pixels(n0, p0, q0, TILE_N, TILE_P, TILE_Q)
        mask_m = (n < N) & (p < P) & (q < Q)
        acc = acc.T
        if SPLIT_K > 1:
            acc, holds_sum = _sum_of_splits(
                acc, partials_ptr, counters_ptr, tile, split, mask_m, first_column, C_OUT, SPLIT_K, BLOCK_M, BLOCK_N
            )
            mask_m &= n < tl.where(holds_sum, N, 0)
        offs_y = _pixel_offset(n, p, q, P, Q, C_OUT)
        _bias_residual_act_store(
            acc,
            bias,
            residual_ptr,
            slope_ptr,
            y_ptr,
            offs_y,
            offs_n,
            mask_m,
            offs_n < C_OUT,
            HAS_RESIDUAL,
            APPLY_RELU,
            ACTIVATION,
            NEGATIVE_SLOPE,
        )
