"""Convolution as one implicit GEMM, with bias, residual and ReLU in the epilogue.

The GEMM view, per group:

    M = N * P * Q            one row per output pixel (n, p, q)
    N = C_OUT / GROUPS       one column per output channel
    K = R * S * C_IN / GROUPS, ordered (r, s, c): contiguous in both operands

Memory: x is N,H,W,C_IN; weight is C_OUT,R,S,C_IN/GROUPS; residual and y are N,P,Q,C_OUT; all dense
(torch's channels_last), so a pixel index times the channel count is an offset and no strides are passed.
`C_IN` and `C_OUT` below are the channel counts of one group.

Offsets in elements are int64; pixel rows (M) are int32, which the launcher guarantees to be enough.
The parts above the kernel are shared by every convolution kernel of this package.
"""

# mypy: allow-untyped-defs
# What a kernel is called with is given types by Triton, one compilation at a time.

import triton
import triton.language as tl


@triton.jit
def _swizzled_block(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Order the blocks so that GROUP_M rows of blocks share their weight columns in L2."""
    blocks_per_band = GROUP_M * blocks_n
    first_m = pid // blocks_per_band * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)
    pid_in_band = pid % blocks_per_band
    return first_m + pid_in_band % rows, pid_in_band // rows


@triton.jit
def _input_corner(
    offs_m,
    P,
    Q,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
):
    """(n, h, w) of the input pixel under tap (0, 0) of output pixels offs_m; h and w may be outside the image."""
    row = offs_m // Q
    return row // P, row % P * STRIDE_H - PAD_H, offs_m % Q * STRIDE_W - PAD_W


@triton.jit
def _pixel_offset(n, h, w, H, W, CHANNELS: tl.constexpr):
    """int64 offset of channel 0 of pixel (n, h, w) in a dense N,H,W,CHANNELS tensor."""
    return ((n.to(tl.int64) * H + h) * W + w) * CHANNELS


@triton.jit
def _k_slice(k_block, TAPS: tl.constexpr, C_IN: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN_K: tl.constexpr):
    """(k, tap, channel, mask) of the k_block-th slice of BLOCK_K reduction indices; tap = r * S + s.

    FLATTEN_K cuts the whole of K into slices: no lane is wasted when a tap has few channels. Otherwise a slice
    stays inside one tap, so the tap is the same in every lane and costs scalar arithmetic only.
    """
    lane = tl.arange(0, BLOCK_K)
    if FLATTEN_K:
        offs_k = k_block * BLOCK_K + lane
        tap = offs_k // C_IN
        offs_c = offs_k % C_IN
        mask_k = offs_k < TAPS * C_IN
    else:
        blocks_per_tap: tl.constexpr = tl.cdiv(C_IN, BLOCK_K)
        tap = tl.full([BLOCK_K], k_block // blocks_per_tap, tl.int32)
        offs_c = k_block % blocks_per_tap * BLOCK_K + lane
        offs_k = tap * C_IN + offs_c
        mask_k = offs_c < C_IN
    return offs_k, tap, offs_c, mask_k


@triton.jit
def _bias_residual_relu_store(
    acc,
    bias_ptr,
    residual_ptr,
    y_ptr,
    offs_y,
    offs_c,
    mask_m,
    mask_c,
    HAS_RESIDUAL: tl.constexpr,
    APPLY_RELU: tl.constexpr,
):
    """y = act(acc + bias + residual) in float32, rounded once by the cast on the store.

    offs_y is the int64 offset of channel 0 of each row, offs_c the channel of each column.
    """
    acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    offsets = offs_y[:, None] + offs_c[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if APPLY_RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def _conv2d_bias_act_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    N,
    H,
    W,
    P,
    Q,
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
    HAS_RESIDUAL: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    FLATTEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[n,p,q,o] = act(sum over r,s,c of x[n,h,w,c] * weight[o,r,s,c] + bias[o] + residual[n,p,q,o])

    with h = p * STRIDE_H + r * DILATION_H - PAD_H, w alike, and c over the channels of o's group.
    Grid: (blocks_m * blocks_n, GROUPS). Pixels outside the image and lanes outside M, C_OUT and K are loaded as 0.
    """
    M = N * P * Q
    pid_m, pid_n = _swizzled_block(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C_OUT, BLOCK_N), GROUP_M)
    group = tl.program_id(1)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < C_OUT
    offs_o = group * C_OUT + offs_n

    n, h, w = _input_corner(offs_m, P, Q, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    x_rows = x_ptr + _pixel_offset(n, h, w, H, W, GROUPS * C_IN) + group * C_IN
    weight_columns = weight_ptr + offs_o.to(tl.int64) * (R * S * C_IN)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k_blocks: tl.constexpr = tl.cdiv(R * S * C_IN, BLOCK_K) if FLATTEN_K else R * S * tl.cdiv(C_IN, BLOCK_K)
    for k_block in range(0, k_blocks):
        offs_k, tap, offs_c, mask_k = _k_slice(k_block, R * S, C_IN, BLOCK_K, FLATTEN_K)
        tap_h = tap // S * DILATION_H
        tap_w = tap % S * DILATION_W

        x_mask = mask_m[:, None] & mask_k[None, :]
        if PAD_H > 0:
            rows = h[:, None] + tap_h[None, :]
            x_mask &= (rows >= 0) & (rows < H)
        if PAD_W > 0:
            columns = w[:, None] + tap_w[None, :]
            x_mask &= (columns >= 0) & (columns < W)
        x_offsets = (tap_h.to(tl.int64) * W + tap_w) * (GROUPS * C_IN) + offs_c
        x_tile = tl.load(x_rows[:, None] + x_offsets[None, :], mask=x_mask, other=0.0)

        weight_mask = mask_k[:, None] & mask_n[None, :]
        weight_tile = tl.load(weight_columns[None, :] + offs_k[:, None], mask=weight_mask, other=0.0)

        acc = tl.dot(x_tile, weight_tile, acc, input_precision=INPUT_PRECISION)

    offs_y = offs_m.to(tl.int64) * (GROUPS * C_OUT)
    _bias_residual_relu_store(
        acc, bias_ptr, residual_ptr, y_ptr, offs_y, offs_o, mask_m, mask_n, HAS_RESIDUAL, APPLY_RELU
    )
