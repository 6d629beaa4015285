"""The operator `resnet_deploy::conv2d_conv1x1_bias_act`: the last two convolutions of a bottleneck, back to back.

h = relu(conv2d(x, weight) + bias)
y = act(conv2d(h, expand_weight) + s + expand_bias),    s = shortcut or its 1x1 projection
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.operators.conv2d_bias_act import conv2d_bias_act_reference
from kernels.operators.conv2d_projection_bias_act import conv2d_projection_bias_act_reference
from kernels.operators.registration import register


def conv2d_conv1x1_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    shortcut: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    shortcut_stride: tuple[int, int] = (1, 1),
    relu: bool = False,
) -> Tensor:
    """A convolution with ReLU, then a 1x1 convolution with shortcut; what lies between need not reach memory.

        h = relu(conv2d(x, weight) + bias), rounded to the dtype of x
        y = act(conv2d(h, expand_weight) + s + expand_bias)

    with s = 0, the shortcut, or conv2d(shortcut, shortcut_weight). For inference only, like `conv2d_bias_act`.

    Args:
        x: (N, C_IN, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (C_MID, C_IN, R, S), channels_last, dtype of x.
        bias: (C_MID,), contiguous, dtype of x.
        expand_weight: (C_OUT, C_MID, 1, 1), channels_last, dtype of x.
        expand_bias: (C_OUT,), contiguous, dtype of x; includes the projection's bias.
        shortcut: without shortcut_weight (N, C_OUT, P, Q), with it (N, C_S, H_S, W_S); channels_last, dtype of x.
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
    y: Tensor = torch.ops.resnet_deploy.conv2d_conv1x1_bias_act(
        x,
        weight,
        bias,
        expand_weight,
        expand_bias,
        shortcut,
        shortcut_weight,
        stride,
        padding,
        dilation,
        shortcut_stride,
        relu,
    )
    return y


def conv2d_conv1x1_bias_act_reference(
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
) -> Tensor:
    """`conv2d_conv1x1_bias_act` in plain torch: the CPU path, and in float64 the oracle."""
    h = conv2d_bias_act_reference(x, weight, bias, None, stride, padding, dilation, 1, True)
    one, none = (1, 1), (0, 0)
    if shortcut is None or shortcut_weight is None:
        return conv2d_bias_act_reference(h, expand_weight, expand_bias, shortcut, one, none, one, 1, relu)
    return conv2d_projection_bias_act_reference(
        h, expand_weight, expand_bias, shortcut, shortcut_weight, one, none, one, shortcut_stride, relu
    )


register(
    "conv2d_conv1x1_bias_act",
    "Tensor x, Tensor weight, Tensor bias, Tensor expand_weight, Tensor expand_bias, Tensor? shortcut,"
    " Tensor? shortcut_weight, int[2] stride, int[2] padding, int[2] dilation, int[2] shortcut_stride, bool relu",
    conv2d_conv1x1_bias_act_reference,
)
