"""What each operator of ours is in standard ONNX operators: one function per operator.

Each takes what makes a node of an operator, by its name: of the exporter onnxscript's opset, else `onnx_writer.Nodes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx

from export.fusion.nodes import resnet_deploy
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.conv2d_bias_relu_maxpool import Conv2dBiasReluMaxpool
from kernels.operators.conv2d_conv1x1_bias_act import Conv2dConv1x1BiasAct
from kernels.operators.conv2d_projection_bias_act import Conv2dProjectionBiasAct
from kernels.operators.mean_linear import MeanLinear
from kernels.operators.registry import Arguments


def _conv2d_bias_act(op: Any, a: Conv2dBiasAct[Any]) -> Any:
    y = _conv(op, a.x, a.weight, a.bias, a.stride, a.padding, a.dilation, a.groups)
    if a.residual is not None:
        y = op.Add(y, a.residual)
    return _activated(op, y, a)


def _conv2d_projection_bias_act(op: Any, a: Conv2dProjectionBiasAct[Any]) -> Any:
    y = _conv(op, a.x, a.weight, a.bias, a.stride, a.padding, a.dilation)
    y = op.Add(y, _project(op, a.shortcut, a.shortcut_weight, a.shortcut_stride))
    return _activated(op, y, a)


def _conv2d_conv1x1_bias_act(op: Any, a: Conv2dConv1x1BiasAct[Any]) -> Any:
    h = op.Relu(_conv(op, a.x, a.weight, a.bias, a.stride, a.padding, a.dilation))
    y = op.Conv(h, a.expand_weight, a.expand_bias)
    if a.shortcut_weight is not None:
        y = op.Add(y, _project(op, a.shortcut, a.shortcut_weight, a.shortcut_stride))
    elif a.shortcut is not None:
        y = op.Add(y, a.shortcut)
    return op.Relu(y) if a.relu else y


def _conv2d_bias_relu_maxpool(op: Any, a: Conv2dBiasReluMaxpool[Any]) -> Any:
    h = op.Relu(_conv(op, a.x, a.weight, a.bias, a.stride, a.padding, (1, 1)))
    y, _indices = op.MaxPool(h, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return y


def _mean_linear(op: Any, a: MeanLinear[Any]) -> Any:
    pixels: Any = op.Constant(value_ints=[2, 3])
    mean = op.ReduceMean(a.x, pixels, keepdims=0)
    if (
        a.weight.dtype == onnx.TensorProto.FLOAT16
    ):  # tract refuses a bias in its Gemm; TensorRT's parser adds it apart anyway
        return op.Add(op.Gemm(mean, a.weight, transB=1), a.bias)
    return op.Gemm(mean, a.weight, a.bias, transB=1)


def _activated(op: Any, y: Any, a: Conv2dBiasAct[Any] | Conv2dProjectionBiasAct[Any]) -> Any:
    """The activation of y, in operators that every runtime fuses or knows."""

    def number(value: float) -> Any:
        from onnxscript import ir

        return op.Constant(value=ir.to_proto(ir.tensor(value, ir.DataType(a.weight.dtype))))

    match "relu" if a.relu else a.activation:
        case "":
            return y
        case "relu":
            return op.Relu(y)
        case "relu6":
            return op.Clip(y, number(0.0), number(6.0))
        case "leaky_relu":
            return op.LeakyRelu(y, alpha=a.negative_slope)
        case "prelu":
            rows: Any = op.Constant(value_ints=[1, 2])
            slope: Any = a.slope
            return op.PRelu(y, op.Unsqueeze(slope, rows))
        case "sigmoid":
            return op.Sigmoid(y)
        case "silu":
            return op.Mul(y, op.Sigmoid(y))
        case "hardsigmoid":
            return op.HardSigmoid(y, alpha=1 / 6, beta=0.5)
        case "hardswish":
            return op.Mul(y, op.HardSigmoid(y, alpha=1 / 6, beta=0.5))  # TensorRT reads no HardSwish of bfloat16
        case "gelu":
            half = op.Mul(y, number(0.5))
            return op.Mul(half, op.Add(op.Erf(op.Mul(y, number(math.sqrt(0.5)))), number(1.0)))
        case "gelu_tanh":
            cubic = op.Mul(op.Mul(y, y), number(0.044715))
            inner = op.Mul(op.Mul(y, number(2 * math.sqrt(2 / math.pi))), op.Add(cubic, number(1.0)))
            return op.Mul(y, op.Sigmoid(inner))
    raise ValueError(f"no lowering of the activation {a.activation!r}")


def _conv(op, x, weight, bias, stride, padding, dilation, groups=1):  # type: ignore[no-untyped-def]
    return op.Conv(x, weight, bias, strides=[*stride], pads=[*padding, *padding], dilations=[*dilation], group=groups)


def _project(op, shortcut, weight, stride):  # type: ignore[no-untyped-def]
    return op.Conv(shortcut, weight, strides=[*stride])


def _quantize_linear(op, x, scale, zero_point):  # type: ignore[no-untyped-def]
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize_linear(op, q, scale, zero_point):  # type: ignore[no-untyped-def]
    return op.DequantizeLinear(q, scale, zero_point, axis=0)


LOWERINGS: dict[type[Arguments[Any]], Callable[[Any, Any], Any]] = {
    Conv2dBiasAct: _conv2d_bias_act,
    Conv2dBiasReluMaxpool: _conv2d_bias_relu_maxpool,
    Conv2dProjectionBiasAct: _conv2d_projection_bias_act,
    Conv2dConv1x1BiasAct: _conv2d_conv1x1_bias_act,
    MeanLinear: _mean_linear,
}
QUANTISED_LOWERINGS: dict[Any, Callable[..., Any]] = {
    resnet_deploy.quantize_linear.default: _quantize_linear,
    resnet_deploy.dequantize_linear.default: _dequantize_linear,
}
