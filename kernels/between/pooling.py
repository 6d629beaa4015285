"""Maxima and averages over windows of pixels: sliding, adaptive, or all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.configs.config import Config, KernelLaunch, Operand, launch_options, pixel_reason, uses_pdl
from kernels.configs.heuristic import rule
from kernels.configs.targets import Target
from kernels.problems import Problem, Shapes, conv_output_size, dtype_word
from kernels.rounding import ROUNDING_RMS, UNIT_ROUNDOFF, Rounding

# Elements in flight of one program, and taps from which on they are reduced in parallel.
_ELEMENTS = 2048
_MANY_TAPS = 64


@dataclass(frozen=True)
class PoolProblem:
    """Of x (N, C, H, W), channels_last, as torch's pools compute it: y (N, C, P, Q), channels_last.

    Attributes:
        kernel: taps of a window; the most of any, where it is adaptive.
        maximum: else an average.
        adaptive: window p is of rows floor(p * H / P) to ceil((p + 1) * H / P); there is no padding then.
        counts_padding: an average divides by all taps, else by those inside the image.
        divisor: by which a sum is divided instead; 0 is none.
    """

    batch: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    maximum: bool = False
    adaptive: bool = False
    counts_padding: bool = True
    divisor: int = 0
    dtype: torch.dtype = torch.float16

    operator: ClassVar[str] = "pool"
    relu: ClassVar[bool] = False
    parts: ClassVar[tuple[Problem, ...]] = ()

    def expected(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(y, its sigma as rounding explains it, y) in float64, of tensors with x."""
        x = tensors["x"].double()
        if self.maximum:
            y = F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self._rounds_up)
            return y, torch.zeros_like(y), y
        y, single = self._average(x), UNIT_ROUNDOFF[torch.float32]
        variance = (single**2 * max(1.0, self.taps / 2)) * self._average(x.square()) / self.taps
        variance = variance + (ROUNDING_RMS * single) ** 2 * (self.taps / 3 + 4) * y.square()
        return y, (variance + Rounding(UNIT_ROUNDOFF[self.dtype], dtype=torch.float64).of(y)).sqrt(), y

    def _average(self, x: Tensor) -> Tensor:
        if self.adaptive:
            return F.adaptive_avg_pool2d(x, (self.out_height, self.out_width))
        return F.avg_pool2d(
            x, self.kernel, self.stride, self.padding, self._rounds_up, self.counts_padding, self.divisor or None
        )

    @property
    def _rounds_up(self) -> bool:
        """Whether the last window may reach beyond the image and its padding."""
        geometry = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        sizes = zip((self.height, self.width), geometry, strict=True)
        return (self.out_height, self.out_width) != tuple(conv_output_size(size, *one) for size, one in sizes)

    @property
    def pixels(self) -> int:
        """Of the output, of all images."""
        return self.batch * self.out_height * self.out_width

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.out_height, self.out_width

    @property
    def flops(self) -> int:
        return self.pixels * self.channels * self.taps

    @property
    def activation_bytes(self) -> int:
        pixels = self.pixels + self.batch * self.height * self.width
        return pixels * self.channels * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return 0

    @property
    def loads_are_vectors(self) -> bool:
        """Never asked: nothing is copied asynchronously."""
        return False

    @property
    def key(self) -> str:
        kind = ("adaptive " if self.adaptive else "") + ("max" if self.maximum else "average")
        size = f"{self.channels}x{self.height}x{self.width} -> {self.out_height}x{self.out_width}"
        geometry = f"{self.kernel} s{self.stride} p{self.padding} d{self.dilation}"
        divided = "" if self.maximum else f" {self.counts_padding} {self.divisor}"
        return f"pool {kind} {dtype_word(self.dtype)} n{self.batch} {size} {geometry}{divided}"

    @property
    def shapes(self) -> Shapes:
        return {"x": (self.batch, self.channels, self.height, self.width)}

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def with_batch(self, batch: int) -> "PoolProblem":
        return replace(self, batch=batch)

    def with_dtype(self, dtype: torch.dtype) -> "PoolProblem":
        return replace(self, dtype=dtype)


@dataclass(frozen=True)
class PoolConfig(Config, kind="pool", runs=PoolProblem):
    """Output pixels, taps at a time and channels of a program; powers of two."""

    pixels: int
    taps: int
    channels: int
    num_warps: int = 4

    def problem_reason(self, problem: PoolProblem, target: Target | None) -> str | None:
        image = problem.height * problem.width * problem.channels
        return pixel_reason(max(problem.pixels, image), self.pixels)

    def shared_memory(self, problem: PoolProblem) -> int:
        return 4 * self.pixels * self.taps * self.channels

    def accumulators(self, problem: PoolProblem) -> int:
        return self.pixels * self.taps * self.channels // (32 * self.num_warps)

    def launches(self, problem: PoolProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        launch = KernelLaunch(
            kernel="pooling._pool_kernel",
            problem=problem,
            config=self,
            operands={"x_ptr": Operand(problem.dtype), "y_ptr": Operand(problem.dtype)},
            scalars={
                "M": problem.pixels,
                "H": problem.height,
                "W": problem.width,
                "P": problem.out_height,
                "Q": problem.out_width,
                "C": problem.channels,
                "R": problem.kernel[0],
                "S": problem.kernel[1],
                "STRIDE_H": problem.stride[0],
                "STRIDE_W": problem.stride[1],
                "PAD_H": problem.padding[0],
                "PAD_W": problem.padding[1],
                "DILATION_H": problem.dilation[0],
                "DILATION_W": problem.dilation[1],
                "MAXIMUM": problem.maximum,
                "ADAPTIVE": problem.adaptive,
                "COUNTS_PADDING": problem.counts_padding,
                "DIVISOR": problem.divisor,
                "BLOCK_M": self.pixels,
                "BLOCK_T": self.taps,
                "BLOCK_C": self.channels,
                "USE_PDL": uses_pdl(target),
            },
            grid=(-(-problem.pixels // self.pixels), -(-problem.channels // self.channels)),
            options=launch_options(self.num_warps, 2, target),
        )
        return (launch,)


@rule(PoolProblem)
def _pool_config(problem: PoolProblem, target: Target) -> PoolConfig:
    channels = min(64, 1 << (problem.channels - 1).bit_length())
    if problem.taps >= _MANY_TAPS:
        # Few windows: channels are divided as long as each program reads a sector of a pixel.
        while channels > 16 and problem.pixels * -(-problem.channels // channels) < target.multiprocessors:
            channels //= 2
        return PoolConfig(1, _ELEMENTS // channels, channels)
    return PoolConfig(min(64, _ELEMENTS // channels), 1, channels)
