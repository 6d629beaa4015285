"""What the kernels share: addresses, the loops over K, and how one kernel waits for another.

The GEMM view of a convolution, per group:

    M = N * P * Q            one row per output pixel (n, p, q)
    N = C_OUT / GROUPS       one column per output channel
    K = R * S * C_IN / GROUPS, ordered (r, s, c): contiguous in both operands

Memory: activations are N,H,W,C; a weight is C_OUT,R,S,C_IN/GROUPS; all dense (torch's channels_last), so a pixel
index times the channel count is an offset and no strides are passed. Offsets in elements are int64; pixel rows (M)
are int32, which the launcher guarantees to be enough.
"""

# mypy: allow-untyped-defs
# What a kernel is called with is given types by Triton, one compilation at a time.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _swizzled_block(pid, blocks_m, blocks_n):
    """Order the blocks so that 8 rows of blocks share their weight columns in L2: more only help where x is larger."""
    GROUP_M: tl.constexpr = 8
    blocks_per_band = GROUP_M * blocks_n
    first_m = pid // blocks_per_band * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)
    pid_in_band = pid % blocks_per_band
    return first_m + pid_in_band % rows, pid_in_band // rows


@triton.jit
def _pixels(offs_m, P, Q):
    """(n, p, q) of the output pixels offs_m."""
    pixel = offs_m.to(tl.uint32)  # dividing signed numbers costs half as much again
    row = pixel // Q.to(tl.uint32)
    n = row // P.to(tl.uint32)
    return n.to(tl.int32), (row - n * P).to(tl.int32), (pixel - row * Q).to(tl.int32)


@triton.jit
def _box_corner(box, P, Q, TILE_N: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr):
    """(n, p, q) of the first output pixel of the box-th box of TILE_N x TILE_P x TILE_Q pixels."""
    boxes_q = tl.cdiv(Q, TILE_Q)
    boxes_p = tl.cdiv(P, TILE_P)
    row = box // boxes_q
    return row // boxes_p * TILE_N, row % boxes_p * TILE_P, box % boxes_q * TILE_Q


@triton.jit
def _box_pixels(n, p, q, TILE_N: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr):
    """(n, p, q) of every output pixel of the box at corner (n, p, q), in the order in which TMA loads them."""
    lane = tl.arange(0, TILE_N * TILE_P * TILE_Q)
    return n + lane // (TILE_P * TILE_Q), p + lane // TILE_Q % TILE_P, q + lane % TILE_Q


@triton.jit
def _pixel_offset(n, h, w, H, W, CHANNELS: tl.constexpr):
    """int64 offset of channel 0 of pixel (n, h, w) in a dense N,H,W,CHANNELS tensor."""
    return ((n.to(tl.int64) * H + h) * W + w) * CHANNELS


@triton.jit
def _taps_inside(
    h, w, mask_m, H, W, R: tl.constexpr, S: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr
):
    """Bit r * S + s of each row of the tile: whether it has that tap, and the tap lies inside the image. R * S < 32.

    h and w are the pixel under tap (0, 0); as an unsigned number one left of or above the image is beyond it.
    """
    in_row = tl.zeros_like(w)
    for s in tl.static_range(S):
        in_row |= tl.where((w + s * DILATION_W).to(tl.uint32) < W.to(tl.uint32), 1 << s, 0)
    inside = tl.zeros_like(h)
    for r in tl.static_range(R):
        inside |= tl.where((h + r * DILATION_H).to(tl.uint32) < H.to(tl.uint32), in_row << (r * S), 0)
    return tl.where(mask_m, inside, 0)


