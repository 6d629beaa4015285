"""Which arguments a convolution operator accepts. The same checks run for real and for fake tensors.

Nothing here looks at the size of the batch unless it has to, so that exporting with a dynamic batch stays dynamic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.config import conv_output_size


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4-d tensor is dense N,H,W,C in memory, as `is_contiguous(memory_format=torch.channels_last)`.

    Strides are compared before sizes: the batch has no stride under it and is looked at only if its own stride
    differs, where torch's function asks about every size and thereby fixes a dynamic batch.
    """
    expected = 1
    for axis in (1, 3, 2, 0):
        if tensor.stride(axis) != expected and tensor.shape[axis] != 1:
            return False
        expected = expected * tensor.shape[axis]
    return True


def check_conv2d_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtypes: Sequence[torch.dtype],
) -> tuple[int, int, int, int]:
    """Check the arguments of a convolution with bias and optional residual; return the shape of its output.

    Raises:
        ValueError: naming the argument, what was received and what is expected.
    """
    _check_hyperparameters(stride, padding, dilation, groups)
    for name, tensor, ndim in (("x", x, 4), ("weight", weight, 4), ("bias", bias, 1)):
        if tensor.ndim != ndim:
            raise ValueError(f"{name} has {tensor.ndim} dimensions {tuple(tensor.shape)}, expected {ndim}")
    shape = _output_shape(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, expected the output's shape {shape}")
    _check_tensors(x, weight, bias, residual, dtypes)
    return shape


def _check_hyperparameters(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> None:
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} is {tuple(pair)}, expected two integers of at least {least}")
    if groups < 1:
        raise ValueError(f"groups is {groups}, expected at least 1")


def _output_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    c_out, c_in_per_group, *kernel = weight.shape
    if min(weight.shape) < 1:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected no empty dimension")
    if x.shape[1] != c_in_per_group * groups:
        raise ValueError(
            f"x has {x.shape[1]} channels, expected {c_in_per_group * groups}"
            f" (weight's {c_in_per_group} times {groups} groups)"
        )
    if c_out % groups != 0:
        raise ValueError(f"weight has {c_out} output channels, expected a multiple of {groups} groups")
    if bias.shape[0] != c_out:
        raise ValueError(f"bias has {bias.shape[0]} elements, expected {c_out} (weight's output channels)")
    height, width = (
        conv_output_size(x.shape[axis + 2], kernel[axis], stride[axis], padding[axis], dilation[axis])
        for axis in (0, 1)
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"x of {tuple(x.shape[2:])} pixels gives an output of {(height, width)}, expected at least (1, 1)"
            f" with kernel {tuple(kernel)}, padding {tuple(padding)} and dilation {tuple(dilation)}"
        )
    return x.shape[0], c_out, height, width


def _check_tensors(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, dtypes: Sequence[torch.dtype]
) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"x is {x.dtype}, expected one of {', '.join(map(str, dtypes))} on {x.device}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {x.dtype} like x")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device} like x")
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is not None and not is_channels_last(tensor):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}, expected channels_last:"
                f" call .contiguous(memory_format=torch.channels_last) once, ahead of the operator"
            )
    if not bias.is_contiguous():
        raise ValueError(f"bias has stride {bias.stride()}, expected (1,)")
