"""The operator `resnet_deploy::mean_linear`: the head of a ResNet.

y = mean(x, pixels) @ weight.T + bias
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.registration import accumulation_dtype, register


def mean_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Global average pooling and a fully connected layer.

        y = m @ weight.T + bias,    m = mean of x over height and width, rounded to the dtype of x

    For inference only, like `conv2d_bias_act`.

    Args:
        x: (N, C, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (CLASSES, C), contiguous, dtype of x.
        bias: (CLASSES,), contiguous, dtype of x.

    Returns:
        (N, CLASSES), contiguous, dtype of x; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """
    y: Tensor = torch.ops.resnet_deploy.mean_linear(x, weight, bias)
    return y


def mean_linear_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`mean_linear` in plain torch: the CPU path, and in float64 the oracle."""
    compute = accumulation_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        mean = x.to(compute).mean((2, 3)).to(x.dtype)
        return F.linear(mean.to(compute), weight.to(compute), bias.to(compute)).to(x.dtype)


register("mean_linear", "Tensor x, Tensor weight, Tensor bias", mean_linear_reference)
