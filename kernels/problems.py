"""What an operator is asked to compute, as a value: sizes in elements, (height, width) pairs, dtype, flags.

A problem is the one description that the launcher, the ahead-of-time compiler, the rules and the tuned tables share.
Its flops and bytes are the floor: each input read once, each output written once. Here are the convolution, which
several operators ask for, and what every kind of problem knows; the other kinds lie beside their operators.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Shapes = dict[str, tuple[int, ...]]


class Problem(Protocol):
    """What every kind of problem knows."""

    @property
    def operator(self) -> str:
        """The name of the operator that computes it."""

    @property
    def batch(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def relu(self) -> bool:
        """Whether the operator's last step keeps positive values only; a maximum over such values does."""

    @property
    def out_shape(self) -> tuple[int, ...]: ...

    @property
    def flops(self) -> int: ...

    @property
    def activation_bytes(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def loads_are_vectors(self) -> bool:
        """Whether each pixel's channels of one group divide into 16-byte loads."""

    @property
    def key(self) -> str:
        """The problem in one readable line, such as `conv fp16 n8 64x56x56 -> 256 1x1 residual relu`."""

    @property
    def parts(self) -> "tuple[Problem, ...]":
        """The problems that it can be run as, one after the other; none where that is only as one."""

    @property
    def shapes(self) -> Shapes:
        """Of the operator's tensors that are given, by argument."""

    @property
    def settings(self) -> dict[str, Any]:
        """The operator's other arguments."""

    def __hash__(self) -> int: ...

    def with_batch(self, batch: int) -> "Problem":
        """The same for another number of images."""

    def with_dtype(self, dtype: torch.dtype) -> "Problem":
        """The same in another dtype."""


def conv_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels along one axis: floor((size + 2*padding - dilation*(kernel - 1) - 1) / stride) + 1."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def dtype_word(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))


def shortcut_words(has_residual: bool, projection: "Projection | None", relu: bool) -> str:
    """What the end of a key says of the shortcut and the ReLU."""
    words = " residual" if has_residual else ""
    if projection is not None:
        words += f" projection {projection.c_in}x{projection.height}x{projection.width} s{_pair(projection.stride)}"
    return words + (" relu" if relu else "")


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}x{values[1]}"


@dataclass(frozen=True)
class Projection:
    """A 1x1 convolution of another tensor that is added to a convolution's result."""

    c_in: int
    height: int
    width: int
    stride: tuple[int, int]

    @classmethod
    def of(cls, shortcut: Tensor, stride: tuple[int, int]) -> "Projection":
        _, channels, height, width = shortcut.shape
        return cls(channels, height, width, stride)

    def shapes(self, batch: int, c_out: int) -> Shapes:
        return {
            "shortcut": (batch, self.c_in, self.height, self.width),
            "shortcut_weight": (c_out, self.c_in, 1, 1),
        }


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
    activation: str = ""
    negative_slope: float = 0.01

    @property
    def operator(self) -> str:
        return "conv2d_projection_bias_act" if self.projection else "conv2d_bias_act"

    @property
    def convolution(self) -> "ConvProblem":
        """The convolution of x, as every problem that has one calls it."""
        return self

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

    @property
    def key(self) -> str:
        words = f"conv {self.words}{shortcut_words(self.has_residual, self.projection, self.relu)}"
        slope = f" {self.negative_slope:g}" if self.activation == "leaky_relu" else ""
        return f"{words} {self.activation}{slope}" if self.activation else words

    @property
    def words(self) -> str:
        """Type, sizes and geometry."""
        size = f"{self.c_in}x{self.height}x{self.width}"
        words = [dtype_word(self.dtype), f"n{self.batch}", size, f"-> {self.c_out}", _pair(self.kernel)]
        if self.stride != (1, 1):
            words.append(f"s{_pair(self.stride)}")
        if self.padding != (0, 0):
            words.append(f"p{_pair(self.padding)}")
        if self.dilation != (1, 1):
            words.append(f"d{_pair(self.dilation)}")
        if self.groups > 1:
            words.append(f"g{self.groups}")
        return " ".join(words)

    @property
    def parts(self) -> tuple[Problem, ...]:
        return ()

    @property
    def shapes(self) -> Shapes:
        shapes: Shapes = {
            "x": (self.batch, self.c_in, self.height, self.width),
            "weight": (self.c_out, self.c_in_per_group, *self.kernel),
            "bias": (self.c_out,),
        }
        if self.has_residual:
            shapes["residual"] = self.out_shape
        if self.activation == "prelu":
            shapes["slope"] = (self.c_out,)
        return {**shapes, **(self.projection.shapes(self.batch, self.c_out) if self.projection else {})}

    @property
    def settings(self) -> dict[str, Any]:
        settings = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "relu": self.relu}
        if self.activation:
            settings |= {"activation": self.activation, "negative_slope": self.negative_slope}
        if self.projection:
            return {**settings, "shortcut_stride": self.projection.stride}
        return {**settings, "groups": self.groups}

    def with_batch(self, batch: int) -> "ConvProblem":
        return replace(self, batch=batch)

    def with_dtype(self, dtype: torch.dtype) -> "ConvProblem":
        return replace(self, dtype=dtype)
