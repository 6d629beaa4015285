"""The operator `resnet_deploy::conv2d_bias_act`.

y = act(conv2d(x, weight) + bias + residual)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.registration import accumulation_dtype, register


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
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """`conv2d_bias_act` in plain torch: the CPU path, and in float64 the oracle.

    Arguments, result and roundings are the operator's: float16 and bfloat16 are computed in float32 and rounded
    once at the end. Any layout is accepted, channels_last is fast.
    """
    compute = accumulation_dtype(x)
    if groups > 1:
        # torch 2.13 on a CPU computes a grouped 1xS or Rx1 kernel wrongly if its axis of one element has a stride
        # other than the usual one, which is_contiguous does not tell: a clone has usual strides.
        weight = weight.clone(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(
            x.to(compute), weight.to(compute), bias.to(compute), tuple(stride), tuple(padding), tuple(dilation), groups
        )
        if residual is not None:
            y = y.add_(residual)
        if relu:
            y = y.relu_()
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


register(
    "conv2d_bias_act",
    "Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation,"
    " int groups, bool relu",
    conv2d_bias_act_reference,
)
