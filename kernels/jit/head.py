"""Global average pooling and a fully connected layer in one kernel.

Channels are divided between programs, and where images are few the classes too; each program multiplies the means of
its channels by their columns of the weight, and the partial sums of all programs are added up as for a split K.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.epilogue import _bias, _bias_residual_act_store
from kernels.jit.parts import _let_next_kernel_start, _wait_for_previous_kernel
from kernels.jit.splits import _arrived_last, _store_partial, _sum_of_partials


@triton.jit
def _weight_tile(weight_ptr, offs_c, mask_c, offs_n, C_IN: tl.constexpr, C_OUT: tl.constexpr):
    columns = weight_ptr + offs_n.to(tl.int64) * C_IN
    mask = mask_c[:, None] & (offs_n < C_OUT)[None, :]
    return tl.load(columns[None, :] + offs_c[:, None], mask=mask, other=0.0)


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
    N_BLOCKS: tl.constexpr,
    SHARES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,o] = sum over c of mean[n,c] * weight[o,c] + bias[o], mean[n,c] = sum over pixels of x[n,pixel,c] / PIXELS

    with the mean rounded to the dtype of x. Each program has BLOCK_M images, one split of BLOCK_K channels and one of
    SHARES shares of the classes: N_BLOCKS blocks of BLOCK_N, one after the other. Grid: (blocks of N * SPLIT_K *
    SHARES): programs of the same images and channels run beside each other, and find them in L2.
    """
    share = tl.program_id(0) % SHARES
    split = tl.program_id(0) // SHARES % SPLIT_K
    block_m = tl.program_id(0) // (SHARES * SPLIT_K)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_c = split * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_c = offs_c < C_IN
    first_column = share * (N_BLOCKS * BLOCK_N)
    offs_n = first_column + tl.arange(0, BLOCK_N)

    _wait_for_previous_kernel(USE_PDL)
    if N_BLOCKS == 1:  # on its way while x is
        weight_tile = _weight_tile(weight_ptr, offs_c, mask_c, offs_n, C_IN, C_OUT)
    total = tl.zeros((BLOCK_M, BLOCK_P, BLOCK_K), dtype=tl.float32)  # of each BLOCK_P-th pixel
    x_rows = x_ptr + offs_m.to(tl.int64) * PIXELS * C_IN
    for first_pixel in range(0, PIXELS, BLOCK_P):
        pixels = first_pixel + tl.arange(0, BLOCK_P)
        offsets = x_rows[:, None, None] + pixels[None, :, None] * C_IN + offs_c[None, None, :]
        mask = mask_m[:, None, None] & (pixels < PIXELS)[None, :, None] & mask_c[None, None, :]
        total += tl.load(offsets, mask=mask, other=0.0).to(tl.float32)
    mean = (tl.sum(total, axis=1) / PIXELS).to(x_ptr.dtype.element_ty)
    _let_next_kernel_start(USE_PDL)

    tile = block_m * SHARES + share
    partials = partials_ptr + tile.to(tl.int64) * (N_BLOCKS * SPLIT_K * BLOCK_M * BLOCK_N)
    for block in range(0, N_BLOCKS):
        offs_block = offs_n + block * BLOCK_N
        if N_BLOCKS > 1:
            weight_tile = _weight_tile(weight_ptr, offs_c, mask_c, offs_block, C_IN, C_OUT)
        acc = tl.dot(mean, weight_tile, input_precision="ieee")
        partial = partials + (block * SPLIT_K + split) * (BLOCK_M * BLOCK_N)
        _store_partial(partial, acc, mask_m, offs_block, C_OUT, BLOCK_M, BLOCK_N)

    last = _arrived_last(counters_ptr, tile, SPLIT_K)
    whole: tl.constexpr = C_OUT == SHARES * N_BLOCKS * BLOCK_N
    offs_y = offs_m.to(tl.int64) * C_OUT
    for block in range(0, tl.where(last, N_BLOCKS, 0)):
        offs_block = offs_n + block * BLOCK_N
        mask_n = offs_block < C_OUT
        bias = _bias(bias_ptr, offs_block, mask_n)
        first = partials + block * (SPLIT_K * BLOCK_M * BLOCK_N)
        column = first_column + block * BLOCK_N
        y_tile = _sum_of_partials(first, mask_m, column, last, C_OUT, whole, SPLIT_K, BLOCK_M, BLOCK_N)
        _bias_residual_act_store(
            y_tile, bias, None, None, y_ptr, offs_y, offs_block, mask_m, mask_n, False, False, "", 0.0
        )
