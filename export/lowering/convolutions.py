"""Convolutions on the CPU where results are compared: rounded as on a GPU, and as fast as the processor can."""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.fusion.nodes import aten
from export.runtime.onnx_session import open_session

_TILE = 2**17  # values of the windows that are laid out together: 1 MB, which lies in the processor's caches
_NAMES = ("a", "b", "bias", "y")  # of the values of a matrix product
_ROWS = 256  # at least, of a matrix product: it lays out its weights anew each time


class WideConvolutions(TorchDispatchMode):
    """While it is on, convolutions of 16 bits on the CPU accumulate in float32 and round once, as on a GPU.

    PyTorch has a fast float16 convolution on few CPUs, and adds up the overlapping windows of a transposed one in the
    type itself. Those of float32 are oneDNN's: on one thread PyTorch would leave 1x1 kernels to another library. Those
    of float64 are matrix products of ONNX Runtime, where it is installed. Both use AVX-512 on the processors of all
    makers, which PyTorch's own library for products does not, and take half as long.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not aten.convolution.default or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        if x.dtype in (torch.float16, torch.bfloat16):
            wide = (None if given is None else given.float() for given in (x, weight, bias))
            return self.__torch_dispatch__(func, types, (*wide, *args[3:])).to(x.dtype)
        if transposed or groups > 1 or x.dim() != 4 or not x.numel():
            return func(*args)
        if x.dtype == torch.float64 and importlib.util.find_spec("onnxruntime"):
            return _products(x, weight, bias, stride, padding, dilation)
        if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            layout = _layout(x, weight)
            x, weight = (value.contiguous(memory_format=layout) for value in (x, weight))
            bias = None if bias is None else bias.contiguous()
            return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
        return func(*args)


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """A convolution [N, C, H, W] of float64, as products of its windows and its weights, in the layout it came in."""
    layout = _layout(x, weight)
    x = x.contiguous(memory_format=layout)
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    images, (outputs, channels, *kernel), length = len(x), weight.shape, weight[0].numel()
    height, width = ((x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    y = torch.empty((images, outputs, height, width), dtype=x.dtype, memory_format=layout)
    bias = x.new_zeros(outputs) if bias is None else bias.contiguous()
    image, channel, row, pixel = x.stride()
    steps = (image, channel, row * dilation[0], pixel * dilation[1], row * stride[0], pixel * stride[1])
    windows = x.as_strided((images, channels, *kernel, height, width), steps)  # they overlap
    rows, last = max(1, max(_TILE // length, _ROWS) // width), layout is torch.channels_last
    if kernel == [1, 1] and (last or rows < height):  # one matrix as it is
        rows = images * height if last else height
    filters, several = (weight.permute(0, 2, 3, 1) if last else weight).reshape(outputs, length), max(1, rows // height)
    for first, top in itertools.product(range(0, images, several), range(0, height, rows)):
        some = slice(first, first + several)
        tile, result = windows[some, ..., top : top + rows, :], y[some, :, top : top + rows]
        if last:
            laid_out = tile.permute(0, 4, 5, 2, 3, 1).reshape(-1, length)
            _multiply(laid_out, filters, bias, result.permute(0, 2, 3, 1).view(-1, outputs), transposed=True)
        else:
            laid_out = tile.permute(1, 2, 3, 0, 4, 5).reshape(length, -1)
            there = result.transpose(0, 1)
            product = there if there.is_contiguous() else torch.empty(there.shape, dtype=x.dtype)
            _multiply(filters, laid_out, bias[:, None], product.view(outputs, -1), transposed=False)
            if product is not there:
                there.copy_(product)
    return y


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """As PyTorch has it: channels_last where one of the two is."""
    last = any(
        value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous() for value in (x, weight)
    )
    return torch.channels_last if last else torch.contiguous_format


def _multiply(a: Tensor, b: Tensor, bias: Tensor, y: Tensor, transposed: bool) -> None:
    """y = a @ b + bias, or a @ b.T + bias, into a contiguous y."""
    a, b = a.contiguous(), b.contiguous()  # windows of one pixel are reshaped without a copy
    session = _session(torch.get_num_threads(), transposed)
    binding = session.io_binding()
    for name, value in zip(_NAMES, (a, b, bias), strict=False):
        binding.bind_input(name, "cpu", 0, np.float64, tuple(value.shape), value.data_ptr())
    binding.bind_output(_NAMES[-1], "cpu", 0, np.float64, tuple(y.shape), y.data_ptr())
    session.run_with_iobinding(binding)


@cache
def _session(threads: int, transposed: bool) -> Any:
    """Of a file that computes what `_multiply` does."""
    a, b, bias, y = (helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in _NAMES)
    product = helper.make_node("Gemm", _NAMES[:3], _NAMES[3:], transB=int(transposed))
    graph = helper.make_graph([product], "product", [a, b, bias], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return open_session(model.SerializeToString(), threads, lasts=False)