@triton.jit
def _accumulate_gathered(
    acc,
    x_ptr,
    weight_ptr,
    n,
    p,
    q,
    mask_m,
    offs_n,
    mask_n,
    H,
    W,
    first_k_block,
    last_k_block,
    C_IN: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALL_COLUMNS: tl.constexpr = False,
    ALL_ROWS: tl.constexpr = False,
):
    """acc + sum over K slices [first_k_block, last_k_block) of x[n, h, w, c] * weight[offs_n, r, s, c].

    x_ptr points to the first channel of the group. Pixels outside the image and masked lanes are loaded as 0; with
    ALL_COLUMNS mask_n is true everywhere, with ALL_ROWS every (n, p, q) is a pixel of the output.

    Where a tap has fewer channels than a slice is long, the whole of K is cut into slices: no lane is wasted, and each
    has its own tap. Otherwise a slice stays inside one tap: addresses and masks of the tile are computed once, before
    the loop, and a slice only moves the pointer and picks its tap's bit of the mask.
    """
    h = p * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W
    x_rows = _pixel_offset(n, h, w, H, W, GROUPS * C_IN)[:, None]
    weight_columns = (offs_n.to(tl.int64) * (R * S * C_IN))[None, :]
    if R * S > 1 and C_IN < BLOCK_K:
        for k_block in range(first_k_block, last_k_block):
            offs_k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
            mask_k = offs_k < R * S * C_IN
            tap = offs_k // C_IN
            tap_h = tap // S * DILATION_H
            tap_w = tap % S * DILATION_W
            x_mask = mask_m[:, None] & mask_k[None, :]
            if PAD_H > 0:
                rows = h[:, None] + tap_h[None, :]
                x_mask &= (rows >= 0) & (rows < H)
            if PAD_W > 0:
                columns = w[:, None] + tap_w[None, :]
                x_mask &= (columns >= 0) & (columns < W)
            x_offsets = (tap_h.to(tl.int64) * W + tap_w) * (GROUPS * C_IN) + offs_k % C_IN
            x_tile = tl.load(x_ptr + x_rows + x_offsets[None, :], mask=x_mask, other=0.0)
            weight_mask = mask_k[:, None] & mask_n[None, :]
            weight_tile = tl.load(weight_ptr + weight_columns + offs_k[:, None], mask=weight_mask, other=0.0)
            acc = tl.dot(x_tile, weight_tile, acc, input_precision="ieee")
    else:
        # 64 channels are one 128-byte line of a pixel: the parts of a longer slice share their rows' addresses. Where
        # one product follows another, Triton divides rows alone between warps, 16 each; of fewer than 64 rows some
        # would be computed twice.
        PART: tl.constexpr = min(BLOCK_K, 64) if acc.shape[0] >= 64 else BLOCK_K
        blocks_per_tap: tl.constexpr = tl.cdiv(C_IN, BLOCK_K)
        padded: tl.constexpr = PAD_H > 0 or PAD_W > 0
        lane = tl.arange(0, PART)
        x_tile_offsets = x_rows + lane[None, :]
        weight_tile_offsets = weight_columns + lane[:, None]
        if padded and R * S < 32:
            inside = _taps_inside(h, w, mask_m, H, W, R, S, DILATION_H, DILATION_W)
        for k_block in range(first_k_block, last_k_block):
            if R * S == 1:
                tap = 0
                channel = k_block * BLOCK_K
                x_slice = x_ptr + channel
            else:
                tap = k_block // blocks_per_tap
                channel = k_block % blocks_per_tap * BLOCK_K
                pixel = (tap // S * DILATION_H).to(tl.int64) * W + tap % S * DILATION_W
                x_slice = x_ptr + pixel * (GROUPS * C_IN) + channel
            weight_slice = weight_ptr + (tap * C_IN + channel)
            if not padded:
                mask_x = mask_m
            elif R * S < 32:
                mask_x = (inside & (1 << tap)) != 0
            else:
                rows = (h + tap // S * DILATION_H).to(tl.uint32)
                columns = (w + tap % S * DILATION_W).to(tl.uint32)
                mask_x = mask_m & (rows < H.to(tl.uint32)) & (columns < W.to(tl.uint32))
            for part in tl.static_range(BLOCK_K // PART):
                x_pointers = x_slice + part * PART + x_tile_offsets
                weight_pointers = weight_slice + part * PART + weight_tile_offsets
                if C_IN % BLOCK_K == 0 and ALL_ROWS and not padded:
                    x_tile = tl.load(x_pointers)
                elif C_IN % BLOCK_K == 0:
                    x_tile = tl.load(x_pointers, mask=mask_x[:, None], other=0.0)
                else:
                    mask_k = channel + part * PART + lane < C_IN
                    x_tile = tl.load(x_pointers, mask=mask_x[:, None] & mask_k[None, :], other=0.0)
                if C_IN % BLOCK_K == 0 and ALL_COLUMNS:
                    weight_tile = tl.load(weight_pointers)
                elif C_IN % BLOCK_K == 0:
                    weight_tile = tl.load(weight_pointers, mask=mask_n[None, :], other=0.0)
                else:
                    weight_tile = tl.load(weight_pointers, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
                acc = tl.dot(x_tile, weight_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _accumulate_boxes(
    acc,
    x_desc,
    weight_desc,
    n,
    h,
    w,
    first_column,
    first_k_block,
    last_k_block,
    C_IN: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + K slices [first_k_block, last_k_block) of the convolution of stride 1 of one box of pixels.

    acc has a row per filter and a column per pixel. The box of x under tap (0, 0) is at (n, h, w). x_desc loads boxes
    of TILE_N x TILE_P x TILE_Q pixels and BLOCK_K channels, weight_desc BLOCK_N filters and BLOCK_K of their elements;
    both load 0 outside the tensor, which is the padding. C_IN is a multiple of BLOCK_K.

    The box is the second operand, since WGMMA always reads that one from shared memory; as the first, Triton would
    pass a tile that is reshaped through registers.
    """
    blocks_per_tap: tl.constexpr = C_IN // BLOCK_K
    for k_block in range(first_k_block, last_k_block):
        tap = k_block // blocks_per_tap
        channel = k_block % blocks_per_tap * BLOCK_K
        x_tile = x_desc.load([n, h + tap // S, w + tap % S, channel]).reshape(BLOCK_M, BLOCK_K)
        weight_tile = weight_desc.load([first_column, k_block * BLOCK_K])
        acc = tl.dot(weight_tile, x_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _wait_for_previous_kernel(USE_PDL: tl.constexpr):
    """Under programmatic dependent launch: block until the kernel before this one is complete.

    Every kernel calls it before it touches an activation, to read or to write, so completion is transitive.
    """
    if USE_PDL:
        gdc_wait()


@triton.jit
def _let_next_kernel_start(USE_PDL: tl.constexpr):
    """Under programmatic dependent launch: the next kernel may take up free multiprocessors and wait there."""
    if USE_PDL:
        gdc_launch_dependents()
