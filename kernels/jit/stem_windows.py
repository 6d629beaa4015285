"""Convolution of few channels, ReLU and a 3x3 max-pool of stride 2 in one kernel, over windows of an image's rows.

The taps of one row of a filter are S * C_IN neighbouring elements of x, its window. Where all windows start at the same
place within VECTOR elements, they are copied VECTOR at a time, but for their first HEAD and last TAIL elements.
In the GEMM view

    y^T = weight @ windows        [C_OUT, K] @ [K, columns], K = R * (HEAD + MAIN + TAIL) = R * S * C_IN

the weights are the operand that a program keeps, and a column and its right neighbour, which the pool compares, lie in
the same thread. K has the R * MAIN elements that are copied as vectors first, then the others. Columns are those of all
images one after the other, 2 * POOL_Q of each.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.parts import _let_next_kernel_start, _pixel_offset, _relu, _wait_for_previous_kernel
from kernels.jit.stem import _maximum

# A place outside of every row, for elements that are not there; the sum of two of them is an int32.
_OUTSIDE = tl.constexpr(-(2**30))


@triton.jit
def _window_places(
    block,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(filter row, place in the window's row, mask) of the block-th slice of K; place 0 is the first of MAIN."""
    if block < VECTOR_BLOCKS:
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        return k // MAIN, k % MAIN, k < R * MAIN
    k = (block - VECTOR_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = k % (HEAD + TAIL)
    return k // (HEAD + TAIL), place - HEAD + tl.where(place >= HEAD, MAIN, 0), k < R * (HEAD + TAIL)


@triton.jit
def _weight_tiles(
    weight_ptr,
    offs_n,
    mask_n,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    VECTOR_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The filters offs_n, one [BLOCK_N, BLOCK_K] for each slice of K."""
    row: tl.constexpr = HEAD + MAIN + TAIL
    filters = weight_ptr + offs_n.to(tl.int64) * (R * row)
    tiles = ()
    for block in tl.static_range(K_BLOCKS):
        r, place, mask_k = _window_places(block, R, HEAD, MAIN, TAIL, VECTOR_BLOCKS, BLOCK_K)
        offsets = r * row + HEAD + place
        tile = tl.load(filters[:, None] + offsets[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _window_tile(
    x_columns,
    columns,
    row,
    block,
    H,
    ROW_VECTORS,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The block-th slice of the windows that begin in row `row` of H rows of ROW_VECTORS * VECTOR elements,
    [BLOCK_K, BLOCK_Q].

    x_columns points to the windows' first vectors in row 0; columns is their place in the row in elements, a multiple
    of VECTOR, or _OUTSIDE. What is not in the image is 0.
    """
    r, place, mask_k = _window_places(block, R, HEAD, MAIN, TAIL, VECTOR_BLOCKS, BLOCK_K)
    h = row + r
    inside = mask_k & (h.to(tl.uint32) < H.to(tl.uint32))
    # Rows outside count as row 0: were each an offset from the one before it, every address would have a register.
    offsets = tl.where(inside, h, 0) * (ROW_VECTORS * VECTOR) + place
    if block < VECTOR_BLOCKS:
        # Of a vector all elements are in the image or none: numbered in vectors, the compiler sees that.
        vector = (block * BLOCK_K + tl.arange(0, BLOCK_K)) // VECTOR % (MAIN // VECTOR)
        places = (columns // VECTOR)[None, :] + vector[:, None]
        mask = places.to(tl.uint32) < tl.where(inside, ROW_VECTORS, 0).to(tl.uint32)[:, None]
    else:
        places = columns[None, :] + place[:, None]
        mask = places.to(tl.uint32) < tl.where(inside, ROW_VECTORS * VECTOR, 0).to(tl.uint32)[:, None]
    return tl.load(x_columns[None, :] + offsets[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N", "H", "ROW_VECTORS", "P", "Q", "POOL_P", "POOL_Q"])
def _conv2d_windows_bias_relu_maxpool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    N,
    H,
    ROW_VECTORS,
    P,
    Q,
    POOL_P,
    POOL_Q,
    C_OUT: tl.constexpr,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    STRIDE_H: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    PAD_H: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    ODD_P: tl.constexpr,
    ODD_Q: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    VECTOR_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POOL_ROWS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,i,j,o] = max over a, b in {-1, 0, 1} of relu(conv(x, weight) + bias)[n, 2i + a, 2j + b, o]

    Rounding, bias and ReLU keep the order, so they come after the maximum. BLOCK_Q columns of the convolution give
    BLOCK_Q / 2 - 1 pooled columns: of the first two only the right one is needed. FIRST_COLUMN is the place in a row,
    in elements, of the first vector of the first window. Grid: (column strips, row strips, blocks of C_OUT).
    """
    lane = tl.arange(0, BLOCK_Q)
    first_pooled = tl.program_id(0) * (BLOCK_Q // 2 - 1) - 1
    image = (first_pooled + lane // 2) // POOL_Q
    q = (first_pooled + lane // 2) % POOL_Q * 2 + lane % 2
    place = q * COLUMN_STEP + FIRST_COLUMN
    x_columns = x_ptr + (image.to(tl.int64) * H * (ROW_VECTORS * VECTOR) + place)
    columns = tl.where(image < N, place, _OUTSIDE)
    first_row = tl.program_id(1) * POOL_ROWS
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < C_OUT

    pair = tl.arange(0, BLOCK_Q // 2)
    pooled = first_pooled + pair
    y_columns = y_ptr + _pixel_offset(pooled // POOL_Q, first_row, pooled % POOL_Q, POOL_P, POOL_Q, C_OUT)
    mask_y = mask_n[:, None] & ((pair > 0) & (pooled < N * POOL_Q))[None, :]
    # The column to the left; at the image's left edge, where that is padding, one of the window's own.
    left = tl.where(pooled % POOL_Q == 0, pair, tl.maximum(pair - 1, 0))
    left = left[None, :] + tl.zeros((BLOCK_N, BLOCK_Q // 2), dtype=tl.int32)

    _wait_for_previous_kernel(USE_PDL)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    weights = _weight_tiles(weight_ptr, offs_n, mask_n, R, HEAD, MAIN, TAIL, K_BLOCKS, VECTOR_BLOCKS, BLOCK_K)
    window = tl.full((BLOCK_N, BLOCK_Q), -float("inf"), dtype=tl.float32)
    for p in range(tl.maximum(2 * first_row - 1, 0), 2 * tl.minimum(first_row + POOL_ROWS, POOL_P)):
        row = p * STRIDE_H - PAD_H
        acc = tl.zeros((BLOCK_N, BLOCK_Q), dtype=tl.float32)
        others = ()  # asked for before the sum over the vectors, which covers the way they take
        for block in tl.static_range(VECTOR_BLOCKS, K_BLOCKS):
            tile = _window_tile(
                x_columns, columns, row, block, H, ROW_VECTORS, R, HEAD, MAIN, TAIL, VECTOR, VECTOR_BLOCKS, BLOCK_K
            )
            others = others + (tile,)
        for block in tl.static_range(VECTOR_BLOCKS):
            tile = _window_tile(
                x_columns, columns, row, block, H, ROW_VECTORS, R, HEAD, MAIN, TAIL, VECTOR, VECTOR_BLOCKS, BLOCK_K
            )
            acc = tl.dot(weights[block], tile, acc, input_precision="ieee")
        for block in tl.static_range(K_BLOCKS - VECTOR_BLOCKS):
            acc = tl.dot(weights[VECTOR_BLOCKS + block], others[block], acc, input_precision="ieee")
        if ODD_P:
            acc = tl.where(p < P, acc, -float("inf"))
        window = _maximum(window, acc)
        if p % 2 == 1:
            if p > 2 * first_row:  # not the row above the strip, which only opens the first window
                inside = window
                if ODD_Q:
                    inside = tl.where((q < Q)[None, :], window, -float("inf"))
                even, odd = tl.split(inside.reshape(BLOCK_N, BLOCK_Q // 2, 2))
                value = _maximum(_maximum(even, odd), tl.gather(odd, left, axis=1))
                value = _relu(value + bias[:, None]).to(y_ptr.dtype.element_ty)
                tl.store(y_columns[None, :] + offs_n[:, None], value, mask=mask_y)
                y_columns += POOL_Q * C_OUT
            window = acc
    _let_next_kernel_start(USE_PDL)
