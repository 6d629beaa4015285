"""What the property tests draw: problems, how their tensors lie in memory, and configurations to launch them with."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.configs.config import Config, conv_k_blocks
from kernels.configs.convolution import ConvConfig
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS
from kernels.operators.activations import ACTIVATIONS
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem, PairConfig
from kernels.operators.mean_linear import HeadConfig, HeadProblem
from kernels.operators.registry import Arguments
from kernels.oracle import make_inputs
from kernels.problems import ConvProblem, Problem, Projection
from tests.effort import TIMES
from tests.kernels.cases import DTYPES, projected


def examples(count: int) -> settings:
    """The same `count` examples on every machine and every day, and with a failure the line that reproduces it.

    The fixtures that the tests use are constants.
    """
    return settings(
        max_examples=count * TIMES,
        derandomize=True,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Limits:
    """The largest problem that is drawn, and whether it must be one that boxes can load."""

    batch: int
    channels: int
    groups: int
    size: int
    kernel: int
    boxable: bool = False


LARGE = Limits(batch=5, channels=70, groups=8, size=20, kernel=7)
# Triton's interpreter takes its time.
SMALL = Limits(batch=3, channels=33, groups=3, size=5, kernel=3)
BOXABLE = replace(SMALL, groups=1, boxable=True)


@st.composite
def _axes(draw: st.DrawFn, limits: Limits, most_dilated: int) -> tuple[int, int, int, int, int]:
    """One axis of a convolution, with at least one pixel of output: size, kernel, stride, padding, dilation."""
    kernels = [kernel for kernel in (1, 3, 5, 7) if kernel <= limits.kernel]
    # 1x1 boxes are a matrix product, where little can go wrong.
    kernel = draw(st.sampled_from([*kernels, 3, 3] if limits.boxable else kernels))
    padding = draw(st.integers(0, kernel - 1))
    dilation = draw(st.integers(1, 1 if limits.boxable else most_dilated))
    smallest = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    size = draw(st.integers(smallest, max(smallest, limits.size)))
    return size, kernel, draw(st.integers(1, 1 if limits.boxable else 3)), padding, dilation


def _channels(limits: Limits, groups: int = 1) -> st.SearchStrategy[int]:
    most = limits.channels // groups
    multiples = st.sampled_from([multiple for multiple in (16, 32, 64) if multiple <= most] or [most])
    return multiples if limits.boxable else multiples | st.integers(1, most)


@st.composite
def _convolutions(draw: st.DrawFn, limits: Limits, grouped: bool = False, most_dilated: int = 2) -> ConvProblem:
    rows, columns = draw(_axes(limits, most_dilated)), draw(_axes(limits, most_dilated))
    (height, width), kernel, stride, padding, dilation = zip(rows, columns, strict=True)
    groups = draw(st.just(1) | st.integers(1, limits.groups)) if grouped else 1
    batch, dtype = draw(st.integers(1, limits.batch)), draw(st.sampled_from([*DTYPES.values()]))
    c_in, c_out = (groups * draw(_channels(limits, groups)) for _ in range(2))
    return ConvProblem(batch, c_in, height, width, c_out, kernel, stride, padding, dilation, groups, dtype)


_SLOPES = st.sampled_from([0.0, 0.01, 0.1, 1.5, -0.5])
ACTS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda relu: {"relu": relu}, st.booleans()),
    st.builds(lambda name, a: {"activation": name, "negative_slope": a}, st.sampled_from(ACTIVATIONS), _SLOPES),
)


def convs(limits: Limits) -> st.SearchStrategy[ConvProblem]:
    conv, flag = _convolutions(limits, grouped=True), st.booleans()
    return st.builds(lambda c, residual, act: replace(c, has_residual=residual, **act), conv, flag, ACTS)


@st.composite
def _projections(draw: st.DrawFn, conv: ConvProblem, limits: Limits) -> Projection:
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    projection = projected(conv, draw(_channels(limits)), stride, draw(st.integers(0, 2))).projection
    assert projection is not None
    return projection


@st.composite
def projections(draw: st.DrawFn, limits: Limits) -> ConvProblem:
    conv = draw(_convolutions(limits))
    return replace(conv, projection=draw(_projections(conv, limits)), **draw(ACTS))


@st.composite
def bottlenecks(draw: st.DrawFn, limits: Limits) -> BottleneckProblem:
    first = replace(draw(_convolutions(limits)), relu=True)
    shortcut = draw(st.sampled_from(("none", "residual", "projection")))
    return BottleneckProblem(
        first,
        draw(_channels(limits)),
        has_residual=shortcut == "residual",
        projection=draw(_projections(first, limits)) if shortcut == "projection" else None,
        relu=draw(st.booleans()),
    )


def stems(limits: Limits) -> st.SearchStrategy[StemProblem]:
    """Of few channels, as in an image: a row after another is slow in the interpreter."""
    few = replace(limits, channels=min(limits.channels, 12))
    return _convolutions(few, most_dilated=1).map(lambda conv: StemProblem(replace(conv, relu=True)))


def heads(limits: Limits) -> st.SearchStrategy[HeadProblem]:
    channels, size = _channels(limits), st.integers(1, limits.size)
    dtype = st.sampled_from([*DTYPES.values()])
    return st.builds(HeadProblem, st.integers(1, limits.batch), channels, size, size, channels, dtype)


OPERATORS: dict[str, Callable[[Limits], st.SearchStrategy[Any]]] = {
    "conv2d_bias_act": convs,
    "conv2d_projection_bias_act": projections,
    "conv2d_conv1x1_bias_act": bottlenecks,
    "conv2d_bias_relu_maxpool": stems,
    "mean_linear": heads,
}


def any_problem(limits: Limits) -> st.SearchStrategy[Problem]:
    return st.one_of([strategy(limits) for strategy in OPERATORS.values()])


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory.

    Attributes:
        order: its axes, the outermost in memory first.
        spread: the axis of which it takes every other element; what lies between is NaN, or the largest integer.
        repeated: the axis along which it repeats its first element, with a stride of 0.
        offset: where in its storage it starts, in elements.
        loose: whether axes of one element have a stride of 7, where any will do.
        requires_grad: whether autograd watches it.
    """

    order: tuple[int, ...]
    spread: int | None = None
    repeated: int | None = None
    offset: int = 0
    loose: bool = False
    requires_grad: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and, unless repeated, the same values."""
        values = tensor if self.repeated is None else tensor.narrow(self.repeated, 0, 1)
        sizes = [values.shape[axis] * (2 if axis == self.spread else 1) for axis in self.order]
        gap = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        memory = torch.full((self.offset + math.prod(sizes),), gap, dtype=tensor.dtype, device=tensor.device)
        view = memory[self.offset :].view(sizes).permute([self.order.index(axis) for axis in range(tensor.ndim)])
        view = view[tuple(slice(None, None, 2 if axis == self.spread else 1) for axis in range(tensor.ndim))]
        view.copy_(values)
        if self.loose:
            strides = [7 if size == 1 else stride for size, stride in zip(view.shape, view.stride(), strict=True)]
            view = view.as_strided(view.shape, strides)
        return view.expand(tensor.shape).requires_grad_(self.requires_grad)


def dense_order(ndim: int) -> tuple[int, ...]:
    """channels_last for 4 axes, else contiguous."""
    return (0, 2, 3, 1) if ndim == 4 else tuple(range(ndim))


def dense_layouts(ndim: int) -> st.SearchStrategy[Layout]:
    order, flag = st.just(dense_order(ndim)), st.booleans()
    return st.builds(Layout, order, offset=st.integers(0, 3), loose=flag, requires_grad=flag)


@st.composite
def any_layouts(draw: st.DrawFn, ndim: int) -> Layout:
    axes = st.none() | st.integers(0, ndim - 1)
    order = draw(st.just(dense_order(ndim)) | st.permutations(range(ndim)).map(tuple))
    return replace(draw(dense_layouts(ndim)), order=order, spread=draw(axes), repeated=draw(axes))


def is_dense(tensor: Tensor) -> bool:
    """channels_last for 4 axes, else contiguous, in torch's own words."""
    return tensor.is_contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format)


def dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format)


@dataclass(frozen=True)
class LaidOut:
    """A problem and how each of its tensors lies in memory."""

    problem: Problem
    layouts: dict[str, Layout]

    def inputs(self, device: torch.device | str = "cpu") -> Arguments[Tensor]:
        inputs = make_inputs(self.problem, device)
        return replace(inputs, **{name: self.layouts[name].of(tensor) for name, tensor in inputs.tensors().items()})


@st.composite
def laid_out(draw: st.DrawFn, problems: st.SearchStrategy[Problem]) -> LaidOut:
    """Every tensor dense at some offset, but for at most one, which lies in memory in any way."""
    problem = draw(problems)
    ndims = {name: len(shape) for name, shape in problem.shapes.items()}
    other = draw(st.none() | st.sampled_from([*ndims]))
    layouts = {name: draw((any_layouts if name == other else dense_layouts)(ndim)) for name, ndim in ndims.items()}
    return LaidOut(problem, layouts)


_WARPS = st.sampled_from([1, 2, 4, 8])
_STAGES = st.integers(1, 4)


def _blocks(size: int) -> st.SearchStrategy[int]:
    """Tile sides of which at most 4 cover `size`: the interpreter pays for each tile."""
    return st.sampled_from([block for block in (16, 32, 64, 128) if block == 128 or -(-size // block) <= 4])


def _boxable(conv: ConvProblem, projection: Projection | None = None) -> list[int]:
    """The block_k with which boxes can load a convolution; none if they cannot."""
    if (conv.stride, conv.dilation, conv.groups) != ((1, 1), (1, 1), 1):
        return []
    channels = math.gcd(conv.c_in, projection.c_in if projection else 0)
    return [block for block in (16, 32, 64) if channels % block == 0]


def _boxes(conv: ConvProblem, block_m: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """Of the boxes of block_m pixels those 8 of which the fewest cover the output."""
    sizes = (1, 1, conv.gemm_m) if conv.is_dense else (conv.batch, conv.out_height, conv.out_width)
    powers = [1 << bit for bit in range(block_m.bit_length())]
    boxes = [(block_m // (p * q), p, q) for p in powers for q in powers if p * q <= block_m]
    boxes.sort(key=lambda box: math.prod(-(-size // side) for size, side in zip(sizes, box, strict=True)))
    return st.sampled_from(boxes[:8])


@st.composite
def conv_configs(draw: st.DrawFn, conv: ConvProblem) -> ConvConfig:
    """Over boxes where they can load the convolution."""
    blocks = (draw(_blocks(conv.gemm_m)), draw(_blocks(conv.gemm_n)), draw(_blocks(conv.gemm_k)))
    config = ConvConfig(*blocks, draw(_WARPS), draw(_STAGES))
    boxable = _boxable(conv, conv.projection)
    if boxable:
        box, programs = draw(_boxes(conv, config.block_m)), draw(st.integers(0, 3))
        return replace(config, block_k=draw(st.sampled_from(boxable)), box=box, programs_per_sm=programs)
    return replace(config, split_k=draw(st.integers(1, min(4, sum(conv_k_blocks(conv, config.block_k))))))


@st.composite
def bottleneck_configs(draw: st.DrawFn, problem: BottleneckProblem) -> BottleneckConfig:
    first = problem.first
    blocks = (draw(_blocks(first.gemm_m)), draw(_blocks(problem.c_out)), draw(_blocks(first.gemm_k)))
    config = BottleneckConfig(*blocks, draw(_WARPS), draw(_STAGES))
    boxable = _boxable(first)
    if boxable:
        return replace(config, block_k=draw(st.sampled_from(boxable)), box=draw(_boxes(first, config.block_m)))
    return config


def _stem_configs(conv: ConvProblem) -> st.SearchStrategy[StemConfig]:
    blocks = [_blocks(size) for size in (conv.out_width, conv.c_out, conv.gemm_k)]
    return st.builds(StemConfig, *blocks, st.integers(1, 4), _WARPS, _STAGES)


def _head_configs(problem: HeadProblem) -> st.SearchStrategy[HeadConfig]:
    blocks = [_blocks(size) for size in (problem.batch, problem.c_out, problem.c_in)]
    return st.builds(HeadConfig, *blocks, _WARPS)


def configs(problem: Problem) -> st.SearchStrategy[Config]:
    """Configurations that are valid for a problem in the interpreter: what a target's heuristic takes, or any other."""
    chosen = st.sampled_from([*TARGETS.values()]).map(lambda target: heuristic_config(problem, target))
    if isinstance(problem, ConvProblem):
        return chosen | conv_configs(problem)
    if isinstance(problem, BottleneckProblem):
        pairs = st.builds(PairConfig, conv_configs(problem.first), conv_configs(problem.second))
        return chosen | pairs | bottleneck_configs(problem)
    if isinstance(problem, StemProblem):
        return chosen | _stem_configs(problem.conv)
    assert isinstance(problem, HeadProblem)
    return chosen | _head_configs(problem)
