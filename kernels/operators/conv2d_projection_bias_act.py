"""The operator `resnet_deploy::conv2d_projection_bias_act`: a block's last convolution with its projected shortcut.

y = act(conv2d(x, weight) + conv2d(shortcut, shortcut_weight) + bias)
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.activations import Activation
from kernels.operators.checks import check_convolution, check_shortcut, check_tensors, check_vector
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.registry import Arguments, T, accumulation_dtype, register
from kernels.problems import ConvProblem, Projection
from kernels.rounding import Bound, Rounding


@dataclass(frozen=True, eq=False)
class Conv2dProjectionBiasAct(Arguments[T]):
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
        relu: act(v) = max(v, 0), NaN stays NaN.
        activation: another act, one of `activations.ACTIVATIONS`; with neither act(v) = v.
        negative_slope: of the activation leaky_relu.
        slope: (C_OUT,), contiguous, dtype of x; of the activation prelu.

    Returns:
        (N, C_OUT, P, Q), channels_last, dtype of x; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """

    operator = "conv2d_projection_bias_act"

    x: T
    weight: T
    bias: T
    shortcut: T
    shortcut_weight: T
    _: KW_ONLY
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    shortcut_stride: tuple[int, int] = (1, 1)
    relu: bool = False
    activation: str = ""
    negative_slope: float = 0.01
    slope: T | None = None

    def act(self: "Conv2dProjectionBiasAct[Tensor]") -> Activation:
        return Activation(self.activation, self.negative_slope, self.slope)

    def check(self: "Conv2dProjectionBiasAct[Tensor]", dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
        shape = check_convolution("", self.x, self.weight, self.stride, self.padding, self.dilation)
        check_vector("bias", self.bias, shape[1])
        check_shortcut(self.shortcut, self.shortcut_weight, self.shortcut_stride, shape)
        self.act().check(self.relu, shape[1])
        check_tensors(self.tensors(), dtypes)
        return shape

    def problem(self: "Conv2dProjectionBiasAct[Tensor]") -> ConvProblem:
        conv = Conv2dBiasAct(
            self.x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=self.relu,
            activation=self.activation,
            negative_slope=self.negative_slope,
            slope=self.slope,
        )
        return replace(conv.problem(), projection=Projection.of(self.shortcut, self.shortcut_stride))

    def reference(self: "Conv2dProjectionBiasAct[Tensor]") -> Tensor:
        compute, geometry = accumulation_dtype(self.x), (self.stride, self.padding, self.dilation)
        with torch.autocast(self.x.device.type, enabled=False):
            y = F.conv2d(self.x.to(compute), self.weight.to(compute), self.bias.to(compute), *geometry)
            projection = (self.shortcut.to(compute), self.shortcut_weight.to(compute))
            y = y.add_(F.conv2d(*projection, None, self.shortcut_stride))
            y = y.relu_() if self.relu else self.act()(y)
            return y.to(self.x.dtype).contiguous(memory_format=torch.channels_last)

    def before_activation(self: "Conv2dProjectionBiasAct[Tensor]") -> Tensor:
        return replace(self, relu=False, activation="", slope=None).reference()

    def activated(self: "Conv2dProjectionBiasAct[Tensor]", value: Tensor) -> Tensor:
        return value.relu() if self.relu else self.act()(value)

    def bound(self: "Conv2dProjectionBiasAct[Tensor]", pre: Tensor, rounding: Rounding) -> Bound:
        products = F.conv2d(self.x.square(), self.weight.square(), None, self.stride, self.padding, self.dilation)
        shortcut = (self.shortcut, self.shortcut_weight, self.shortcut_stride)
        variance = rounding.convolution(pre, products, self.bias, self.weight[0].numel(), *shortcut)
        return self.act().bound(variance, pre, rounding)


conv2d_projection_bias_act = register(Conv2dProjectionBiasAct[Tensor])
