"""Which arguments the operators accept. The same checks run for real and for fake tensors.

Nothing here looks at the size of the batch unless it has to, so that exporting with a dynamic batch stays dynamic.
"""

from collections.abc import Callable, Mapping, Sequence

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


def check_conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    *,
    dtypes: Sequence[torch.dtype],
) -> tuple[int, ...]:
    """Check the arguments of `conv2d_bias_act`; return the shape of its output.

    Raises:
        ValueError: naming the argument, what was received and what is expected.
    """
    shape = _check_convolution("", x, weight, stride, padding, dilation, groups)
    _check_vector("bias", bias, shape[1])
    _check_shortcut(residual, None, (1, 1), shape, "residual")
    _check_tensors(x, {"weight": weight, "bias": bias, "residual": residual}, dtypes)
    return shape


def check_conv2d_projection_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shortcut_stride: Sequence[int],
    relu: bool,
    *,
    dtypes: Sequence[torch.dtype],
) -> tuple[int, ...]:
    """Check the arguments of `conv2d_projection_bias_act`; return the shape of its output. Raises as above."""
    shape = _check_convolution("", x, weight, stride, padding, dilation)
    _check_vector("bias", bias, shape[1])
    _check_shortcut(shortcut, shortcut_weight, shortcut_stride, shape)
    tensors = {"weight": weight, "bias": bias, "shortcut": shortcut, "shortcut_weight": shortcut_weight}
    _check_tensors(x, tensors, dtypes)
    return shape


def check_conv2d_conv1x1_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    shortcut: Tensor | None,
    shortcut_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shortcut_stride: Sequence[int],
    relu: bool,
    *,
    dtypes: Sequence[torch.dtype],
) -> tuple[int, ...]:
    """Check the arguments of `conv2d_conv1x1_bias_act`; return the shape of its output. Raises as above."""
    n, c_mid, height, width = _check_convolution("", x, weight, stride, padding, dilation)
    _check_vector("bias", bias, c_mid)
    _check_pointwise("expand_weight", expand_weight, c_mid)
    shape = (n, expand_weight.shape[0], height, width)
    _check_vector("expand_bias", expand_bias, shape[1])
    if shortcut_weight is not None and shortcut is None:
        raise ValueError("shortcut is None, expected the tensor that shortcut_weight projects")
    _check_shortcut(shortcut, shortcut_weight, shortcut_stride, shape)
    tensors = {"weight": weight, "bias": bias, "expand_weight": expand_weight, "expand_bias": expand_bias}
    _check_tensors(x, {**tensors, "shortcut": shortcut, "shortcut_weight": shortcut_weight}, dtypes)
    return shape


def check_conv2d_bias_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    dtypes: Sequence[torch.dtype],
) -> tuple[int, ...]:
    """Check the arguments of `conv2d_bias_relu_maxpool`; return the shape of its output. Raises as above."""
    n, c_out, height, width = _check_convolution("", x, weight, stride, padding, (1, 1))
    _check_vector("bias", bias, c_out)
    _check_tensors(x, {"weight": weight, "bias": bias}, dtypes)
    return n, c_out, conv_output_size(height, 3, 2, 1, 1), conv_output_size(width, 3, 2, 1, 1)


def check_mean_linear(x: Tensor, weight: Tensor, bias: Tensor, *, dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
    """Check the arguments of `mean_linear`; return the shape of its output. Raises as above."""
    _check_dimensions("x", x, 4)
    _check_dimensions("weight", weight, 2)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} channels, expected weight's {weight.shape[1]} columns")
    if min(weight.shape) < 1 or min(x.shape[2:]) < 1:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected no empty dimension")
    _check_vector("bias", bias, weight.shape[0])
    _check_tensors(x, {"weight": weight, "bias": bias}, dtypes)
    return x.shape[0], weight.shape[0]


def _check_dimensions(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has {tensor.ndim} dimensions {tuple(tensor.shape)}, expected {ndim}")


def _check_vector(name: str, tensor: Tensor, length: int) -> None:
    _check_dimensions(name, tensor, 1)
    if tensor.shape[0] != length:
        raise ValueError(f"{name} has {tensor.shape[0]} elements, expected {length} (weight's output channels)")


def _check_pointwise(name: str, weight: Tensor, c_in: int) -> None:
    _check_dimensions(name, weight, 4)
    if tuple(weight.shape[1:]) != (c_in, 1, 1) or weight.shape[0] < 1:
        raise ValueError(f"{name} is {tuple(weight.shape)}, expected (C_OUT, {c_in}, 1, 1)")


def _check_shortcut(
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
        projected = _check_convolution(f"{name}_", shortcut, weight, stride, (0, 0), (1, 1))
        _check_pointwise(f"{name}_weight", weight, shortcut.shape[1])
    if projected != shape:
        what = name if weight is None else f"the projected {name}"
        raise ValueError(f"{what} is {projected}, expected the output's shape {shape}")


def _check_convolution(
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
    _check_dimensions(name, x, 4)
    _check_dimensions(weight_name, weight, 4)
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


def _check_tensors(x: Tensor, others: Mapping[str, Tensor | None], dtypes: Sequence[torch.dtype]) -> None:
    """One dtype, one device, channels_last (4-d) or contiguous throughout."""
    if x.dtype not in dtypes:
        raise ValueError(f"x is {x.dtype}, expected one of {', '.join(map(str, dtypes))} on {x.device}")
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
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


CHECKS: dict[str, Callable[..., tuple[int, ...]]] = {
    "conv2d_bias_act": check_conv2d_bias_act,
    "conv2d_projection_bias_act": check_conv2d_projection_bias_act,
    "conv2d_conv1x1_bias_act": check_conv2d_conv1x1_bias_act,
    "conv2d_bias_relu_maxpool": check_conv2d_bias_relu_maxpool,
    "mean_linear": check_mean_linear,
}
