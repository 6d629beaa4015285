"""The operator `resnet_deploy::conv2d_bias_relu_maxpool`: the stem of an ImageNet ResNet.

y = max_pool2d(relu(conv2d(x, weight) + bias), kernel 3, stride 2, padding 1)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.conv2d_bias_act import conv2d_bias_act_reference
from kernels.operators.registration import register


def conv2d_bias_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Convolution, bias, ReLU and a 3x3 max-pool of stride 2 and padding 1, rounded once.

        y = max_pool2d(relu(conv2d(x, weight) + bias), 3, 2, 1)

    For inference only, like `conv2d_bias_act`.

    Args:
        x: (N, C_IN, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (C_OUT, C_IN, R, S), channels_last, dtype of x.
        bias: (C_OUT,), contiguous, dtype of x.
        stride, padding: of the convolution, (height, width) in pixels.

    Returns:
        (N, C_OUT, (P - 1) // 2 + 1, (Q - 1) // 2 + 1), channels_last, dtype of x, where the convolution has P x Q
        pixels; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """
    y: Tensor = torch.ops.resnet_deploy.conv2d_bias_relu_maxpool(x, weight, bias, stride, padding)
    return y


def conv2d_bias_relu_maxpool_reference(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """`conv2d_bias_relu_maxpool` in plain torch: the CPU path, and in float64 the oracle."""
    h = conv2d_bias_act_reference(x, weight, bias, None, stride, padding, (1, 1), 1, True)
    return F.max_pool2d(h, 3, 2, 1).contiguous(memory_format=torch.channels_last)


register(
    "conv2d_bias_relu_maxpool",
    "Tensor x, Tensor weight, Tensor bias, int[2] stride, int[2] padding",
    conv2d_bias_relu_maxpool_reference,
)
