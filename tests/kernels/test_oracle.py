"""The comparator accepts a correct output and refuses every output that is broken on purpose."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import EllipsisType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.base.precision import PRECISIONS
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.operators.registry import Arguments
from kernels.oracle import make_inputs, oracle, p1_failures
from kernels.problems import ConvProblem, Problem
from kernels.rounding import MAX_Z, ROUNDING_RMS, UNIT_ROUNDOFF
from tests.kernels.cases import DTYPES, ONE_OF_EACH
from tests.kernels.launching import composition


@dataclass(frozen=True)
class Trial:
    problem: Problem
    inputs: Arguments[Tensor]
    correct: Tensor
    expected: tuple[Tensor, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.inputs.tensors()

    @property
    def convolution(self) -> ConvProblem:
        assert isinstance(self.problem, ConvProblem | StemProblem | BottleneckProblem)
        return self.problem.convolution

    def compute(
        self, changes: Mapping[str, Tensor] = {}, relu: bool = True, hidden: Callable[[Tensor], Tensor] = F.relu
    ) -> Tensor:
        """The operator with some of its inputs replaced."""
        return composition(self.problem, replace(self.inputs, **changes), relu, hidden)

    def failures(self, y: Tensor) -> list[str]:
        return p1_failures(y, self.problem, self.inputs, self.expected)


@functools.cache
def make_trial(name: str, dtype: str) -> Trial:
    problem = ONE_OF_EACH[name].with_dtype(DTYPES[dtype])
    inputs = make_inputs(problem)
    return Trial(problem, inputs, composition(problem, inputs), oracle(problem, inputs))


def with_value(y: Tensor, index: tuple[int | slice | EllipsisType, ...], value: Tensor | float) -> Tensor:
    changed = y.clone()
    changed[index] = value
    return changed


def swapped(tensor: Tensor) -> Tensor:
    """The first two channels change places."""
    axis = min(1, tensor.dim() - 1)
    return tensor.index_select(axis, torch.tensor([1, 0, *range(2, tensor.shape[axis])]))


def one_value_slightly_off(trial: Trial) -> Tensor:
    """The largest value, off by a few roundings: well under 1 % in float16."""
    pre, sigma = trial.expected
    index = tuple(int(i) for i in torch.unravel_index(pre.argmax(), pre.shape))
    return with_value(trial.correct, index, pre[index] + 1.5 * MAX_Z[trial.problem.dtype] * sigma[index])


def relu_before_addition(trial: Trial) -> Tensor:
    name = "shortcut" if isinstance(trial.problem, BottleneckProblem) else "residual"
    residual = trial.tensors[name]
    without = trial.compute({name: torch.zeros_like(residual)}).float()
    return (without + residual.float()).to(trial.problem.dtype)


def without_last_slice(weight: Tensor) -> Tensor:
    return with_value(weight, (slice(None), slice(-16, None), *[-1] * (weight.ndim - 2)), 0.0)


def coarser_operands(trial: Trial) -> Tensor:
    """An operand that lost bits on the way: bfloat16 called float16, tf32 called float32, and the like."""
    kept = {torch.float16: 2.0**8, torch.bfloat16: 2.0**5, torch.float32: 2.0**11}[trial.problem.dtype]
    mantissa, exponent = torch.frexp(trial.tensors["x"].double())
    return trial.compute({"x": torch.ldexp((mantissa * kept).round() / kept, exponent).to(trial.problem.dtype)})


def accumulated_in_storage_type(trial: Trial) -> Tensor:
    """A sum over taps and slices of 16 channels that is rounded after every term."""
    x, weight, conv = trial.tensors["x"].float(), trial.tensors["weight"].float(), trial.convolution
    y = trial.tensors["bias"].float()[:, None, None].expand(trial.correct.shape).to(trial.problem.dtype)
    for c in range(0, conv.c_in, 16):
        for r, s in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            tap = torch.zeros_like(weight[:, c : c + 16])
            tap[:, :, r, s] = weight[:, c : c + 16, r, s]
            y = (y.float() + F.conv2d(x[:, c : c + 16], tap, None, conv.stride, conv.padding)).to(trial.problem.dtype)
    return (y.float() + trial.tensors["residual"].float()).relu().to(trial.problem.dtype)


def truncated(trial: Trial) -> Tensor:
    """Rounded towards zero in place of to nearest."""
    exact = trial.expected[0].relu()
    nearest = exact.to(trial.problem.dtype)
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    return torch.where(nearest.double() > exact, below, nearest)


def pooled(trial: Trial, kernel: int, padding: int, *, shift: int = 0) -> Tensor:
    """Pooled over another window of the same stride, in an output of the right size."""
    conv, i = trial.convolution, trial.inputs.map(Tensor.float).tensors()
    _, _, height, width = trial.problem.out_shape
    y = F.conv2d(i["x"], i["weight"], i["bias"], conv.stride, conv.padding).relu()
    y = F.pad(y.roll((shift, shift), dims=(2, 3)), (0, 2, 0, 2))
    return F.max_pool2d(y, kernel, 2, padding)[:, :, :height, :width].to(trial.problem.dtype)


def mean_over_one_pixel_fewer(trial: Trial) -> Tensor:
    x = trial.tensors["x"].float()
    pixels = x[0, 0].numel()
    mean = (x.sum((2, 3)) / (pixels - 1)).to(trial.problem.dtype)
    return F.linear(mean.float(), trial.tensors["weight"].float(), trial.tensors["bias"].float()).to(
        trial.problem.dtype
    )


Defect = Callable[[Trial], Tensor]
ANY: dict[str, Defect] = {
    "zeros": lambda t: torch.zeros_like(t.correct),
    "constant": lambda t: torch.full_like(t.correct, float(t.correct.float().mean())),
    "nan-everywhere": lambda t: torch.full_like(t.correct, float("nan")),
    "nan-in-one-lane": lambda t: with_value(t.correct, (1, 3, ...), float("nan")),
    "inf-in-one-lane": lambda t: with_value(t.correct, (1, 3, ...), float("inf")),
    "channels-swapped": lambda t: swapped(t.correct),
    "images-swapped": lambda t: t.correct.flip(0),
    "one-value-slightly-off": one_value_slightly_off,
    "other-batch's-output": lambda t: t.compute({"x": make_inputs(t.problem, seed=1).tensors()["x"]}),
    "operands-rounded-coarser": coarser_operands,
    "wrong-shape": lambda t: t.correct[..., :1],
    "wrong-dtype": lambda t: t.correct.double(),
}
OF_A_CONVOLUTION: dict[str, Defect] = {
    "one-corner-pixel-wrong": lambda t: with_value(t.correct, (0, slice(None), 0, 0), t.correct[0, :, 0, 1])
}
# Not of a stem: a maximum over nine pixels is almost never negative.
OF_A_RELU: dict[str, Defect] = {"relu-dropped": lambda t: t.compute(relu=False)}
OF_A_RESIDUAL: dict[str, Defect] = {"relu-before-addition": relu_before_addition}
OF_A_BOTTLENECK: dict[str, Defect] = {
    "hidden-relu-dropped": lambda t: t.compute(hidden=lambda h: h),
    "hidden-channels-swapped": lambda t: t.compute(hidden=lambda h: swapped(h.relu())),
    "hidden-row-lost": lambda t: t.compute(hidden=lambda h: with_value(h.relu(), (0, slice(None), -1), 0.0)),
}
OF_A_STEM: dict[str, Defect] = {
    "pool-over-2x2": lambda t: pooled(t, 2, 0),
    "pool-window-shifted": lambda t: pooled(t, 3, 1, shift=1),
    "pool-not-padded": lambda t: pooled(t, 3, 0),
}
OF_A_HEAD: dict[str, Defect] = {
    "mean-lacks-a-pixel": lambda t: t.compute({"x": with_value(t.tensors["x"], (..., -1, -1), 0.0)}),
    "mean-divided-by-one-pixel-fewer": mean_over_one_pixel_fewer,
}


def with_changed(argument: str, change: Callable[[Tensor], Tensor], trial: Trial) -> Tensor:
    """The operator of a trial, one of whose arguments is changed."""
    return trial.compute({argument: change(trial.tensors[argument])})


def of_arguments(problem: Problem) -> dict[str, Defect]:
    """Each tensor the operator takes: dropped, its channels swapped, shifted by a pixel, its last slice of K lost."""
    found: dict[str, Defect] = {}
    for argument, shape in problem.shapes.items():
        changes: dict[str, Callable[[Tensor], Tensor]] = {"dropped": torch.zeros_like}
        if len(shape) > 1 or argument.endswith("weight"):
            changes["channels-swapped"] = swapped
        if argument.endswith("weight") and len(shape) > 1:
            changes["last-slice-lost"] = without_last_slice
            if shape[2:] not in ((), (1, 1)):
                changes["taps-transposed"] = lambda weight: weight.transpose(2, 3)
        elif len(shape) == 4 and not isinstance(problem, HeadProblem):
            changes["shifted"] = lambda tensor: tensor.roll(1, dims=3)
        for name, change in changes.items():
            found[f"{argument}-{name}"] = functools.partial(with_changed, argument, change)
    return found


OF_A_KIND: dict[str, dict[str, Defect]] = {
    "conv": {**OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_RESIDUAL},
    "projection": {**OF_A_CONVOLUTION, **OF_A_RELU},
    "bottleneck-residual": {**OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_RESIDUAL, **OF_A_BOTTLENECK},
    "bottleneck-projection": {**OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_BOTTLENECK},
    "bottleneck-no-shortcut": {**OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_BOTTLENECK},
    "stem": {**OF_A_CONVOLUTION, **OF_A_STEM},
    "head": OF_A_HEAD,
}
DEFECTS = {name: {**ANY, **of_arguments(problem), **OF_A_KIND[name]} for name, problem in ONE_OF_EACH.items()}


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_output_is_accepted(dtype: str, name: str) -> None:
    trial = make_trial(name, dtype)
    assert trial.failures(trial.correct) == []


@pytest.mark.mutant
@pytest.mark.parametrize(("name", "defect"), [(name, defect) for name in DEFECTS for defect in DEFECTS[name]])
def test_a_broken_output_is_refused(name: str, defect: str) -> None:
    for dtype in DTYPES:
        trial = make_trial(name, dtype)
        assert trial.failures(DEFECTS[name][defect](trial)) != [], dtype


@pytest.mark.mutant
@pytest.mark.parametrize("defect", [accumulated_in_storage_type, truncated])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_wrong_rounding_is_refused(dtype: str, defect: Defect) -> None:
    """Not in float32, where the order of the additions matters more than either."""
    trial = make_trial("conv", dtype)
    assert trial.failures(defect(trial)) != []


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions_round_as_the_oracle_says(name: str) -> None:
    """What a module without torch repeats of the rounding model is the same."""
    precision = PRECISIONS[name]
    assert precision.roundoff == UNIT_ROUNDOFF[precision.dtype]
    assert name == "fp32" or precision.network_floor == ROUNDING_RMS * precision.roundoff
