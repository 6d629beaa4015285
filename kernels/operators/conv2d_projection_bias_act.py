"""The operator `resnet_deploy::conv2d_projection_bias_act`: a block's last convolution with its projected shortcut.

y = act(conv2d(x, weight) + conv2d(shortcut, shortcut_weight) + bias)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.registration import accumulation_dtype, register


def conv2d_projection_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    shortcut_stride: tuple[int, int] = (1, 1),
    relu: bool = False,
) -> Tensor:
    """The sum of a convolution and the 1x1 projection of another tensor, rounded once.

        y = act(conv2d(x, weight) + conv2d(shortcut, shortcut_weight) + bias)

    The projection is a second range of the same reduction, so it is neither rounded nor stored on its own. For
    inference only, like `conv2d_bias_act`.

    Args:
        x: (N, C_IN, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (C_OUT, C_IN, R, S), channels_last, dtype of x.
        bias: (C_OUT,), contiguous, dtype of x: the sum of both convolutions' biases.
        shortcut: (N, C_S, H_S, W_S), channels_last, dtype of x.
        shortcut_weight: (C_OUT, C_S, 1, 1), channels_last, dtype of x.
        stride, padding, dilation: of the first convolution, (height, width) in pixels.
        shortcut_stride: of the projection, (height, width) in pixels.
        relu: act(v) = max(v, 0), NaN stays NaN; otherwise act(v) = v.

    Returns:
        (N, C_OUT, P, Q), channels_last, dtype of x; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """
    y: Tensor = torch.ops.resnet_deploy.conv2d_projection_bias_act(
        x, weight, bias, shortcut, shortcut_weight, stride, padding, dilation, shortcut_stride, relu
    )
    return y


def conv2d_projection_bias_act_reference(
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
) -> Tensor:
    """`conv2d_projection_bias_act` in plain torch: the CPU path, and in float64 the oracle."""
    compute = accumulation_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(
            x.to(compute), weight.to(compute), bias.to(compute), tuple(stride), tuple(padding), tuple(dilation)
        )
        y = y.add_(F.conv2d(shortcut.to(compute), shortcut_weight.to(compute), None, tuple(shortcut_stride)))
        if relu:
            y = y.relu_()
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


register(
    "conv2d_projection_bias_act",
    "Tensor x, Tensor weight, Tensor bias, Tensor shortcut, Tensor shortcut_weight, int[2] stride, int[2] padding,"
    " int[2] dilation, int[2] shortcut_stride, bool relu",
    conv2d_projection_bias_act_reference,
)
