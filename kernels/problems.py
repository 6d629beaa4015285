"""What each operator is asked to compute, as a value: sizes in elements, (height, width) pairs, dtype, flags.

A problem is the one description that the launcher, the ahead-of-time compiler, the heuristic and the tuned tables
share. Its flops and bytes are the floor: each input read once, each output written once. The functions at the end
make a problem of an operator's arguments, of which they only read shapes and dtypes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def conv_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels along one axis: floor((size + 2*padding - dilation*(kernel - 1) - 1) / stride) + 1."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Projection:
    """A 1x1 convolution of another tensor that is added to a convolution's result."""

    c_in: int
    height: int
    width: int
    stride: tuple[int, int]


@dataclass(frozen=True)
class ConvProblem:
    """conv2d_bias_act, or with a projection conv2d_projection_bias_act."""

    batch: int
    c_in: int
    height: int
    width: int
    c_out: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float16
    has_residual: bool = False
    relu: bool = False
    projection: Projection | None = None

    @property
    def out_height(self) -> int:
        return conv_output_size(self.height, self.kernel[0], self.stride[0], self.padding[0], self.dilation[0])

    @property
    def out_width(self) -> int:
        return conv_output_size(self.width, self.kernel[1], self.stride[1], self.padding[1], self.dilation[1])

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.c_out, self.out_height, self.out_width

    @property
    def c_in_per_group(self) -> int:
        return self.c_in // self.groups

    @property
    def gemm_m(self) -> int:
        """M = N * P * Q."""
        return self.batch * self.out_height * self.out_width

    @property
    def gemm_n(self) -> int:
        """N = C_OUT / GROUPS."""
        return self.c_out // self.groups

    @property
    def gemm_k(self) -> int:
        """K = R * S * C_IN / GROUPS, the projection's channels apart."""
        return self.kernel[0] * self.kernel[1] * self.c_in_per_group

    @property
    def is_dense(self) -> bool:
        """Whether every operand is a matrix of pixels by channels as it lies: 1x1, stride 1, no padding."""
        dense = (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))
        return dense and (self.projection is None or self.projection.stride == (1, 1))

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolutions; the epilogue is not counted."""
        projected = self.projection.c_in if self.projection else 0
        return 2 * self.groups * self.gemm_m * self.gemm_n * (self.gemm_k + projected)

    @property
    def activation_bytes(self) -> int:
        """Every activation once; of an input only the rows and columns under some tap (a strided 1x1 skips others)."""
        rows = min(self.height, self.out_height * self.kernel[0])
        columns = min(self.width, self.out_width * self.kernel[1])
        inputs = rows * columns * self.c_in
        if self.projection:
            inputs += self.out_height * self.out_width * self.projection.c_in
        outputs = self.out_height * self.out_width * self.c_out * (2 if self.has_residual else 1)
        return self.batch * (inputs + outputs) * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        projected = self.projection.c_in if self.projection else 0
        return self.c_out * (self.gemm_k + projected + 1) * self.dtype.itemsize

    @property
    def loads_are_vectors(self) -> bool:
        """Whether each pixel's channels of one group divide into 16-byte loads."""
        return self.c_in_per_group * self.dtype.itemsize % 16 == 0


@dataclass(frozen=True)
class BottleneckProblem:
    """conv2d_conv1x1_bias_act: `first` with its ReLU, then a 1x1 convolution to c_out channels with the shortcut."""

    first: ConvProblem
    c_out: int
    has_residual: bool = False
    projection: Projection | None = None
    relu: bool = False

    @property
    def second(self) -> ConvProblem:
        """The 1x1 convolution on its own, as it runs where the two are not fused."""
        return ConvProblem(
            batch=self.first.batch,
            c_in=self.first.c_out,
            height=self.first.out_height,
            width=self.first.out_width,
            c_out=self.c_out,
            kernel=(1, 1),
            dtype=self.first.dtype,
            has_residual=self.has_residual,
            relu=self.relu,
            projection=self.projection,
        )

    @property
    def batch(self) -> int:
        return self.first.batch

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.second.out_shape

    @property
    def flops(self) -> int:
        return self.first.flops + self.second.flops

    @property
    def activation_bytes(self) -> int:
        """What lies between the two is neither written nor read."""
        between = self.first.gemm_m * self.first.c_out * self.dtype.itemsize
        return self.first.activation_bytes + self.second.activation_bytes - 2 * between

    @property
    def weight_bytes(self) -> int:
        return self.first.weight_bytes + self.second.weight_bytes

    @property
    def loads_are_vectors(self) -> bool:
        return self.first.loads_are_vectors and self.second.loads_are_vectors


