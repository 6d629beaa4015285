"""Maxima and averages over windows of pixels: sliding, adaptive, or all of them."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.parts import _let_next_kernel_start, _wait_for_previous_kernel


@triton.jit
def _larger(left, right):
    """NaN wherever one of them is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _window(i, SIZE: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr,
            DILATION: tl.constexpr, ADAPTIVE: tl.constexpr):  # fmt: skip
    """(first, behind the last) place of window i along one axis; both may lie in the padding."""
    if ADAPTIVE:
        return i * SIZE // OUT, ((i + 1) * SIZE + OUT - 1) // OUT
    first = i * STEP - PAD
    return first, tl.minimum(first + (TAPS - 1) * DILATION + 1, SIZE + PAD)


@triton.jit(do_not_specialize=["M"])
def _pool_kernel(
    x_ptr,
    y_ptr,
    M,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MAXIMUM: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNTS_PADDING: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,p,q,c] = maximum or average of x[n,h,w,c] over the window of (p, q), of R x S taps at most.

    M = N * P * Q output pixels. An average is over all taps with COUNTS_PADDING, else over those inside the image; with
    DIVISOR it is the sum over that. Grid: (blocks of M, blocks of C).
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    row = offs_m // Q
    n, p, q = row // P, row % P, offs_m % Q
    first_h, last_h = _window(p, H, P, R, STRIDE_H, PAD_H, DILATION_H, ADAPTIVE)
    first_w, last_w = _window(q, W, Q, S, STRIDE_W, PAD_W, DILATION_W, ADAPTIVE)
    end_h, end_w = tl.minimum(last_h, H), tl.minimum(last_w, W)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    images = n.to(tl.int64) * (H * W * C)
    neutral: tl.constexpr = float("-inf") if MAXIMUM else 0.0
    found = tl.full((BLOCK_M, BLOCK_T, BLOCK_C), neutral, dtype=tl.float32)
    _wait_for_previous_kernel(USE_PDL)
    for first in range(0, R * S, BLOCK_T):
        tap = first + tl.arange(0, BLOCK_T)
        h = first_h[:, None] + (tap // S * DILATION_H)[None, :]
        w = first_w[:, None] + (tap % S * DILATION_W)[None, :]
        inside = (tap < R * S)[None, :] & (h >= 0) & (h < end_h[:, None]) & (w >= 0) & (w < end_w[:, None])
        inside &= mask_m[:, None]
        places = images[:, None] + (h * W + w) * C
        tile = tl.load(
            x_ptr + places[:, :, None] + offs_c[None, None, :],
            mask=inside[:, :, None] & mask_c[None, None, :],
            other=neutral,
        ).to(tl.float32)
        found = _larger(found, tile) if MAXIMUM else found + tile
    _let_next_kernel_start(USE_PDL)
    if MAXIMUM:
        y_tile = tl.reduce(found, 1, _larger)
    else:
        y_tile = tl.sum(found, axis=1)
        if DIVISOR != 0:
            y_tile = y_tile / DIVISOR
        elif COUNTS_PADDING:
            y_tile = y_tile / ((last_h - first_h) * (last_w - first_w)).to(tl.float32)[:, None]
        else:
            count = (end_h - tl.maximum(first_h, 0)) * (end_w - tl.maximum(first_w, 0))
            y_tile = y_tile / count.to(tl.float32)[:, None]
    y_pointers = y_ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(y_pointers, y_tile.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])
