"""Pooling in standard ONNX operators that every runtime reads alike.

Of a window that begins behind the input, in its padding, PyTorch and ONNX Runtime say that it is none, TensorRT-RTX
1.7.1 and OpenVINO 2026.4 that it is one. And an average over a window that reaches beyond the padding is divided by all
of it, by what lies within the padding or by what lies within the input. So `ceil_mode` is never written: the padding
behind the input is what PyTorch's windows reach, and an average counts it or not for all pixels alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from export.base.errors import ExportError
from export.fusion.nodes import aten, pair


# The exporter looks the names up: they are those of ATen's schema.
def max_pool2d(op, self, kernel_size, stride=(), padding=(0, 0), dilation=(1, 1), ceil_mode=False):  # type: ignore[no-untyped-def]
    kernel, steps, before, dilations = _geometry(kernel_size, stride, padding, dilation)
    behind = _behind(self, kernel, steps, before, dilations) if ceil_mode else before
    pads = [*before, *behind]
    y, _indices = op.MaxPool(self, ceil_mode=False, dilations=dilations, kernel_shape=kernel, pads=pads, strides=steps)
    return y


def _avg_pool2d(  # type: ignore[no-untyped-def]
    op, self, kernel_size, stride=(), padding=(0, 0), ceil_mode=False, count_include_pad=True, divisor_override=None
):
    kernel, steps, before, _ = _geometry(kernel_size, stride, padding, (1, 1))
    behind = _behind(self, kernel, steps, before, [1, 1]) if ceil_mode else before
    x, beyond = self, [end - begin for begin, end in zip(before, behind, strict=True)]
    if count_include_pad and divisor_override is None and max(beyond) > 0:
        # What lies in the padding is counted, what lies behind it is not: the padding becomes part of the input.
        pads: Any = op.Constant(value_ints=[0, 0, *before, 0, 0, *before])
        x = op.Pad(self, pads)
        before, behind, count_include_pad = [0, 0], [max(0, n) for n in beyond], False
    y = op.AveragePool(
        x,
        ceil_mode=False,
        count_include_pad=bool(count_include_pad or divisor_override is not None),
        kernel_shape=kernel,
        pads=[*before, *behind],
        strides=steps,
    )
    if divisor_override is None:
        return y
    factor: Any = op.Constant(value_float=prod(kernel) / divisor_override)
    return op.Mul(y, op.CastLike(factor, y))


def _adaptive_max_pool2d(op, self, output_size):  # type: ignore[no-untyped-def]
    """Of equal windows, which PyTorch before 2.11 does not write. Of the indices no reader is left."""
    sizes = [(int(length), int(size)) for length, size in zip(self.shape[2:], pair(output_size), strict=True)]
    if all(size == 1 for _, size in sizes):
        axes: Any = op.Constant(value_ints=[2, 3])
        y = op.ReduceMax(self, axes)
        return y, y
    if any(length % size for length, size in sizes):
        given = " x ".join(str(length) for length, _ in sizes)
        expected = " x ".join(str(size) for _, size in sizes)
        raise ExportError(f"adaptive_max_pool2d of {given} to {expected}: expected sizes that divide it, as in ONNX")
    kernel = [length // size for length, size in sizes]
    y, _indices = op.MaxPool(self, kernel_shape=kernel, strides=kernel)
    return y, y


def _geometry(*values: Sequence[int]) -> list[list[int]]:
    """Kernel, stride, padding and dilation as (height, width); without a stride it is the kernel."""
    kernel, stride, *others = values
    return [[*pair(each)] for each in (kernel, stride or kernel, *others)]


def _behind(
    x: Any, kernel: Sequence[int], stride: Sequence[int], before: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The padding behind an input [N, C, H, W] that the windows of PyTorch's `ceil_mode` need, or the given one."""
    found = []
    for length, size, step, pad, spread in zip(x.shape[2:], kernel, stride, before, dilation, strict=True):
        reach = spread * (size - 1) + 1
        windows = -(-(int(length) + 2 * pad - reach) // step) + 1
        if (windows - 1) * step >= int(length) + pad:
            windows -= 1  # the last would begin in the padding
        found.append(max(pad, (windows - 1) * step + reach - int(length) - pad))
    return found


POOLS: dict[Callable, Callable] = {
    aten.max_pool2d.default: max_pool2d,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
}
