"""The operator `resnet_deploy::mean_linear`: the head of a ResNet.

y = mean(x, pixels) @ weight.T + bias
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.configs.config import MIN_BLOCK, Config, KernelLaunch, Operand, launch_options, uses_pdl
from kernels.configs.heuristic import rule
from kernels.configs.targets import Target
from kernels.operators.checks import check_dimensions, check_tensors, check_vector
from kernels.operators.registry import Arguments, T, accumulation_dtype, register
from kernels.problems import Problem, Shapes, dtype_word
from kernels.rounding import Bound, Rounding, bound_of, mean_variance

# Pixels whose channels one step of the mean adds up: more in flight, more registers.
_PIXELS_PER_STEP = 4


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
    """block_m images by block_k channels per program, block_n classes at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int

    def problem_reason(self, problem: HeadProblem, target: Target | None) -> str | None:
        return None

    def shared_memory(self, problem: HeadProblem) -> int:
        operands = self.block_m * self.block_k + self.block_k * self.block_n
        return operands * problem.dtype.itemsize + 4 * self.block_m * self.block_n

    def accumulators(self, problem: HeadProblem) -> int:
        return self.block_m * self.block_n // (32 * self.num_warps)

    def launches(self, problem: HeadProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        tensor = Operand(problem.dtype)
        blocks_m = -(-problem.batch // self.block_m)
        splits = -(-problem.c_in // self.block_k)
        tiles = blocks_m * -(-problem.c_out // self.block_n)
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
                "BLOCK_M": self.block_m,
                "BLOCK_N": self.block_n,
                "BLOCK_K": self.block_k,
                "BLOCK_P": _PIXELS_PER_STEP,
                "SPLIT_K": splits,
                "USE_PDL": uses_pdl(target),
            },
            grid=(blocks_m * splits,),
            options=launch_options(self.num_warps, 1, target),
            tiles=tiles,
            partials=tiles * splits * self.block_m * self.block_n,
        )
        return (launch,)


@rule(HeadProblem)
def _head_config(problem: HeadProblem, target: Target) -> HeadConfig:
    # Few images: many programs of few channels each. Many images: fewer partial sums.
    block_k = 32 if problem.batch <= 16 else 128
    widest = max(MIN_BLOCK, 1 << (problem.c_in - 1).bit_length())
    return HeadConfig(block_m=16, block_n=64, block_k=min(block_k, widest), num_warps=4)
