"""The operator `resnet_deploy::conv2d_bias_act`.

y = act(conv2d(x, weight) + bias + residual)
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.activations import Activation
from kernels.operators.checks import check_convolution, check_shortcut, check_tensors, check_vector
from kernels.operators.registry import Arguments, T, accumulation_dtype, register
from kernels.problems import ConvProblem
from kernels.rounding import Bound, Rounding


@dataclass(frozen=True, eq=False)
class Conv2dBiasAct(Arguments[T]):
    """Convolution with bias, optional residual and optional activation, rounded once.

        y = act(conv2d(x, weight) + bias + residual)

    An operator for inference: it has no derivative, and `backward` through it raises. A batch of 0 gives an empty
    output. Autocast and the default dtype have no influence.

    Args:
        x: (N, C_IN, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (C_OUT, C_IN / groups, R, S), channels_last, dtype of x.
        bias: (C_OUT,), contiguous, dtype of x.
        residual: (N, C_OUT, P, Q), channels_last, dtype of x; added before the activation.
        stride, padding, dilation: (height, width) in pixels.
        groups: both channel counts are multiples of it.
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

    operator = "conv2d_bias_act"

    x: T
    weight: T
    bias: T
    residual: T | None = None
    _: KW_ONLY
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    relu: bool = False
    activation: str = ""
    negative_slope: float = 0.01
    slope: T | None = None

    def act(self: "Conv2dBiasAct[Tensor]") -> Activation:
        return Activation(self.activation, self.negative_slope, self.slope)

    def check(self: "Conv2dBiasAct[Tensor]", dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
        shape = check_convolution("", self.x, self.weight, self.stride, self.padding, self.dilation, self.groups)
        check_vector("bias", self.bias, shape[1])
        check_shortcut(self.residual, None, (1, 1), shape, "residual")
        self.act().check(self.relu, shape[1])
        check_tensors(self.tensors(), dtypes)
        return shape

    def problem(self: "Conv2dBiasAct[Tensor]") -> ConvProblem:
        batch, c_in, height, width = self.x.shape
        c_out, _, *kernel = self.weight.shape
        return ConvProblem(
            batch=batch,
            c_in=c_in,
            height=height,
            width=width,
            c_out=c_out,
            kernel=(kernel[0], kernel[1]),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            dtype=self.x.dtype,
            has_residual=self.residual is not None,
            relu=self.relu,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def reference(self: "Conv2dBiasAct[Tensor]") -> Tensor:
        """float16 and bfloat16 are computed in float32 and rounded once at the end. Any layout is accepted."""
        compute, weight = accumulation_dtype(self.x), self.weight
        if self.groups > 1:
            # torch 2.13 on a CPU computes a grouped 1xS or Rx1 kernel wrongly if its axis of one element has a stride
            # other than the usual one, which is_contiguous does not tell: a clone has usual strides.
            weight = weight.clone(memory_format=torch.channels_last)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        with torch.autocast(self.x.device.type, enabled=False):
            y = F.conv2d(self.x.to(compute), weight.to(compute), self.bias.to(compute), *geometry)
            if self.residual is not None:
                y = y.add_(self.residual)
            y = y.relu_() if self.relu else self.act()(y)
            return y.to(self.x.dtype).contiguous(memory_format=torch.channels_last)

    def before_activation(self: "Conv2dBiasAct[Tensor]") -> Tensor:
        return replace(self, relu=False, activation="", slope=None).reference()

    def activated(self: "Conv2dBiasAct[Tensor]", value: Tensor) -> Tensor:
        return value.relu() if self.relu else self.act()(value)

    def bound(self: "Conv2dBiasAct[Tensor]", pre: Tensor, rounding: Rounding) -> Bound:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        products = F.conv2d(self.x.square(), self.weight.square(), None, *geometry)
        variance = rounding.convolution(pre, products, self.bias, self.weight[0].numel(), self.residual)
        return self.act().bound(variance, pre, rounding)


conv2d_bias_act = register(Conv2dBiasAct[Tensor])
