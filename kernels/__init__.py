"""Fused operators for convolutional networks: for each its definition, its Triton kernel and its launcher.

Importing this package registers the operators. It imports neither Triton nor touches a device: `kernels.launch`
(launching by hand) and `kernels.compile` (ahead-of-time compilation) need Triton and are imported by name.
"""

from kernels.configs.config import unsupported_reason
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.conv2d_bias_act import conv2d_bias_act, conv2d_bias_act_reference
from kernels.operators.conv2d_bias_relu_maxpool import conv2d_bias_relu_maxpool, conv2d_bias_relu_maxpool_reference
from kernels.operators.conv2d_conv1x1_bias_act import conv2d_conv1x1_bias_act, conv2d_conv1x1_bias_act_reference
from kernels.operators.conv2d_projection_bias_act import (
    conv2d_projection_bias_act,
    conv2d_projection_bias_act_reference,
)
from kernels.operators.mean_linear import mean_linear, mean_linear_reference

__all__ = [
    "TARGETS",
    "Target",
    "conv2d_bias_act",
    "conv2d_bias_act_reference",
    "conv2d_bias_relu_maxpool",
    "conv2d_bias_relu_maxpool_reference",
    "conv2d_conv1x1_bias_act",
    "conv2d_conv1x1_bias_act_reference",
    "conv2d_projection_bias_act",
    "conv2d_projection_bias_act_reference",
    "mean_linear",
    "mean_linear_reference",
    "select_config",
    "unsupported_reason",
]
