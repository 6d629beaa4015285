"""A convolution with ReLU and the 1x1 convolution after it in one kernel: what lies between stays on the chip.

BLOCK_MID covers all channels of the first convolution, so that each program holds whole rows of the second's input.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.epilogue import _bias, _bias_residual_act_store, _biased, _relu
from kernels.jit.held import _bias_residual_act_store_as_held, _columns
from kernels.jit.parts import (
    _accumulate_boxes,
    _accumulate_gathered,
    _box_corner,
    _box_pixels,
    _let_next_kernel_start,
    _pixel_offset,
    _pixels,
    _wait_for_previous_kernel,
)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "H_S", "W_S"])
def _conv2d_conv1x1_kernel(
    x,
    weight,
    bias_ptr,
    expand_weight_ptr,
    expand_bias_ptr,
    residual_ptr,
    shortcut_ptr,
    shortcut_weight_ptr,
    y_ptr,
    N,
    H,
    W,
    P,
    Q,
    H_S,
    W_S,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    C_OUT: tl.constexpr,
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
    USE_BOXES: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARP_ROWS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,p,q,o] = act(sum over m of h[n,p,q,m] * expand_weight[o,m] + sum over c of shortcut[n,h_s,w_s,c]
                      * shortcut_weight[o,c] + expand_bias[o] + residual[n,p,q,o])

    with h = relu(conv(x, weight) + bias) rounded to the dtype of y, as in implicit_gemm.py. With USE_BOXES, x and
    weight are TMA descriptors and a row block is a box of pixels (box_gemm.py); otherwise they are pointers and it is
    BLOCK_M consecutive pixels. Grid: row blocks.
    """
    if USE_BOXES:
        n0, p0, q0 = _box_corner(tl.program_id(0), P, Q, TILE_N, TILE_P, TILE_Q)
        n, p, q = _box_pixels(n0, p0, q0, TILE_N, TILE_P, TILE_Q)
        mask_m = (n < N) & (p < P) & (q < Q)
    else:
        offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, p, q = _pixels(tl.minimum(offs_m, N * P * Q - 1), P, Q)  # beyond the last pixel it once more
        mask_m = offs_m < N * P * Q
    offs_mid = tl.arange(0, BLOCK_MID)
    mask_mid = offs_mid < C_MID

    _wait_for_previous_kernel(USE_PDL)
    bias = _bias(bias_ptr, offs_mid, mask_mid)
    if USE_BOXES:
        acc = tl.zeros((BLOCK_MID, BLOCK_M), dtype=tl.float32)
        acc = _accumulate_boxes(
            acc, x, weight, n0, p0 - PAD_H, q0 - PAD_W, 0, 0, K_BLOCKS, C_IN, R, S, BLOCK_M, BLOCK_K
        ).T
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_MID), dtype=tl.float32)
        acc = _accumulate_gathered(
            acc,
            x,
            weight,
            n,
            p,
            q,
            mask_m,
            offs_mid,
            mask_mid,
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
            DILATION_H,
            DILATION_W,
            BLOCK_K,
            C_MID == BLOCK_MID,
        )
    hidden = _relu(_biased(acc, bias))
    if BLOCK_MID > C_MID:  # beyond the channels an infinity of x met weights of 0: NaN
        hidden = tl.where(mask_mid[None, :], hidden, 0.0)
    hidden = hidden.to(y_ptr.dtype.element_ty)
    _let_next_kernel_start(USE_PDL)

    offs_y = _pixel_offset(n, p, q, P, Q, C_OUT)
    for block_n in range(0, tl.cdiv(C_OUT, BLOCK_N)):
        offs_n = block_n * BLOCK_N + _columns(BLOCK_N, WARP_ROWS)
        mask_n = offs_n < C_OUT
        expand_bias = _bias(expand_bias_ptr, offs_n, mask_n)
        columns = expand_weight_ptr + offs_n.to(tl.int64) * C_MID
        expand_tile = tl.load(columns[None, :] + offs_mid[:, None], mask=mask_mid[:, None] & mask_n[None, :], other=0.0)
        y_tile = tl.dot(hidden, expand_tile, input_precision="ieee")
        if HAS_PROJECTION:
            y_tile = _accumulate_gathered(
                y_tile,
                shortcut_ptr,
                shortcut_weight_ptr,
                n,
                p,
                q,
                mask_m,
                offs_n,
                mask_n,
                H_S,
                W_S,
                0,
                K_BLOCKS_S,
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
                not USE_BOXES,
            )
        if WARP_ROWS > 0:
            _bias_residual_act_store_as_held(
                y_tile,
                expand_bias,
                residual_ptr,
                None,
                y_ptr,
                tl.program_id(0) * BLOCK_M,
                N * P * Q,
                block_n * BLOCK_N,
                C_OUT,
                C_OUT,
                HAS_RESIDUAL,
                APPLY_RELU,
                "",
                0.0,
                WARP_ROWS,
                1,
            )
        else:
            _bias_residual_act_store(
                y_tile,
                expand_bias,
                residual_ptr,
                None,
                y_ptr,
                offs_y,
                offs_n,
                mask_m,
                mask_n,
                HAS_RESIDUAL,
                APPLY_RELU,
                "",
                0.0,
            )
