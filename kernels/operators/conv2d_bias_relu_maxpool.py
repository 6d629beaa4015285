"""The operator `resnet_deploy::conv2d_bias_relu_maxpool`: the stem of an ImageNet ResNet.

y = max_pool2d(relu(conv2d(x, weight) + bias), kernel 3, stride 2, padding 1)
"""

import itertools
import math
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


# Elements of a filter that the registers of a program hold, and of an image whose places fit in int32, twice over.
MAX_WINDOW = 256
MAX_WINDOW_IMAGE = 2**29

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
    """block_q columns of the convolution by block_n channels, walking down pool_rows pooled rows; of any alignment."""

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


@dataclass(frozen=True)
class Windows:
    """How the window of one filter row, kernel width * c_in neighbouring elements of x, is copied.

    `main` elements are copied `vector` at a time, where all windows have them at multiples of `vector`; the `head`
    before and the `tail` after them one at a time.
    """

    vector: int
    head: int
    main: int
    tail: int

    @classmethod
    def of(cls, conv: ConvProblem) -> "Windows | None":
        """None where no vector of 4 bytes, the least that is copied asynchronously, is in every window."""
        size, lead, row = conv.dtype.itemsize, conv.padding[1] * conv.c_in, conv.kernel[1] * conv.c_in
        aligned = math.gcd(16 // size, conv.stride[1] * conv.c_in, conv.width * conv.c_in)
        least = max(1, 4 // size)
        vector = max(least, math.gcd(aligned, lead, row))
        head = lead % vector
        main = (row - head) // vector * vector
        return cls(vector, head, main, row - head - main) if aligned % vector == 0 and main > 0 else None


@dataclass(frozen=True)
class StemWindowsConfig(Config, kind="stem windows", runs=StemProblem):
    """block_n channels by block_q columns of the convolution, walking down pool_rows pooled rows with the weights."""

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
        if Windows.of(conv) is None:
            return f"windows of {conv.c_in} channels are not aligned to 4 bytes"
        full, last, other = self.slices(conv)
        length = full * self.block_k + last + other
        if length > MAX_WINDOW and target is not None:
            return f"a filter has {length} elements, expected at most {MAX_WINDOW}"
        if conv.height * conv.width * conv.c_in > MAX_WINDOW_IMAGE:
            return f"an image has {conv.height * conv.width * conv.c_in} elements, expected at most {MAX_WINDOW_IMAGE}"
        return pixel_reason(conv.gemm_m + conv.batch * conv.out_height, self.block_q)

    def slices(self, conv: ConvProblem) -> tuple[int, int, int]:
        """How K is cut: slices of block_k of what is copied in vectors, the length of one for its rest, and of one for
        all else; 0 where nothing is left."""
        windows = Windows.of(conv)
        assert windows is not None
        full, rest = divmod(conv.kernel[0] * windows.main, self.block_k)
        return full, _slice(rest), _slice(conv.kernel[0] * (windows.head + windows.tail))

    def shared_memory(self, problem: StemProblem) -> int:
        full, last, other = self.slices(problem.conv)
        vectors = full * self.block_k + last
        pipeline = self.num_stages * vectors * self.block_q
        weights = (vectors + other) * self.block_n
        return (pipeline + weights) * problem.dtype.itemsize + self.block_q * self.block_n * 4

    def accumulators(self, problem: StemProblem) -> int:
        return self.block_q * self.block_n // (32 * self.num_warps)

    def launches(self, problem: StemProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        conv, tensor, windows = problem.conv, Operand(problem.dtype), Windows.of(problem.conv)
        assert windows is not None
        n, c_out, pool_p, pool_q = problem.out_shape
        _, last, other = self.slices(conv)
        launch = KernelLaunch(
            kernel="stem_windows._conv2d_windows_bias_relu_maxpool_kernel",
            problem=problem,
            config=self,
            operands=dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), tensor),
            scalars={
                "N": n,
                "H": conv.height,
                "ROW_VECTORS": conv.width * conv.c_in // windows.vector,
                "P": conv.out_height,
                "Q": conv.out_width,
                "POOL_P": pool_p,
                "POOL_Q": pool_q,
                "C_OUT": c_out,
                "R": conv.kernel[0],
                "HEAD": windows.head,
                "MAIN": windows.main,
                "TAIL": windows.tail,
                "VECTOR": windows.vector,
                "STRIDE_H": conv.stride[0],
                "COLUMN_STEP": conv.stride[1] * conv.c_in,
                "PAD_H": conv.padding[0],
                "FIRST_COLUMN": windows.head - conv.padding[1] * conv.c_in,
                "ODD_P": conv.out_height % 2 == 1,
                "ODD_Q": conv.out_width % 2 == 1,
                "BLOCK_N": self.block_n,
                "BLOCK_Q": self.block_q,
                "BLOCK_K": self.block_k,
                "LAST_K": last,
                "OTHER_K": other,
                "POOL_ROWS": self.pool_rows,
                # In registers; later matrix instructions than HMMA read them from shared memory.
                "KEEP_WEIGHTS": target is None or target.matrix_instruction(self.block_n) == "HMMA",
                "USE_PDL": uses_pdl(target),
            },
            grid=(
                -(-n * pool_q // (self.block_q // 2 - 1)),
                -(-pool_p // self.pool_rows),
                -(-c_out // self.block_n),
            ),
            options=launch_options(self.num_warps, self.num_stages, target),
        )
        return (launch,)


def _slice(length: int) -> int:
    """The shortest slice of K that holds so many elements; none of 0."""
    return max(MIN_BLOCK, 1 << (length - 1).bit_length()) if length else 0


def _starts(problem: StemProblem, target: Target, parts: Sequence[Config]) -> list[Config]:
    starts = [_windows_config(problem, target), _gathered_config(problem, target)]
    return [config for config in starts if config is not None and not config.unsupported_reason(problem, target)]


@rule(StemProblem, starts=_starts)
def _stem_config(problem: StemProblem, target: Target) -> Config:
    return _windows_config(problem, target) or _gathered_config(problem, target)


def _windows_config(problem: StemProblem, target: Target) -> StemWindowsConfig | None:
    """None where K is too long for a program to keep the weights, or on FMA units, where its padding costs time."""
    n, c_out, pool_height, pool_width = problem.out_shape
    block_n = min(64, max(MIN_BLOCK, 1 << (c_out - 1).bit_length()))
    columns = n * pool_width

    def cost(config: StemWindowsConfig) -> tuple[int, int]:
        """Columns times rows that the busiest multiprocessor issues, or that its programs wait for one after the other.

        A multiprocessor holds the programs of about 128 columns at a time; one on its own takes twice as long as it
        issues, and as long for its way into the loop as for three rows.
        """
        strips = -(-columns // (config.block_q // 2 - 1)) * -(-c_out // block_n)
        programs = strips * -(-pool_height // config.pool_rows)
        size = (2 * config.pool_rows + 4) * config.block_q
        waves = -(-programs // (target.multiprocessors * (128 // config.block_q)))
        return max(-(-programs // target.multiprocessors), 2 * waves) * size, programs

    sizes = itertools.product((32,), range(1, pool_height + 1))
    configs = [StemWindowsConfig(q, block_n, 128, rows, block_n // 16, num_stages=3) for q, rows in sizes]
    fitting = [config for config in configs if config.unsupported_reason(problem, target) is None]
    if problem.dtype == torch.float32 or not fitting:
        return None
    return min(fitting, key=cost)


def _gathered_config(problem: StemProblem, target: Target) -> StemConfig:
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
