"""The operator `resnet_deploy::conv2d_bias_act`: its schema, fake, reference and dispatch.

    y = act(conv2d(x, weight) + bias + residual)

The Triton kernel is in implicit_gemm.py, its launcher in launch.py; Triton is imported when the operator first runs
on a GPU and not before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_conv2d_arguments
from kernels.config import KERNEL_DTYPES

# The reference also serves as the oracle, hence float64.
REFERENCE_DTYPES = (*KERNEL_DTYPES, torch.float64)


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """Convolution with bias, optional residual and optional ReLU, rounded once.

        y = act(conv2d(x, weight) + bias + residual)

    An operator for inference: it has no derivative, and `backward` through it raises. A batch of 0 gives an empty
    output. Autocast and the default dtype have no influence.

    Args:
        x: (N, C_IN, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (C_OUT, C_IN / groups, R, S), channels_last, dtype of x.
        bias: (C_OUT,), contiguous, dtype of x.
        residual: (N, C_OUT, P, Q), channels_last, dtype of x; added before the activation.
        stride, padding, dilation: (height, width) in pixels.
        groups: both channel counts are multiples of it.
        relu: act(v) = max(v, 0), NaN stays NaN; otherwise act(v) = v.

    Returns:
        (N, C_OUT, P, Q), channels_last, dtype of x; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """
    y: Tensor = torch.ops.resnet_deploy.conv2d_bias_act(
        x, weight, bias, residual, stride, padding, dilation, groups, relu
    )
    return y


def conv2d_bias_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """`conv2d_bias_act` in plain torch: the CPU path, and in float64 the oracle.

    Arguments, result and roundings are the operator's: float16 and bfloat16 are computed in float32 and rounded
    once at the end. Any layout is accepted, channels_last is fast.
    """
    compute = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(
            x.to(compute), weight.to(compute), bias.to(compute), tuple(stride), tuple(padding), tuple(dilation), groups
        )
        if residual is not None:
            y = y.add_(residual)
        if relu:
            y = y.relu_()
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op(
    "resnet_deploy::conv2d_bias_act",
    mutates_args=(),
    device_types="cpu",
    schema=(
        "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation,"
        " int groups, bool relu) -> Tensor"
    ),
    # A compiler must hand over the layouts it traced: the operator refuses any but channels_last.
    tags=(torch.Tag.needs_exact_strides,),
)
def _conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    check_conv2d_arguments(x, weight, bias, residual, stride, padding, dilation, groups, REFERENCE_DTYPES)
    return conv2d_bias_act_reference(
        x, weight, bias, residual, stride=stride, padding=padding, dilation=dilation, groups=groups, relu=relu
    )


@_conv2d_bias_act.register_kernel("cuda")
def _conv2d_bias_act_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    try:
        from kernels import launch
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        raise ModuleNotFoundError(
            "conv2d_bias_act on a GPU needs the package triton: pip install 'triton>=3.6'", name="triton"
        ) from error
    return launch.conv2d_bias_act_triton(
        x, weight, bias, residual, stride=stride, padding=padding, dilation=dilation, groups=groups, relu=relu
    )


@_conv2d_bias_act.register_fake
def _conv2d_bias_act_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    dtypes = KERNEL_DTYPES if x.device.type == "cuda" else REFERENCE_DTYPES
    shape = check_conv2d_arguments(x, weight, bias, residual, stride, padding, dilation, groups, dtypes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
