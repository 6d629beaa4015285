"""What the kernels share: addresses, the loops over K, the sum over splits of K, and the epilogue.

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
def _store_partial(pointer, acc, mask_m, offs_n, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a partial tile, but for rows outside mask_m and columns from N on: a row's first four of every eight
    columns, then its other fours.

    A thread holds four or eight columns of a row and moves four at a time: in both cases those of its neighbours lie
    beside them, and no sector is touched twice.
    """
    column = tl.arange(0, BLOCK_N)
    column = column // 4 % 2 * (BLOCK_N // 2) + column // 8 * 4 + column % 4
    offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + column[None, :]
    # In whole fours: what lies beyond N is not used.
    tl.store(pointer + offsets, acc, mask=mask_m[:, None] & (offs_n < tl.cdiv(N, 4) * 4)[None, :])


@triton.jit
def _arrived_last(counters_ptr, tile, SPLIT_K: tl.constexpr):
    """Whether the other SPLIT_K - 1 programs of the tile have arrived; the last leaves its counter at 0, as found."""
    tl.debug_barrier()  # all that this program stores is written before it counts as arrived
    last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    tl.store(counters_ptr + tile, 0, mask=last)
    return last


@triton.jit
def _sum_of_partials(
    partials,
    mask_m,
    first_column,
    is_last,
    N: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of SPLIT_K partial tiles, the first at `partials`, in their order; 0 if not `is_last`.

    Rows outside mask_m are the first row once more, which costs no access to memory; with ALL_COLUMNS no tile has
    columns from N on.
    """
    # As they lie in memory, [BLOCK_M, 2, BLOCK_N // 2], and as many on their way to shared memory as
    # config.PARTIAL_SUM_BYTES hold; of small ones, registers hold enough.
    IN_FLIGHT: tl.constexpr = max(1, min(SPLIT_K, 8192 // (BLOCK_M * BLOCK_N)))
    STAGES: tl.constexpr = 1 if BLOCK_M * BLOCK_N <= 1024 else IN_FLIGHT + 1
    half, lane = tl.arange(0, 2), tl.arange(0, BLOCK_N // 2)
    row = tl.where(mask_m, tl.arange(0, BLOCK_M), 0)
    offsets = row[:, None, None] * BLOCK_N + (half[:, None] * (BLOCK_N // 2) + lane[None, :])[None, :, :]
    column = first_column + half[:, None] * 4 + (lane // 4 * 8 + lane % 4)[None, :]
    total = tl.zeros((BLOCK_M, 2, BLOCK_N // 2), dtype=tl.float32)
    for split in tl.range(0, tl.where(is_last, SPLIT_K, 0), num_stages=STAGES):
        pointers = partials + split * (BLOCK_M * BLOCK_N) + offsets
        if ALL_COLUMNS:
            total += tl.load(pointers, cache_modifier=".cg")
        else:
            there = (column < tl.cdiv(N, 4) * 4)[None, :, :]
            total += tl.load(pointers, mask=there, other=0.0, cache_modifier=".cg")
    return total.reshape(BLOCK_M, 2, BLOCK_N // 8, 4).permute(0, 2, 1, 3).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _sum_of_splits(
    acc,
    partials_ptr,
    counters_ptr,
    tile,
    split,
    mask_m,
    first_column,
    N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(sum of the SPLIT_K partial tiles, whether this program is the one that holds it).

    Every program stores its partial tile; the last to arrive adds them up, always in the order of the splits, so the
    sum does not depend on who came last. Of rows outside mask_m and columns from N on nothing is stored.
    """
    partials = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
    offs_n = first_column + tl.arange(0, BLOCK_N)
    _store_partial(partials + split * (BLOCK_M * BLOCK_N), acc, mask_m, offs_n, N, BLOCK_M, BLOCK_N)
    last = _arrived_last(counters_ptr, tile, SPLIT_K)
    total = _sum_of_partials(partials, mask_m, first_column, last, N, N % BLOCK_N == 0, SPLIT_K, BLOCK_M, BLOCK_N)
    return total, last


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
def _bias(bias_ptr, offs_c, mask_c):
    """The bias of the channels offs_c; loaded before the products, since nothing after them would cover its way."""
    return tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)


@triton.jit
def _biased(acc, bias):
    """acc + bias, in float32; bias is that of each column."""
    return acc + bias.to(tl.float32)[None, :]


@triton.jit
def _relu(value):
    """max(value, 0); NaN stays NaN."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clipped(value, LOW: tl.constexpr, HIGH: tl.constexpr):
    """min(max(value, LOW), HIGH); NaN stays NaN."""
    value = tl.maximum(value, LOW, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _activated(value, slope_ptr, offs_c, mask_c, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """The activation of a float32 tile whose columns are the channels offs_c, as operators/activations.py has it.

    offs_c and mask_c have the tile's rank.
    """
    if ACTIVATION == "relu6":
        value = _clipped(value, 0.0, 6.0)
    elif ACTIVATION == "leaky_relu":
        value = tl.where(value > 0, value, value * NEGATIVE_SLOPE)
    elif ACTIVATION == "prelu":
        slope = tl.load(slope_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        value = tl.where(value > 0, value, value * slope)
    elif ACTIVATION == "sigmoid":
        value = tl.sigmoid(value)
    elif ACTIVATION == "silu":
        value = value * tl.sigmoid(value)
    elif ACTIVATION == "hardsigmoid":
        value = _clipped(value + 3.0, 0.0, 6.0) / 6.0
    elif ACTIVATION == "hardswish":
        value = value * _clipped(value + 3.0, 0.0, 6.0) / 6.0
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    return value


@triton.jit
def _bias_residual_act_store(
    acc,
    bias,
    residual_ptr,
    slope_ptr,
    y_ptr,
    offs_y,
    offs_c,
    mask_m,
    mask_c,
    HAS_RESIDUAL: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
):
    """y = act(acc + bias + residual) in float32, rounded once by the cast on the store.

    offs_y is the int64 offset of channel 0 of each row, offs_c the channel of each column.
    """
    acc = _biased(acc, bias)
    _residual_act_store(
        acc,
        residual_ptr,
        slope_ptr,
        y_ptr,
        offs_y[:, None],
        offs_c[None, :],
        mask_m[:, None],
        mask_c[None, :],
        HAS_RESIDUAL,
        APPLY_RELU,
        ACTIVATION,
        NEGATIVE_SLOPE,
    )


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


@triton.jit
def _residual_act_store(
    acc,
    residual_ptr,
    slope_ptr,
    y_ptr,
    offs_y,
    offs_c,
    mask_m,
    mask_c,
    HAS_RESIDUAL: tl.constexpr,
    APPLY_RELU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
):
    """The same without the bias; offsets and masks of rows and of columns have the tile's rank."""
    offsets = offs_y + offs_c
    mask = mask_m & mask_c
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if APPLY_RELU:
        acc = _relu(acc)
    if ACTIVATION != "":
        acc = _activated(acc, slope_ptr, offs_c, mask_c, ACTIVATION, NEGATIVE_SLOPE)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


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
