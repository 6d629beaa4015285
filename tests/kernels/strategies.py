"""What the property tests draw: problems, how their tensors lie in memory, and configurations to launch them with."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig, box_of
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS
from kernels.operators.activations import ACTIVATIONS
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem, PairConfig
from kernels.operators.mean_linear import HeadProblem
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


@st.composite
def laid_out(draw: st.DrawFn, problem: Problem, device: torch.device) -> Arguments[Tensor]:
    """Inputs that are dense at some offset, but for at most one, which lies in memory in any way."""
    inputs = make_inputs(problem, device)
    other = draw(st.none() | st.sampled_from([*inputs.tensors()]))
    layouts = {
        name: draw((any_layouts if name == other else dense_layouts)(tensor.ndim))
        for name, tensor in inputs.tensors().items()
    }
    return replace(inputs, **{name: layouts[name].of(tensor) for name, tensor in inputs.tensors().items()})


@st.composite
def _near(draw: st.DrawFn, problem: Problem, start: Any) -> Any:
    """At most 8 decisions away from a configuration, and valid in the interpreter; boxes stay boxes."""
    boxed, config = getattr(start, "box", None) is not None, start
    for _ in range(draw(st.integers(0, 8))):
        valid = [change for change in config.changes(problem) if change.unsupported_reason(problem, None) is None]
        config = draw(st.sampled_from([config, *(change for change in valid if not boxed or change.box)]))
    return config


def boxed_configs(problem: ConvProblem | BottleneckProblem) -> st.SearchStrategy[ConvConfig | BottleneckConfig]:
    """Of a problem whose channels are multiples of 16."""
    kind = BottleneckConfig if isinstance(problem, BottleneckProblem) else ConvConfig
    return _near(problem, kind(32, 32, 16, 4, 2, box=box_of(problem.convolution, 32)))


def configs(problem: Problem) -> st.SearchStrategy[Config]:
    """From what the heuristics take for a target, or where a search would begin; a pair from that of its halves."""
    starts = [heuristic_config(problem, target) for target in TARGETS.values()]
    if not isinstance(problem, BottleneckProblem):
        return st.sampled_from(starts).flatmap(lambda start: _near(problem, start))
    pairs = st.builds(PairConfig, configs(problem.first), configs(problem.second))
    return pairs | st.sampled_from([*starts, BottleneckConfig(32, 32, 16, 4, 2)]).flatmap(lambda s: _near(problem, s))
