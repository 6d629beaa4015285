"""What the operators' checks share. The same checks run for real and for fake tensors.

Nothing here looks at the size of the batch unless it has to, so that exporting with a dynamic batch stays dynamic.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.problems import conv_output_size


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


def check_dimensions(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has {tensor.ndim} dimensions {tuple(tensor.shape)}, expected {ndim}")


def check_vector(name: str, tensor: Tensor, length: int) -> None:
    check_dimensions(name, tensor, 1)
    if tensor.shape[0] != length:
        raise ValueError(f"{name} has {tensor.shape[0]} elements, expected {length} (weight's output channels)")


def check_pointwise(name: str, weight: Tensor, c_in: int) -> None:
    check_dimensions(name, weight, 4)
    if tuple(weight.shape[1:]) != (c_in, 1, 1) or weight.shape[0] < 1:
        raise ValueError(f"{name} is {tuple(weight.shape)}, expected (C_OUT, {c_in}, 1, 1)")


def check_shortcut(
    shortcut: Tensor | None,
    weight: Tensor | None,
    stride: Sequence[int],
    shape: tuple[int, ...],
    name: str = "shortcut",
) -> None:
    """The shortcut itself, or what its 1x1 projection makes of it, has the output's shape."""
    if shortcut is None:
        return
    projected = tuple(shortcut.shape)
    if weight is not None:
        projected = check_convolution(f"{name}_", shortcut, weight, stride, (0, 0), (1, 1))
        check_pointwise(f"{name}_weight", weight, shortcut.shape[1])
    if projected != shape:
        what = name if weight is None else f"the projected {name}"
        raise ValueError(f"{what} is {projected}, expected the output's shape {shape}")


def check_convolution(
    prefix: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> tuple[int, int, int, int]:
    """Shapes and geometry of one convolution; `prefix` tells its arguments from another's. Its output's shape."""
    name, weight_name = prefix.rstrip("_") or "x", f"{prefix}weight"
    for kind, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{prefix}{kind} is {tuple(pair)}, expected two integers of at least {least}")
    if groups < 1:
        raise ValueError(f"groups is {groups}, expected at least 1")
    check_dimensions(name, x, 4)
    check_dimensions(weight_name, weight, 4)
    c_out, c_in_per_group, *kernel = weight.shape
    if min(weight.shape) < 1:
        raise ValueError(f"{weight_name} is {tuple(weight.shape)}, expected no empty dimension")
    if x.shape[1] != c_in_per_group * groups:
        raise ValueError(
            f"{name} has {x.shape[1]} channels, expected {c_in_per_group * groups}"
            f" ({weight_name}'s {c_in_per_group} times {groups} groups)"
        )
    if c_out % groups != 0:
        raise ValueError(f"{weight_name} has {c_out} output channels, expected a multiple of {groups} groups")
    height, width = (
        conv_output_size(x.shape[axis + 2], kernel[axis], stride[axis], padding[axis], dilation[axis])
        for axis in (0, 1)
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"{name} of {tuple(x.shape[2:])} pixels gives an output of {(height, width)}, expected at least (1, 1)"
            f" with kernel {tuple(kernel)}, padding {tuple(padding)} and dilation {tuple(dilation)}"
        )
    return x.shape[0], c_out, height, width


def check_tensors(tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """One dtype, one device, channels_last (4-d) or contiguous throughout; `x` is among them."""
    x = tensors["x"]
    if x.dtype not in dtypes:
        raise ValueError(f"x is {x.dtype}, expected one of {', '.join(map(str, dtypes))} on {x.device}")
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {x.dtype} like x")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device} like x")
        if tensor.ndim == 4 and not is_channels_last(tensor):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}, expected channels_last:"
                f" call .contiguous(memory_format=torch.channels_last) once, ahead of the operator"
            )
        if tensor.ndim < 4 and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
