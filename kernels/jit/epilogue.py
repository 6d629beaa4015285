"""What follows the products: bias, residual, activation, and the store."""

# mypy: allow-untyped-defs
# What a kernel is called with is given types by Triton, one compilation at a time.

import triton
import triton.language as tl


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
