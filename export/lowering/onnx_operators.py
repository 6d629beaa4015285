"""What each fused operator is in standard ONNX operators: one function per operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import opset18 as op
from onnxscript import opset19

from export.fusion.nodes import resnet_deploy


def _conv2d_bias_act(x, weight, bias, residual, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    y = _conv(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = op.Add(y, residual)
    return op.Relu(y) if relu else y


def _conv2d_projection_bias_act(  # type: ignore[no-untyped-def]
    x, weight, bias, shortcut, shortcut_weight, stride, padding, dilation, shortcut_stride, relu
):
    y = _conv(x, weight, bias, stride, padding, dilation)
    y = op.Add(y, _project(shortcut, shortcut_weight, shortcut_stride))
    return op.Relu(y) if relu else y


def _conv2d_conv1x1_bias_act(  # type: ignore[no-untyped-def]
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
):
    h = op.Relu(_conv(x, weight, bias, stride, padding, dilation))
    y = op.Conv(h, expand_weight, expand_bias)
    if shortcut_weight is not None:
        y = op.Add(y, _project(shortcut, shortcut_weight, shortcut_stride))
    elif shortcut is not None:
        y = op.Add(y, shortcut)
    return op.Relu(y) if relu else y


def _conv2d_bias_relu_maxpool(x, weight, bias, stride, padding):  # type: ignore[no-untyped-def]
    h = op.Relu(_conv(x, weight, bias, stride, padding, (1, 1)))
    y, _indices = op.MaxPool(h, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return y


def _mean_linear(x, weight, bias):  # type: ignore[no-untyped-def]
    pixels: Any = op.Constant(value_ints=[2, 3])
    return op.Gemm(op.ReduceMean(x, pixels, keepdims=0), weight, bias, transB=1)


def _conv(x, weight, bias, stride, padding, dilation, groups=1):  # type: ignore[no-untyped-def]
    return op.Conv(x, weight, bias, strides=[*stride], pads=[*padding, *padding], dilations=[*dilation], group=groups)


def _project(shortcut, weight, stride):  # type: ignore[no-untyped-def]
    return op.Conv(shortcut, weight, strides=[*stride])


def _quantize_linear(x, scale, zero_point):  # type: ignore[no-untyped-def]
    return opset19.QuantizeLinear(x, scale, zero_point)


def _dequantize_linear(q, scale, zero_point):  # type: ignore[no-untyped-def]
    return opset19.DequantizeLinear(q, scale, zero_point, axis=0)


TRANSLATIONS: dict[Callable, Callable] = {
    resnet_deploy.conv2d_bias_act.default: _conv2d_bias_act,
    resnet_deploy.conv2d_bias_relu_maxpool.default: _conv2d_bias_relu_maxpool,
    resnet_deploy.conv2d_projection_bias_act.default: _conv2d_projection_bias_act,
    resnet_deploy.conv2d_conv1x1_bias_act.default: _conv2d_conv1x1_bias_act,
    resnet_deploy.mean_linear.default: _mean_linear,
    resnet_deploy.quantize_linear.default: _quantize_linear,
    resnet_deploy.dequantize_linear.default: _dequantize_linear,
}
