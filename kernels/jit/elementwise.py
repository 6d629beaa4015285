"""Element by element: sums, products, gates, activations, and copies into another layout or type."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kernels.jit.epilogue import _activated, _relu
from kernels.jit.parts import _let_next_kernel_start, _wait_for_previous_kernel


@triton.jit
def _offsets(i0, i1, i2, i3, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr, AT: tl.constexpr):
    """int64 offsets of the elements at (i0, i1, i2, i3) of a tensor with these strides that begins at AT."""
    return i0.to(tl.int64) * S0 + (i1 * S1 + i2 * S2 + i3 * S3 + AT)


@triton.jit(do_not_specialize=["COUNT"])
def _elementwise_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    y_ptr,
    COUNT,
    MULTIPLE: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    D3: tl.constexpr,
    A0: tl.constexpr,
    A1: tl.constexpr,
    A2: tl.constexpr,
    A3: tl.constexpr,
    A_AT: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
    B_AT: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    C_AT: tl.constexpr,
    Y0: tl.constexpr,
    Y1: tl.constexpr,
    Y2: tl.constexpr,
    Y3: tl.constexpr,
    Y_AT: tl.constexpr,
    OP: tl.constexpr,
    NUMBER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y = act(op(a, b) + c) of COUNT * MULTIPLE elements, numbered along axes of which the last have D1, D2 and D3.

    With OP "normalise" it is (a / 255 - b) / c, of bytes. Computed in float32, rounded once by the cast on the store.
    Without b_ptr, b is NUMBER; without c_ptr, c is 0. A stride is 0 along axes over which an operand is the same.
    Grid: (blocks of elements).
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < COUNT * MULTIPLE
    i3 = offs % D3
    i2 = offs // D3 % D2
    i1 = offs // (D3 * D2) % D1
    i0 = offs // (D3 * D2 * D1)
    _wait_for_previous_kernel(USE_PDL)
    value = tl.load(a_ptr + _offsets(i0, i1, i2, i3, A0, A1, A2, A3, A_AT), mask=mask, other=0.0).to(tl.float32)
    if b_ptr is not None:
        b = tl.load(b_ptr + _offsets(i0, i1, i2, i3, B0, B1, B2, B3, B_AT), mask=mask, other=0.0).to(tl.float32)
    else:
        b = NUMBER
    if OP == "add":
        value = value + b
    elif OP == "subtract":
        value = value - b
    elif OP == "multiply":
        value = value * b
    elif OP == "divide":
        value = value / b
    elif OP == "normalise":
        c = tl.load(c_ptr + _offsets(i0, i1, i2, i3, C0, C1, C2, C3, C_AT), mask=mask, other=1.0)
        value = tl.div_rn(tl.div_rn(value, 255.0) - b, c)
    elif OP == "prelu":
        value = tl.where(value > 0, value, value * b)
    else:
        tl.static_assert(OP == "copy")
    if c_ptr is not None and OP != "normalise":
        value += tl.load(c_ptr + _offsets(i0, i1, i2, i3, C0, C1, C2, C3, C_AT), mask=mask, other=0.0).to(tl.float32)
    _let_next_kernel_start(USE_PDL)
    if ACTIVATION == "relu":
        value = _relu(value)
    elif ACTIVATION != "":
        value = _activated(value, None, None, None, ACTIVATION, NEGATIVE_SLOPE)
    y_pointers = y_ptr + _offsets(i0, i1, i2, i3, Y0, Y1, Y2, Y3, Y_AT)
    tl.store(y_pointers, value.to(y_ptr.dtype.element_ty), mask=mask)
