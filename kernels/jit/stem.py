"""Convolution, ReLU and a 3x3 max-pool of stride 2 in one kernel: the convolution's output is never stored.

A program walks down POOL_ROWS pooled rows. Of the three convolution rows under a pooled row it computes two and
keeps the third from the row above.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.epilogue import _bias, _biased, _relu
from kernels.jit.parts import _accumulate_gathered, _let_next_kernel_start, _pixel_offset, _wait_for_previous_kernel


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _activated_row(
    x_ptr,
    weight_ptr,
    bias,
    n,
    row,
    columns,
    offs_n,
    mask_n,
    H,
    W,
    P,
    Q,
    C_IN: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """relu(conv(x, weight) + bias) at pixels (n, row, columns), [BLOCK_Q, BLOCK_N]; 0 outside the P x Q output.

    0 is the pool's padding: no value after the ReLU is below it.
    """
    rows = tl.full([BLOCK_Q], row, tl.int32)
    inside = (columns >= 0) & (columns < Q) & (rows >= 0) & (rows < P)
    acc = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
    acc = _accumulate_gathered(
        acc,
        x_ptr,
        weight_ptr,
        n,
        rows,
        columns,
        inside,
        offs_n,
        mask_n,
        H,
        W,
        0,
        K_BLOCKS,
        C_IN,
        1,
        R,
        S,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        1,
        1,
        BLOCK_K,
    )
    return tl.where(inside[:, None], _relu(_biased(acc, bias)), 0.0)


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "POOL_P", "POOL_Q"])
def _conv2d_bias_relu_maxpool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    H,
    W,
    P,
    Q,
    POOL_P,
    POOL_Q,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POOL_ROWS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,i,j,o] = max over a, b in {-1, 0, 1} of relu(conv(x, weight) + bias)[n, 2i + a, 2j + b, o]

    BLOCK_Q columns of the convolution give BLOCK_Q / 2 - 1 pooled columns, the first and last being shared with the
    neighbours. Grid: (N * row strips, column strips, blocks of C_OUT).
    """
    strips = tl.cdiv(POOL_P, POOL_ROWS)
    n = tl.program_id(0) // strips
    first_row = tl.program_id(0) % strips * POOL_ROWS
    first_column = tl.program_id(1) * (BLOCK_Q // 2 - 1)
    columns = 2 * first_column - 1 + tl.arange(0, BLOCK_Q)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C_OUT

    lane = tl.arange(0, BLOCK_Q // 2)
    pooled_columns = first_column + lane
    right = tl.minimum(lane + 1, BLOCK_Q // 2 - 1)[:, None] + tl.zeros((BLOCK_Q // 2, BLOCK_N), dtype=tl.int32)

    _wait_for_previous_kernel(USE_PDL)
    bias = _bias(bias_ptr, offs_n, mask_n)
    above = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
    for i in range(0, 2 * POOL_ROWS + 1):
        current = _activated_row(
            x_ptr,
            weight_ptr,
            bias,
            n,
            2 * first_row - 1 + i,
            columns,
            offs_n,
            mask_n,
            H,
            W,
            P,
            Q,
            C_IN,
            R,
            S,
            STRIDE_H,
            STRIDE_W,
            PAD_H,
            PAD_W,
            K_BLOCKS,
            BLOCK_Q,
            BLOCK_N,
            BLOCK_K,
        )
        above = _maximum(above, current)
        if (i > 0) & (i % 2 == 0):
            pooled_row = first_row + i // 2 - 1
            # Rounding keeps the order, so it may come before the rest of the maximum.
            window = above.to(y_ptr.dtype.element_ty)
            above = current
            even, odd = tl.split(window.reshape(BLOCK_Q // 2, 2, BLOCK_N).permute(0, 2, 1))
            pooled = _maximum(_maximum(even, odd), tl.gather(even, right, axis=0))
            offs_y = _pixel_offset(n, pooled_row, pooled_columns, POOL_P, POOL_Q, C_OUT)
            mask_q = (lane < BLOCK_Q // 2 - 1) & (pooled_columns < tl.where(pooled_row < POOL_P, POOL_Q, 0))
            mask = mask_q[:, None] & mask_n[None, :]
            tl.store(y_ptr + offs_y[:, None] + offs_n[None, :], pooled, mask=mask)
    _let_next_kernel_start(USE_PDL)
