"""Quantisation as ONNX defines it: `quantize_linear` and `dequantize_linear`, registered with torch.library.

They run on every device as plain torch: what makes a network fast with them is the runtime that fuses them away.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("resnet_deploy::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """q = clamp(round(x / scale) + zero_point), ties to even, in the range of the type of `zero_point`.

    Args:
        x: any shape, floating point.
        scale: scalar, positive.
        zero_point: scalar, int8 or uint8.
    """
    limits = torch.iinfo(zero_point.dtype)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    rounded = (wide / scale.to(wide.dtype)).round_().add_(zero_point.item())
    return rounded.clamp_(limits.min, limits.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("resnet_deploy::dequantize_linear", mutates_args=())
def dequantize_linear(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """x = (q - zero_point) * scale, in the type of `scale`.

    Args:
        q: int8, uint8 or, without a zero point, int32.
        scale: scalar, or [C] for the first axis of `q`.
        zero_point: like `scale`, in the type of `q`; None is 0.
    """
    shape = (-1, *[1] * (q.dim() - 1)) if scale.dim() else ()
    wide = scale if scale.dtype == torch.float64 else scale.float()
    whole = q.to(wide.dtype)
    if zero_point is not None:
        whole = whole - zero_point.to(wide.dtype).reshape(shape)
    return (whole * wide.reshape(shape)).to(scale.dtype)


@dequantize_linear.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)
