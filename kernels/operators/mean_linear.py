"""The operator `resnet_deploy::mean_linear`: the head of a ResNet.

y = mean(x, pixels) @ weight.T + bias
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.configs.config import MIN_BLOCK, Config, KernelLaunch, Operand, launch_options, partial_sum_bytes, uses_pdl
from kernels.configs.heuristic import rule
from kernels.configs.targets import Target
from kernels.operators.checks import check_dimensions, check_tensors, check_vector
from kernels.operators.registry import Arguments, T, accumulation_dtype, register
from kernels.problems import Problem, Shapes, dtype_word
from kernels.rounding import UNIT_ROUNDOFF, Bound, Rounding, bound_of, mean_variance

# Pixels of all its images together whose channels a program adds up in one step: more in flight, more registers.
_PIXELS_PER_STEP = 64
# Images of one program: the rows of a tensor core's instruction.
_MOST_IMAGES = 16
# Blocks of classes of one program: its sum of the partial sums is as long.
_MOST_STEPS = 16


@dataclass(frozen=True, eq=False)
class MeanLinear(Arguments[T]):
    """Global average pooling and a fully connected layer.

        y = m @ weight.T + bias,    m = mean of x over height and width, rounded to the dtype of x

    For inference only, like `conv2d_bias_act`.

    Args:
        x: (N, C, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (CLASSES, C), contiguous, dtype of x.
        bias: (CLASSES,), contiguous, dtype of x.

    Returns:
        (N, CLASSES), contiguous, dtype of x; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """

    operator = "mean_linear"

    x: T
    weight: T
    bias: T

    def check(self: "MeanLinear[Tensor]", dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
        x, weight = self.x, self.weight
        check_dimensions("x", x, 4)
        check_dimensions("weight", weight, 2)
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"x has {x.shape[1]} channels, expected weight's {weight.shape[1]} columns")
        if min(weight.shape) < 1 or min(x.shape[2:]) < 1:
            raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected no empty dimension")
        check_vector("bias", self.bias, weight.shape[0])
        check_tensors(self.tensors(), dtypes)
        return x.shape[0], weight.shape[0]

    def problem(self: "MeanLinear[Tensor]") -> "HeadProblem":
        batch, c_in, height, width = self.x.shape
        return HeadProblem(batch, c_in, height, width, self.weight.shape[0], self.x.dtype)

    def reference(self: "MeanLinear[Tensor]") -> Tensor:
        compute = accumulation_dtype(self.x)
        with torch.autocast(self.x.device.type, enabled=False):
            mean = self.x.to(compute).mean((2, 3)).to(self.x.dtype)
            return F.linear(mean.to(compute), self.weight.to(compute), self.bias.to(compute)).to(self.x.dtype)

    def before_activation(self: "MeanLinear[Tensor]") -> Tensor:
        return self.reference()

    def bound(self: "MeanLinear[Tensor]", pre: Tensor, rounding: Rounding) -> Bound:
        mean, squared_weight = self.x.mean((2, 3)), self.weight.square()
        carried = mean_variance(self.x, [2, 3]) + rounding.of(mean)
        variance = rounding.sum(
            pre, F.linear(mean.square(), squared_weight), self.bias.square(), squared_weight.shape[1]
        )
        if rounding.separate_addition and rounding.roundoff == UNIT_ROUNDOFF[torch.float16]:
            variance = variance + rounding.of(pre - self.bias)
        return bound_of(variance + F.linear(carried, squared_weight) + rounding.of(pre), pre)

    def shared(self: "MeanLinear[Tensor]", pull: Tensor, rounding: Rounding) -> Tensor:
        carried = mean_variance(self.x, [2, 3]) + rounding.of(self.x.mean((2, 3)))
        return ((pull @ self.weight).square() * carried).sum()


mean_linear = register(MeanLinear[Tensor])


@dataclass(frozen=True)
class HeadProblem:
    """mean_linear."""

    batch: int
    c_in: int
    height: int
    width: int
    c_out: int
    dtype: torch.dtype = torch.float16

    operator: ClassVar[str] = "mean_linear"
    relu: ClassVar[bool] = False
    parts: ClassVar[tuple[Problem, ...]] = ()

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

    @property
    def key(self) -> str:
        size = f"{self.c_in}x{self.height}x{self.width}"
        return f"head {dtype_word(self.dtype)} n{self.batch} {size} -> {self.c_out}"

    @property
    def shapes(self) -> Shapes:
        x = (self.batch, self.c_in, self.height, self.width)
        return {"x": x, "weight": (self.c_out, self.c_in), "bias": (self.c_out,)}

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def with_batch(self, batch: int) -> "HeadProblem":
        return replace(self, batch=batch)

    def with_dtype(self, dtype: torch.dtype) -> "HeadProblem":
        return replace(self, dtype=dtype)


@dataclass(frozen=True)
class HeadConfig(Config, kind="head", runs=HeadProblem):
    """One way to launch a HeadProblem.

    Attributes:
        images: of one program, of which there need not be as many as a tile has rows.
        block_n: classes of one step.
        block_k: channels of one program.
        shares: programs that share the classes of the same images and channels: each reads those again.
    """

    images: int
    block_n: int
    block_k: int
    num_warps: int
    shares: int = 1

    def problem_reason(self, problem: HeadProblem, target: Target | None) -> str | None:
        blocks = -(-problem.c_out // self.block_n)
        if self.images < 1 or self.images & (self.images - 1):
            return f"images is {self.images}, expected a power of two"
        if not 1 <= self.shares <= blocks:
            return f"shares is {self.shares}, expected 1 to the {blocks} blocks of classes"
        return None

    def shared_memory(self, problem: HeadProblem) -> int:
        rows, size = max(self.images, MIN_BLOCK), problem.dtype.itemsize
        weights = self._stages(problem) * self.block_k * self.block_n * size
        # The sums over pixels change layout, then the means are an operand and the tile changes layout.
        means = 4 * max(self.images, _PIXELS_PER_STEP) * self.block_k
        partials = partial_sum_bytes(self.images * self.block_n, -(-problem.c_in // self.block_k))
        return max(weights + max(means, rows * self.block_k * size + 4 * rows * self.block_n), partials)

    def accumulators(self, problem: HeadProblem) -> int:
        return max(self.images, MIN_BLOCK) * self.block_n // (32 * self.num_warps)

    def changes(self, problem: HeadProblem) -> Iterator[Config]:
        yield from super().changes(problem)
        yield from self._resized(problem, "images", self.images * 2, self.images // 2)
        yield from self._resized(problem, "shares", self.shares * 2, self.shares // 2)

    def _steps(self, problem: HeadProblem) -> int:
        blocks_n = -(-problem.c_out // self.block_n)
        return -(-blocks_n // self.shares)

    def _stages(self, problem: HeadProblem) -> int:
        return min(3, self._steps(problem))

    def launches(self, problem: HeadProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        tensor = Operand(problem.dtype)
        blocks_m = -(-problem.batch // self.images)
        splits = -(-problem.c_in // self.block_k)
        steps = self._steps(problem)
        shares = -(-problem.c_out // (steps * self.block_n))
        launch = KernelLaunch(
            kernel="head._mean_linear_kernel",
            problem=problem,
            config=self,
            operands={
                "x_ptr": tensor,
                "weight_ptr": tensor,
                "bias_ptr": tensor,
                "partials_ptr": Operand(torch.float32),
                "counters_ptr": Operand(torch.int32),
                "y_ptr": tensor,
            },
            scalars={
                "N": problem.batch,
                "PIXELS": problem.height * problem.width,
                "C_IN": problem.c_in,
                "C_OUT": problem.c_out,
                "BLOCK_M": self.images,
                "BLOCK_N": self.block_n,
                "BLOCK_K": self.block_k,
                "BLOCK_P": max(1, _PIXELS_PER_STEP // self.images),
                "N_BLOCKS": steps,
                "SHARES": shares,
                "SPLIT_K": splits,
                "USE_PDL": uses_pdl(target),
            },
            grid=(blocks_m * splits * shares,),
            options=launch_options(self.num_warps, self._stages(problem), target),
            tiles=blocks_m * shares,
            partials=blocks_m * shares * steps * splits * self.images * self.block_n,
        )
        return (launch,)


@rule(HeadProblem)
def _head_config(problem: HeadProblem, target: Target) -> HeadConfig:
    half = problem.dtype != torch.float32
    images = min(_MOST_IMAGES, _power_of_two(problem.batch))
    blocks_m = -(-problem.batch // images)
    # 16 splits, in float32 32: each still has weights enough, and there are few partial sums.
    block_k = min(128 if half else 64, max(32, _power_of_two(-(-problem.c_in // 16))))
    block_k = min(block_k, max(MIN_BLOCK, _power_of_two(problem.c_in)))
    # Where there is room for all programs at once, the weights of each are under way in registers before its means are
    # known, and its features are read again by every share: little beside the weights. Else step by step through
    # shared memory, and the more images there are, the fewer shares read them.
    block_n = min(256, max(MIN_BLOCK, _power_of_two(problem.c_out)))
    shares = -(-problem.c_out // block_n)
    in_registers = blocks_m == 1 or blocks_m * shares * -(-problem.c_in // block_k) <= target.multiprocessors
    if not (half and in_registers):
        block_n = min(64, block_n)
        blocks_n = -(-problem.c_out // block_n)
        most = 4 if blocks_m == 1 else 2 if blocks_m <= 8 else 1
        shares = min(blocks_n, max(most, -(-blocks_n // _MOST_STEPS)))
    num_warps = 8 if not half or block_n * block_k > 8192 else 4  # float32 spills in fewer registers per tile
    return HeadConfig(images, block_n, block_k, num_warps, shares)


def _power_of_two(size: int) -> int:
    """The smallest that reaches `size`."""
    return 1 << (size - 1).bit_length()
