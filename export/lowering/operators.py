"""What each fused operator is in standard ONNX operators: one function per operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnxscript import opset18 as op

import kernels  # noqa: F401  registers the operators


def _conv2d_bias_act(x, weight, bias, residual, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    y = op.Conv(x, weight, bias, strides=[*stride], pads=[*padding, *padding], dilations=[*dilation], group=groups)
    if residual is not None:
        y = op.Add(y, residual)
    return op.Relu(y) if relu else y


TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.resnet_deploy.conv2d_bias_act.default: _conv2d_bias_act,
}
