"""Convolution of few channels, ReLU and a 3x3 max-pool of stride 2 in one kernel, over windows of an image's rows.

The taps of one row of a filter are S * C_IN neighbouring elements of x, its window. Where all windows start at the same
place within VECTOR elements, they are copied VECTOR at a time, but for their first HEAD and last TAIL elements.
In the GEMM view

    y^T = weight @ windows        [C_OUT, K] @ [K, columns], K = R * (HEAD + MAIN + TAIL) = R * S * C_IN

the weights are the operand that a program keeps, and a column and its right neighbour, which the pool compares, lie in
the same thread. K has the R * MAIN elements that are copied as vectors first, in slices of BLOCK_K and one of LAST_K
for what is left, then the others in one of OTHER_K; 0 where there is none. Columns are those of all images one after
the other, 2 * POOL_Q of each.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from kernels.jit.epilogue import _bias, _relu
from kernels.jit.parts import _let_next_kernel_start, _pixel_offset, _wait_for_previous_kernel
from kernels.jit.stem import _maximum

# A place outside of every row, for elements that are not there; the sum of two of them is an int32.
_OUTSIDE = tl.constexpr(-(2**30))


@triton.jit
def _window_places(
    index: tl.constexpr,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST_K: tl.constexpr,
    OTHER_K: tl.constexpr,
):
    """(filter row, place in the window's row) of the elements of a slice of K; place 0 is the first of MAIN, and what
    lies beyond K has row R or a later one."""
    full: tl.constexpr = R * MAIN // BLOCK_K
    if index < full:
        k = index * BLOCK_K + tl.arange(0, BLOCK_K)
        return k // MAIN, k % MAIN
    elif index == full and LAST_K > 0:
        k = full * BLOCK_K + tl.arange(0, LAST_K)
        return k // MAIN, k % MAIN
    else:
        k = tl.arange(0, OTHER_K)
        place = k % (HEAD + TAIL)
        return k // (HEAD + TAIL), place - HEAD + tl.where(place >= HEAD, MAIN, 0)


@triton.jit
def _weight_tiles(
    weight_ptr,
    offs_n,
    C_OUT: tl.constexpr,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST_K: tl.constexpr,
    OTHER_K: tl.constexpr,
):
    """The filters offs_n, one tile of BLOCK_N rows for each slice of K."""
    length: tl.constexpr = HEAD + MAIN + TAIL
    filters = weight_ptr + offs_n.to(tl.int64) * (R * length)
    tiles = ()
    for index in tl.static_range(SLICES):
        r, place = _window_places(index, R, HEAD, MAIN, TAIL, BLOCK_K, LAST_K, OTHER_K)
        mask = (r < R)[None, :]
        if C_OUT % BLOCK_N > 0:
            mask &= (offs_n < C_OUT)[:, None]
        tile = tl.load(filters[:, None] + (r * length + HEAD + place)[None, :], mask=mask, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _row_limits(
    columns,
    H,
    ROW_VECTORS,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    SLICES: tl.constexpr,
    VECTOR_SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST_K: tl.constexpr,
    OTHER_K: tl.constexpr,
):
    """Of each element of the windows, one tile [slice, BLOCK_Q] for each slice of K: the image's rows H if it lies
    in a row of ROW_VECTORS * VECTOR elements, else 0, which no row is below.

    columns is the place of the windows' first vectors in the row in elements, a multiple of VECTOR, or _OUTSIDE.
    """
    limits = ()
    for index in tl.static_range(SLICES):
        r, place = _window_places(index, R, HEAD, MAIN, TAIL, BLOCK_K, LAST_K, OTHER_K)
        if index < VECTOR_SLICES:
            # Of a vector all elements are in the image or none: numbered in vectors, the compiler sees that.
            k = index * BLOCK_K + tl.arange(0, r.shape[0])
            places = (columns // VECTOR)[None, :] + (k // VECTOR % (MAIN // VECTOR))[:, None]
            inside = places.to(tl.uint32) < ROW_VECTORS.to(tl.uint32)
        else:
            places = columns[None, :] + place[:, None]
            inside = places.to(tl.uint32) < (ROW_VECTORS * VECTOR).to(tl.uint32)
        limits = limits + (tl.where(inside & (r < R)[:, None], H, 0).to(tl.uint32),)
    return limits


@triton.jit
def _convolved_row(
    weights,
    limits,
    x_columns,
    row,
    ROW_VECTORS,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    SLICES: tl.constexpr,
    VECTOR_SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST_K: tl.constexpr,
    OTHER_K: tl.constexpr,
):
    """weights @ the windows that begin in row `row` of the image, [BLOCK_N, BLOCK_Q].

    x_columns points to the windows' first vectors in row 0; for limits see `_row_limits`.
    """
    tiles = ()  # what is not copied in vectors is asked for first and used last: the sum covers the way it takes
    for i in tl.static_range(SLICES):
        r, place = _window_places((i + VECTOR_SLICES) % SLICES, R, HEAD, MAIN, TAIL, BLOCK_K, LAST_K, OTHER_K)
        mask = (row + r).to(tl.uint32)[:, None] < limits[(i + VECTOR_SLICES) % SLICES]
        offsets = (row + r) * (ROW_VECTORS * VECTOR) + place
        tiles = tiles + (tl.load(x_columns[None, :] + offsets[:, None], mask=mask, other=0.0),)
    acc = tl.zeros((BLOCK_N, BLOCK_Q), dtype=tl.float32)
    for i in tl.static_range(SLICES):
        acc = tl.dot(weights[i], tiles[(i + SLICES - VECTOR_SLICES) % SLICES], acc, input_precision="ieee")
    return acc


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
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAST_K: tl.constexpr,
    OTHER_K: tl.constexpr,
    POOL_ROWS: tl.constexpr,
    KEEP_WEIGHTS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[n,i,j,o] = max over a, b in {-1, 0, 1} of relu(conv(x, weight) + bias)[n, 2i + a, 2j + b, o]

    Rounding, bias and ReLU keep the order, so they come after the maximum. BLOCK_Q columns of the convolution give
    BLOCK_Q / 2 - 1 pooled columns: of the first two only the right one is needed. FIRST_COLUMN is the place in a row,
    in elements, of the first vector of the first window. Grid: (column strips, row strips, blocks of C_OUT).
    """
    vector_slices: tl.constexpr = R * MAIN // BLOCK_K + (1 if LAST_K > 0 else 0)
    slices: tl.constexpr = vector_slices + (1 if OTHER_K > 0 else 0)
    lane = tl.arange(0, BLOCK_Q)
    first_pooled = tl.program_id(0) * (BLOCK_Q // 2 - 1) - 1
    image = (first_pooled + lane // 2) // POOL_Q
    q = (first_pooled + lane // 2) % POOL_Q * 2 + lane % 2
    start = q * COLUMN_STEP + FIRST_COLUMN
    x_columns = x_ptr + (image.to(tl.int64) * H * (ROW_VECTORS * VECTOR) + start)
    columns = tl.where(image < N, start, _OUTSIDE)
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
    limits = _row_limits(
        columns, H, ROW_VECTORS, R, HEAD, MAIN, TAIL, VECTOR, slices, vector_slices, BLOCK_K, LAST_K, OTHER_K
    )

    _wait_for_previous_kernel(USE_PDL)
    bias = _bias(bias_ptr, offs_n, mask_n).to(tl.float32)
    weights = _weight_tiles(weight_ptr, offs_n, C_OUT, R, HEAD, MAIN, TAIL, slices, BLOCK_N, BLOCK_K, LAST_K, OTHER_K)
    first = tl.maximum(2 * first_row - 1, 0)
    if KEEP_WEIGHTS:
        # A second use of the weights: those of a loop alone the compiler reads again in each of its rounds.
        window = _convolved_row(
            weights,
            limits,
            x_columns,
            first * STRIDE_H - PAD_H,
            ROW_VECTORS,
            R,
            HEAD,
            MAIN,
            TAIL,
            VECTOR,
            slices,
            vector_slices,
            BLOCK_N,
            BLOCK_Q,
            BLOCK_K,
            LAST_K,
            OTHER_K,
        )
        first += 1
    else:
        window = tl.full((BLOCK_N, BLOCK_Q), -float("inf"), dtype=tl.float32)
    for p in range(first, 2 * tl.minimum(first_row + POOL_ROWS, POOL_P)):
        acc = _convolved_row(
            weights,
            limits,
            x_columns,
            p * STRIDE_H - PAD_H,
            ROW_VECTORS,
            R,
            HEAD,
            MAIN,
            TAIL,
            VECTOR,
            slices,
            vector_slices,
            BLOCK_N,
            BLOCK_Q,
            BLOCK_K,
            LAST_K,
            OTHER_K,
        )
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
