"""Global average pooling and a fully connected layer in one kernel.

Channels are divided between programs, so that x is read once; each program multiplies the means of its channels by
their columns of the weight, and the partial sums of all programs are added up as for a split K.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.parts import (
    _bias_residual_act_store,
    _let_next_kernel_start,
    _sum_of_splits,
    _wait_for_previous_kernel,
)


@triton.jit(do_not_specialize=["N", "PIXELS"])
def _mean_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,
    counters_ptr,
    y_ptr,
    N,
    PIXELS,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,o] = sum over c of mean[n,c] * weight[o,c] + bias[o], mean[n,c] = sum over pixels of x[n,pixel,c] / PIXELS

    with the mean rounded to the dtype of x. Grid: (blocks of N * SPLIT_K), one split per BLOCK_K channels.
    """
    block_m = tl.program_id(0) // SPLIT_K
    split = tl.program_id(0) % SPLIT_K
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_c = split * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = offs_c < C_IN

    _wait_for_previous_kernel(USE_PDL)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    x_rows = x_ptr + offs_m.to(tl.int64) * PIXELS * C_IN
    for first_pixel in range(0, PIXELS, BLOCK_P):
        pixels = first_pixel + tl.arange(0, BLOCK_P)
        offsets = x_rows[:, None, None] + pixels[None, :, None] * C_IN + offs_c[None, None, :]
        mask = mask_m[:, None, None] & (pixels < PIXELS)[None, :, None] & mask_c[None, None, :]
        total += tl.sum(tl.load(offsets, mask=mask, other=0.0).to(tl.float32), axis=1)
    mean = (total / PIXELS).to(x_ptr.dtype.element_ty)
    _let_next_kernel_start(USE_PDL)

    blocks_n: tl.constexpr = tl.cdiv(C_OUT, BLOCK_N)
    for block_n in range(0, blocks_n):
        offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < C_OUT
        columns = weight_ptr + offs_n.to(tl.int64) * C_IN
        weight_mask = mask_c[:, None] & mask_n[None, :]
        weight_tile = tl.load(columns[None, :] + offs_c[:, None], mask=weight_mask, other=0.0)
        acc = tl.dot(mean, weight_tile, input_precision="ieee")
        tile = block_m * blocks_n + block_n
        acc, holds_sum = _sum_of_splits(acc, partials_ptr, counters_ptr, tile, split, SPLIT_K, BLOCK_M, BLOCK_N)
        mask_y = offs_m < tl.where(holds_sum, N, 0)
        offs_y = offs_m.to(tl.int64) * C_OUT
        _bias_residual_act_store(
            acc, bias_ptr, None, None, y_ptr, offs_y, offs_n, mask_y, mask_n, False, False, "", 0.0
        )
