"""Fused operators for convolutional networks: for each its definition, its Triton kernel and its launcher.

Importing this package registers the operators. It imports neither Triton nor touches a device: `kernels.launch`
(launching by hand) and `kernels.compile` (ahead-of-time compilation) need Triton and are imported by name.
"""

from kernels.config import (
    TARGETS,
    ConvConfig,
    ConvProblem,
    Target,
    select_config,
    unsupported_reason,
)
from kernels.conv2d_bias_act import conv2d_bias_act, conv2d_bias_act_reference

__all__ = [
    "TARGETS",
    "ConvConfig",
    "ConvProblem",
    "Target",
    "conv2d_bias_act",
    "conv2d_bias_act_reference",
    "select_config",
    "unsupported_reason",
]