@dataclass(frozen=True)
class StemProblem:
    """conv2d_bias_relu_maxpool: `conv` with its ReLU, then the 3x3 max-pool of stride 2 and padding 1."""

    conv: ConvProblem

    @property
    def batch(self) -> int:
        return self.conv.batch

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.dtype

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        n, c_out, height, width = self.conv.out_shape
        return n, c_out, conv_output_size(height, 3, 2, 1, 1), conv_output_size(width, 3, 2, 1, 1)

    @property
    def flops(self) -> int:
        return self.conv.flops

    @property
    def activation_bytes(self) -> int:
        n, c_out, height, width = self.out_shape
        _, _, conv_height, conv_width = self.conv.out_shape
        saved = n * c_out * (conv_height * conv_width - height * width) * self.dtype.itemsize
        return self.conv.activation_bytes - saved

    @property
    def weight_bytes(self) -> int:
        return self.conv.weight_bytes

    @property
    def loads_are_vectors(self) -> bool:
        return self.conv.loads_are_vectors


@dataclass(frozen=True)
class HeadProblem:
    """mean_linear."""

    batch: int
    c_in: int
    height: int
    width: int
    c_out: int
    dtype: torch.dtype = torch.float16

    @property
    def out_shape(self) -> tuple[int, int]:
        return self.batch, self.c_out

    @property
    def flops(self) -> int:
        """Of the fully connected layer; the mean is not counted."""
        return 2 * self.batch * self.c_in * self.c_out

    @property
    def activation_bytes(self) -> int:
        return self.batch * (self.c_in * self.height * self.width + self.c_out) * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.c_out * (self.c_in + 1) * self.dtype.itemsize

    @property
    def loads_are_vectors(self) -> bool:
        return self.c_in * self.dtype.itemsize % 16 == 0


Problem: TypeAlias = ConvProblem | BottleneckProblem | StemProblem | HeadProblem


def with_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem in another dtype."""
    if isinstance(problem, BottleneckProblem):
        return replace(problem, first=replace(problem.first, dtype=dtype))
    if isinstance(problem, StemProblem):
        return replace(problem, conv=replace(problem.conv, dtype=dtype))
    return replace(problem, dtype=dtype)


def with_batch(problem: Problem, batch: int) -> Problem:
    """The same problem for another number of images."""
    if isinstance(problem, BottleneckProblem):
        return replace(problem, first=replace(problem.first, batch=batch))
    if isinstance(problem, StemProblem):
        return replace(problem, conv=replace(problem.conv, batch=batch))
    return replace(problem, batch=batch)


def conv2d_bias_act_problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> ConvProblem:
    batch, c_in, height, width = x.shape
    return ConvProblem(
        batch=batch,
        c_in=c_in,
        height=height,
        width=width,
        c_out=weight.shape[0],
        kernel=(weight.shape[2], weight.shape[3]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        dtype=x.dtype,
        has_residual=residual is not None,
        relu=relu,
    )


def conv2d_projection_bias_act_problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shortcut_stride: Sequence[int],
    relu: bool,
) -> ConvProblem:
    conv = conv2d_bias_act_problem(x, weight, bias, None, stride, padding, dilation, 1, relu)
    return replace(conv, projection=_projection(shortcut, shortcut_stride))


def conv2d_conv1x1_bias_act_problem(
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
) -> BottleneckProblem:
    projected = shortcut is not None and shortcut_weight is not None
    return BottleneckProblem(
        first=conv2d_bias_act_problem(x, weight, bias, None, stride, padding, dilation, 1, True),
        c_out=expand_weight.shape[0],
        has_residual=shortcut is not None and not projected,
        projection=_projection(shortcut, shortcut_stride) if shortcut is not None and projected else None,
        relu=relu,
    )


def conv2d_bias_relu_maxpool_problem(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> StemProblem:
    return StemProblem(conv2d_bias_act_problem(x, weight, bias, None, stride, padding, (1, 1), 1, True))


def mean_linear_problem(x: Tensor, weight: Tensor, bias: Tensor) -> HeadProblem:
    batch, c_in, height, width = x.shape
    return HeadProblem(batch, c_in, height, width, weight.shape[0], x.dtype)


def _projection(shortcut: Tensor, stride: Sequence[int]) -> Projection:
    _, channels, height, width = shortcut.shape
    return Projection(channels, height, width, (stride[0], stride[1]))


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "conv2d_bias_act": conv2d_bias_act_problem,
    "conv2d_projection_bias_act": conv2d_projection_bias_act_problem,
    "conv2d_conv1x1_bias_act": conv2d_conv1x1_bias_act_problem,
    "conv2d_bias_relu_maxpool": conv2d_bias_relu_maxpool_problem,
    "mean_linear": mean_linear_problem,
}
