"""The operator `resnet_deploy::conv2d_bias_relu_maxpool`: the stem of an ImageNet ResNet.

y = max_pool2d(relu(conv2d(x, weight) + bias), kernel 3, stride 2, padding 1)
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.configs.config import (
    MIN_BLOCK,
    Config,
    KernelLaunch,
    Operand,
    conv_k_blocks,
    launch_options,
    pixel_reason,
    uses_pdl,
)
from kernels.configs.convolution import geometry
from kernels.configs.heuristic import MAX_GATHERED_PER_THREAD, rule
from kernels.configs.targets import Target
from kernels.operators.checks import check_convolution, check_tensors, check_vector
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.registry import Arguments, T, register
from kernels.problems import ConvProblem, Problem, Shapes, conv_output_size
from kernels.rounding import Bound, Rounding


@dataclass(frozen=True, eq=False)
class Conv2dBiasReluMaxpool(Arguments[T]):
    """Convolution, bias, ReLU and a 3x3 max-pool of stride 2 and padding 1, rounded once.

        y = max_pool2d(relu(conv2d(x, weight) + bias), 3, 2, 1)

    For inference only, like `conv2d_bias_act`.

    Args:
        x: (N, C_IN, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (C_OUT, C_IN, R, S), channels_last, dtype of x.
        bias: (C_OUT,), contiguous, dtype of x.
        stride, padding: of the convolution, (height, width) in pixels.

    Returns:
        (N, C_OUT, (P - 1) // 2 + 1, (Q - 1) // 2 + 1), channels_last, dtype of x, where the convolution has P x Q
        pixels; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """

    operator = "conv2d_bias_relu_maxpool"

    x: T
    weight: T
    bias: T
    _: KW_ONLY
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def convolution(self, relu: bool) -> Conv2dBiasAct[T]:
        return Conv2dBiasAct(self.x, self.weight, self.bias, stride=self.stride, padding=self.padding, relu=relu)

    def check(self: "Conv2dBiasReluMaxpool[Tensor]", dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
        n, c_out, height, width = check_convolution("", self.x, self.weight, self.stride, self.padding, (1, 1))
        check_vector("bias", self.bias, c_out)
        check_tensors(self.tensors(), dtypes)
        return n, c_out, conv_output_size(height, 3, 2, 1, 1), conv_output_size(width, 3, 2, 1, 1)

    def problem(self: "Conv2dBiasReluMaxpool[Tensor]") -> "StemProblem":
        return StemProblem(self.convolution(relu=True).problem())

    def reference(self: "Conv2dBiasReluMaxpool[Tensor]") -> Tensor:
        return self.pool(self.convolution(relu=True).reference())

    def before_activation(self: "Conv2dBiasReluMaxpool[Tensor]") -> Tensor:
        return self.convolution(relu=False).reference()

    def pool(self, value: Tensor) -> Tensor:
        return F.max_pool2d(value, 3, 2, 1).contiguous(memory_format=torch.channels_last)

    def bound(self: "Conv2dBiasReluMaxpool[Tensor]", pre: Tensor, rounding: Rounding) -> Bound:
        bound = self.convolution(relu=True).bound(pre, rounding)
        pooled, largest = F.max_pool2d(pre, 3, 2, 1, return_indices=True)
        sigma = bound.sigma.flatten(2).gather(2, largest.flatten(2)).view(pooled.shape)
        return Bound(sigma, F.max_pool2d(bound.upper, 3, 2, 1))


conv2d_bias_relu_maxpool = register(Conv2dBiasReluMaxpool[Tensor])


@dataclass(frozen=True)
class StemProblem:
    """conv2d_bias_relu_maxpool: `conv` with its ReLU, then the 3x3 max-pool of stride 2 and padding 1."""

    conv: ConvProblem

    operator: ClassVar[str] = "conv2d_bias_relu_maxpool"
    relu: ClassVar[bool] = True
    parts: ClassVar[tuple[Problem, ...]] = ()

    @property
    def convolution(self) -> ConvProblem:
        return self.conv

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

    @property
    def key(self) -> str:
        return f"stem {self.conv.words}"

    @property
    def shapes(self) -> Shapes:
        return self.conv.shapes

    @property
    def settings(self) -> dict[str, Any]:
        return {"stride": self.conv.stride, "padding": self.conv.padding}

    def with_batch(self, batch: int) -> "StemProblem":
        return StemProblem(self.conv.with_batch(batch))

    def with_dtype(self, dtype: torch.dtype) -> "StemProblem":
        return StemProblem(self.conv.with_dtype(dtype))


@dataclass(frozen=True)
class StemConfig(Config, kind="stem", runs=StemProblem):
    """block_q columns of the convolution by block_n channels, walking down pool_rows pooled rows."""

    block_q: int
    block_n: int
    block_k: int
    pool_rows: int
    num_warps: int
    num_stages: int

    def problem_reason(self, problem: StemProblem, target: Target | None) -> str | None:
        conv = problem.conv
        if conv.groups != 1 or conv.dilation != (1, 1):
            return f"groups {conv.groups} and dilation {conv.dilation}, expected 1 and (1, 1)"
        return pixel_reason(conv.gemm_m, 0)

    def shared_memory(self, problem: StemProblem) -> int:
        pipeline = self.num_stages * (self.block_q + self.block_n) * self.block_k * problem.dtype.itemsize
        return max(pipeline, self.block_q * self.block_n * 4)

    def accumulators(self, problem: StemProblem) -> int:
        return self.block_q * self.block_n // (32 * self.num_warps)

    def launches(self, problem: StemProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        conv, tensor = problem.conv, Operand(problem.dtype)
        _, c_out, pool_p, pool_q = problem.out_shape
        launch = KernelLaunch(
            kernel="stem._conv2d_bias_relu_maxpool_kernel",
            problem=problem,
            config=self,
            operands=dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), tensor),
            scalars={
                "H": conv.height,
                "W": conv.width,
                "P": conv.out_height,
                "Q": conv.out_width,
                "POOL_P": pool_p,
                "POOL_Q": pool_q,
                "C_IN": conv.c_in,
                "C_OUT": c_out,
                **geometry(conv),
                "K_BLOCKS": conv_k_blocks(conv, self.block_k)[0],
                "BLOCK_Q": self.block_q,
                "BLOCK_N": self.block_n,
                "BLOCK_K": self.block_k,
                "POOL_ROWS": self.pool_rows,
                "USE_PDL": uses_pdl(target),
            },
            grid=(
                problem.batch * -(-pool_p // self.pool_rows),
                -(-pool_q // (self.block_q // 2 - 1)),
                -(-c_out // self.block_n),
            ),
            options=launch_options(self.num_warps, self.num_stages, target),
        )
        return (launch,)


@rule(StemProblem)
def _stem_config(problem: StemProblem, target: Target) -> StemConfig:
    _, c_out, pool_height, pool_width = problem.out_shape
    # On FMA units the row above and both operands' slices share the registers with the accumulators.
    widest = 64 if problem.dtype == torch.float32 else 128
    block_q = min(widest, max(32, 1 << (2 * pool_width + 1).bit_length()))
    block_n = min(64, max(MIN_BLOCK, 1 << (c_out - 1).bit_length()))
    block_k = 16 if problem.dtype == torch.float32 else 32
    num_warps = 8 if problem.dtype == torch.float32 else 4
    while block_q * max(block_n, 2 * block_k) > 32 * MAX_GATHERED_PER_THREAD * 2 * num_warps and num_warps < 8:
        num_warps *= 2
    strips = -(-pool_width // (block_q // 2 - 1)) * -(-c_out // block_n) * problem.batch
    pool_rows = next((r for r in (8, 4, 2) if -(-pool_height // r) * strips >= 2 * target.multiprocessors), 1)
    return StemConfig(block_q, block_n, block_k, pool_rows, num_warps, num_stages=2)
