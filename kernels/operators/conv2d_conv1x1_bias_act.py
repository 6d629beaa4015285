"""The operator `resnet_deploy::conv2d_conv1x1_bias_act`: the last two convolutions of a bottleneck, back to back.

h = relu(conv2d(x, weight) + bias)
y = act(conv2d(h, expand_weight) + s + expand_bias),    s = shortcut or its 1x1 projection
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.configs.config import (
    BARRIER_BYTES,
    MIN_BLOCK,
    Config,
    KernelLaunch,
    Operand,
    conv_k_blocks,
    launch_options,
    uses_pdl,
)
from kernels.configs.convolution import (
    BoxedConfig,
    ConvConfig,
    box_of,
    boxes,
    dilation,
    geometry,
    projected,
    sizes,
    tile,
)
from kernels.configs.heuristic import GATHERED_PER_THREAD, conv_config, rule
from kernels.configs.targets import Target
from kernels.operators.checks import check_convolution, check_pointwise, check_shortcut, check_tensors, check_vector
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.conv2d_projection_bias_act import Conv2dProjectionBiasAct
from kernels.operators.registry import Arguments, T, register
from kernels.problems import ConvProblem, Problem, Projection, Shapes, shortcut_words
from kernels.rounding import Bound, Rounding, bound_of

# Rows of a fused bottleneck and its warps, largest first; 64 accumulators per thread at most.
_BOTTLENECK_ROWS = ((128, 4), (128, 8), (64, 4), (64, 8), (32, 4), (32, 8))
# On WGMMA before these: half as many programs read the weights, for which L2 is what they wait for.
_MANY_ROWS = ((256, 8), (256, 16))
# Columns, K slice and stages of a fused bottleneck, the deepest pipeline that fits first.
_BOTTLENECK_SLICES = ((64, 64, 3), (64, 64, 2), (64, 32, 3), (64, 32, 2), (32, 32, 2))
# On HMMA over pointers before these, with a projection and without: few slices run ahead.
_HELD_SLICES = ((64, 32, 2), (32, 64, 2))
# On WGMMA before these: a projection's pixels are read again for every block of columns.
_PROJECTION_SLICES = ((128, 64, 3), (128, 64, 2))
# Wider than this, the first convolution's tile leaves too few rows per program to reuse its weights.
_WIDEST_BOTTLENECK = 256


@dataclass(frozen=True, eq=False)
class Conv2dConv1x1BiasAct(Arguments[T]):
    """A convolution with ReLU, then a 1x1 convolution with shortcut; what lies between need not reach memory.

        h = relu(conv2d(x, weight) + bias), rounded to the dtype of x
        y = act(conv2d(h, expand_weight) + s + expand_bias)

    with s = 0, the shortcut, or conv2d(shortcut, shortcut_weight). For inference only, like `conv2d_bias_act`.

    Args:
        x: (N, C_IN, H, W), channels_last; float16, bfloat16 or float32, on the CPU also float64.
        weight: (C_MID, C_IN, R, S), channels_last, dtype of x.
        bias: (C_MID,), contiguous, dtype of x.
        expand_weight: (C_OUT, C_MID, 1, 1), channels_last, dtype of x.
        expand_bias: (C_OUT,), contiguous, dtype of x; includes the projection's bias.
        shortcut: without shortcut_weight (N, C_OUT, P, Q), with it (N, C_S, H_S, W_S); channels_last, dtype of x.
        shortcut_weight: (C_OUT, C_S, 1, 1), channels_last, dtype of x.
        stride, padding, dilation: of the first convolution, (height, width) in pixels.
        shortcut_stride: of the projection, (height, width) in pixels.
        relu: act(v) = max(v, 0), NaN stays NaN; otherwise act(v) = v.

    Returns:
        (N, C_OUT, P, Q), channels_last, dtype of x; accumulated in float32 (float64: in float64).

    Raises:
        ValueError: an argument is not as above; the message says what was received and what is expected.
        ModuleNotFoundError: x is on a GPU and Triton is not installed.
    """

    operator = "conv2d_conv1x1_bias_act"

    x: T
    weight: T
    bias: T
    expand_weight: T
    expand_bias: T
    shortcut: T | None = None
    shortcut_weight: T | None = None
    _: KW_ONLY
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    shortcut_stride: tuple[int, int] = (1, 1)
    relu: bool = False

    def first(self) -> Conv2dBiasAct[T]:
        """What computes h."""
        return Conv2dBiasAct(
            self.x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=True,
        )

    def operands(self) -> dict[str, T]:
        """A shortcut that is not projected is the kernel's residual."""
        tensors = self.tensors()
        if self.shortcut is not None and self.shortcut_weight is None:
            tensors["residual"] = tensors.pop("shortcut")
        return tensors

    def check(self: "Conv2dConv1x1BiasAct[Tensor]", dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
        n, c_mid, height, width = check_convolution("", self.x, self.weight, self.stride, self.padding, self.dilation)
        check_vector("bias", self.bias, c_mid)
        check_pointwise("expand_weight", self.expand_weight, c_mid)
        shape = (n, self.expand_weight.shape[0], height, width)
        check_vector("expand_bias", self.expand_bias, shape[1])
        if self.shortcut_weight is not None and self.shortcut is None:
            raise ValueError("shortcut is None, expected the tensor that shortcut_weight projects")
        check_shortcut(self.shortcut, self.shortcut_weight, self.shortcut_stride, shape)
        check_tensors(self.tensors(), dtypes)
        return shape

    def problem(self: "Conv2dConv1x1BiasAct[Tensor]") -> "BottleneckProblem":
        projects = self.shortcut is not None and self.shortcut_weight is not None
        return BottleneckProblem(
            first=self.first().problem(),
            c_out=self.expand_weight.shape[0],
            has_residual=self.shortcut is not None and not projects,
            projection=Projection.of(self.shortcut, self.shortcut_stride)
            if self.shortcut is not None and projects
            else None,
            relu=self.relu,
        )

    def reference(self: "Conv2dConv1x1BiasAct[Tensor]") -> Tensor:
        expand = (self.first().reference(), self.expand_weight, self.expand_bias)
        if self.shortcut is None or self.shortcut_weight is None:
            return Conv2dBiasAct(*expand, self.shortcut, relu=self.relu).reference()
        shortcut = (self.shortcut, self.shortcut_weight)
        stride = self.shortcut_stride
        return Conv2dProjectionBiasAct(*expand, *shortcut, shortcut_stride=stride, relu=self.relu).reference()

    def before_activation(self: "Conv2dConv1x1BiasAct[Tensor]") -> Tensor:
        return replace(self, relu=False).reference()

    def bound(self: "Conv2dConv1x1BiasAct[Tensor]", pre: Tensor, rounding: Rounding) -> Bound:
        geometry = (self.stride, self.padding, self.dilation)
        products = F.conv2d(self.x.square(), self.weight.square(), None, *geometry)
        h = F.conv2d(self.x, self.weight, self.bias, *geometry).relu_()
        carried = rounding.convolution(h, products, self.bias, self.weight[0].numel())
        expand = self.expand_weight.square()
        shortcut = (self.shortcut, self.shortcut_weight, self.shortcut_stride)
        products, length = F.conv2d(h.square(), expand), expand.shape[1]
        variance = rounding.convolution(pre, products, self.expand_bias, length, *shortcut)
        return bound_of(variance.add_(F.conv2d(carried.mul_(h > 0), expand)), pre)

    def shared(self: "Conv2dConv1x1BiasAct[Tensor]", pull: Tensor, rounding: Rounding) -> Tensor:
        h = F.conv2d(self.x, self.weight, self.bias, self.stride, self.padding, self.dilation).relu_()
        return (F.conv_transpose2d(pull, self.expand_weight).square() * rounding.of(h)).sum()


conv2d_conv1x1_bias_act = register(Conv2dConv1x1BiasAct[Tensor])


@dataclass(frozen=True)
class BottleneckProblem:
    """conv2d_conv1x1_bias_act: `first` with its ReLU, then a 1x1 convolution to c_out channels with the shortcut."""

    first: ConvProblem
    c_out: int
    has_residual: bool = False
    projection: Projection | None = None
    relu: bool = False

    operator: ClassVar[str] = "conv2d_conv1x1_bias_act"

    @property
    def convolution(self) -> ConvProblem:
        return self.first

    @property
    def parts(self) -> tuple[Problem, ...]:
        return self.first, self.second

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

    @property
    def key(self) -> str:
        shortcut = shortcut_words(self.has_residual, self.projection, self.relu)
        return f"bottleneck {self.first.words} -> {self.c_out}{shortcut}"

    @property
    def shapes(self) -> Shapes:
        shapes = {
            **self.first.shapes,
            "expand_weight": (self.c_out, self.first.c_out, 1, 1),
            "expand_bias": (self.c_out,),
        }
        if self.has_residual:
            shapes["shortcut"] = self.out_shape
        return {**shapes, **(self.projection.shapes(self.batch, self.c_out) if self.projection else {})}

    @property
    def settings(self) -> dict[str, Any]:
        first, stride = self.first, self.projection.stride if self.projection else (1, 1)
        geometry = {"stride": first.stride, "padding": first.padding, "dilation": first.dilation}
        return {**geometry, "shortcut_stride": stride, "relu": self.relu}

    def with_batch(self, batch: int) -> "BottleneckProblem":
        return replace(self, first=self.first.with_batch(batch))

    def with_dtype(self, dtype: torch.dtype) -> "BottleneckProblem":
        return replace(self, first=self.first.with_dtype(dtype))


@dataclass(frozen=True)
class BottleneckConfig(BoxedConfig, kind="bottleneck", runs=BottleneckProblem):
    """One kernel for both convolutions: block_m rows through all channels in between, then block_n columns at a time.

    `box` is the first convolution's.
    """

    def problem_reason(self, problem: BottleneckProblem, target: Target | None) -> str | None:
        if problem.first.groups != 1:
            return f"{problem.first.groups} groups, expected 1"
        return self.box_reason(problem.first, target)

    def shared_memory(self, problem: BottleneckProblem) -> int:
        size, mid = problem.dtype.itemsize, block_mid(problem)
        first = self.num_stages * (self.block_m + mid) * self.block_k
        expand = self.num_stages * mid * self.block_n
        if problem.projection:
            expand = mid * self.block_n + self.num_stages * (self.block_m + self.block_n) * self.block_k
        second = self.block_m * mid + max(expand, self.block_m * self.block_n)
        # The boxes of the first convolution are still in place when the second's first tile changes layout.
        beside_boxes = 2 * self.block_m * self.block_n * size + BARRIER_BYTES if self.box else 0
        return max(first, second) * size + beside_boxes

    def accumulators(self, problem: BottleneckProblem) -> int:
        return self.block_m * max(block_mid(problem), self.block_n) // (32 * self.num_warps)

    def launches(self, problem: BottleneckProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        first, tensor = problem.first, Operand(problem.dtype)
        mid = block_mid(problem)
        x, weight, rows = tensor, tensor, -(-first.gemm_m // self.block_m)
        if self.box is not None:
            x = Operand(problem.dtype, (*self.box, self.block_k), "pixels")
            weight = Operand(problem.dtype, (mid, self.block_k), "filters")
            rows = boxes((first.batch, first.out_height, first.out_width), self.box)
        launch = KernelLaunch(
            kernel="bottleneck._conv2d_conv1x1_kernel",
            problem=problem,
            config=self,
            operands={
                "x": x,
                "weight": weight,
                "bias_ptr": tensor,
                "expand_weight_ptr": tensor,
                "expand_bias_ptr": tensor,
                "residual_ptr": tensor if problem.has_residual else None,
                "shortcut_ptr": tensor if problem.projection else None,
                "shortcut_weight_ptr": tensor if problem.projection else None,
                "y_ptr": tensor,
            },
            scalars={
                **sizes(first, problem.projection),
                "C_IN": first.c_in,
                "C_MID": first.c_out,
                "C_OUT": problem.c_out,
                **geometry(first),
                **dilation(first),
                **projected(problem.projection, self.block_k),
                "K_BLOCKS": conv_k_blocks(first, self.block_k)[0],
                "HAS_RESIDUAL": problem.has_residual,
                "APPLY_RELU": problem.relu,
                "USE_BOXES": self.box is not None,
                **tile(self.box),
                "BLOCK_M": self.block_m,
                "BLOCK_MID": mid,
                "BLOCK_N": self.block_n,
                "BLOCK_K": self.block_k,
                "WARP_ROWS": self._warp_rows(problem, target),
                "USE_PDL": uses_pdl(target),
            },
            grid=(rows,),
            options=launch_options(self.num_warps, self.num_stages, target),
        )
        return (launch,)

    def _warp_rows(self, problem: BottleneckProblem, target: Target | None) -> int:
        """Of products that follow one another Triton divides rows alone between warps; 0 as in `held_by`."""
        hmma = problem.dtype != torch.float32 and (target is None or target.matrix_instruction(self.block_m) == "HMMA")
        whole = self.box is None and self.block_m >= 16 * self.num_warps and self.block_n >= 32
        return self.num_warps if hmma and whole else 0


@dataclass(frozen=True)
class PairConfig(Config, kind="pair", runs=BottleneckProblem):
    """Two kernels, one for each convolution of a BottleneckProblem."""

    first: ConvConfig
    second: ConvConfig

    def problem_reason(self, problem: BottleneckProblem, target: Target | None) -> str | None:
        first, second = problem.first, problem.second
        return self.first.unsupported_reason(first, target) or self.second.unsupported_reason(second, target)

    def shared_memory(self, problem: BottleneckProblem) -> int:
        return max(self.first.shared_memory(problem.first), self.second.shared_memory(problem.second))

    def accumulators(self, problem: BottleneckProblem) -> int:
        return max(self.first.accumulators(problem.first), self.second.accumulators(problem.second))

    def launches(self, problem: BottleneckProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        (first,) = self.first.launches(problem.first, target)
        (second,) = self.second.launches(problem.second, target)
        tensors = {"x": "hidden", "weight": "expand_weight", "bias": "expand_bias"}
        return replace(first, output="hidden"), replace(second, tensors=tensors)

    def changes(self, problem: BottleneckProblem) -> Iterator[Config]:
        """None: its two halves are tuned on their own."""
        return iter(())

    def without_boxes(self) -> Config:
        return PairConfig(replace(self.first, box=None), replace(self.second, box=None))

    @classmethod
    def of_sizes(cls, sizes: Mapping[str, Any]) -> Config:
        halves: dict[str, Any] = {half: Config.from_json({"kind": "conv", **sizes[half]}) for half in sizes}
        return cls(**halves)


def block_mid(problem: BottleneckProblem) -> int:
    """Columns of the first tile of a fused bottleneck: all its channels, rounded up to a power of two."""
    return max(MIN_BLOCK, 1 << (problem.first.c_out - 1).bit_length())


def _fused_config(problem: BottleneckProblem, target: Target) -> BottleneckConfig | None:
    """The fused kernel, where it has enough programs to keep the GPU busy; None: two kernels are better."""
    mid = block_mid(problem)
    if problem.dtype == torch.float32 or problem.first.groups > 1 or mid > _WIDEST_BOTTLENECK:
        return None
    fewest_rows = 64 if target.has_wgmma or not target.has_tma else 32
    rows = (*_MANY_ROWS, *_BOTTLENECK_ROWS) if target.has_wgmma else _BOTTLENECK_ROWS
    wide = target.has_wgmma and problem.projection is not None
    slices = (*_PROJECTION_SLICES, *_BOTTLENECK_SLICES) if wide else _BOTTLENECK_SLICES
    if not target.has_tma and mid <= 64:
        slices = (_HELD_SLICES[problem.projection is None], *slices)
    fewest = target.multiprocessors if not target.has_tma else -(-target.multiprocessors // 2)
    most = GATHERED_PER_THREAD if target.has_tma and not target.has_wgmma else 2 * GATHERED_PER_THREAD
    short = not target.has_tma and problem.projection is not None  # longer slices of three operands spill
    for block_m, num_warps in rows:
        if block_m < fewest_rows or block_m * mid > 64 * 32 * num_warps or block_m * mid <= 16 * 32 * num_warps:
            continue
        # Each program reads all the weights: most multiprocessors must share that work, of which two kernels that
        # divide K leave none without.
        if -(-problem.first.gemm_m // block_m) < fewest:
            continue
        for box in (box_of(problem.first, block_m), None):
            for block_n, block_k, num_stages in slices:
                if short and num_warps == 8 and block_k > 32:
                    continue
                config = BottleneckConfig(block_m, block_n, block_k, num_warps, num_stages, box=box)
                gathered = block_m * block_n > most * 32 * num_warps or num_warps > 8  # too many to keep
                if not (box is None and gathered) and config.unsupported_reason(problem, target) is None:
                    return config
    return None


def _starts(problem: BottleneckProblem, target: Target, parts: Sequence[Any]) -> list[Config]:
    """The pair of the best parts; one valid fused configuration, with boxes where the target has them; one without."""
    starts: list[Config] = [PairConfig(*parts)]
    for box in (True, False):
        for block_m, num_warps in ((128, 8), (64, 8), (64, 4), (32, 8)):
            config = BottleneckConfig(
                block_m, 64, 32, num_warps, 2, box=box_of(problem.first, block_m) if box else None
            )
            if config.unsupported_reason(problem, target) is None:
                starts.append(config)
                break
    return starts


@rule(BottleneckProblem, _starts)
def _bottleneck_config(problem: BottleneckProblem, target: Target) -> Config:
    return _fused_config(problem, target) or PairConfig(
        conv_config(problem.first, target), conv_config(problem.second, target)
    )
