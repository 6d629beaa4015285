"""The comparator accepts a correct output and refuses every output that is broken on purpose."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.oracle import MAX_Z, Inputs, make_inputs, operator_call, oracle, p1_failures
from kernels.problems import BottleneckProblem, ConvProblem, HeadProblem, Problem, StemProblem, with_dtype
from tests.kernels.cases import DTYPES, projected

_CONV = ConvProblem(2, 32, 10, 9, 40, (3, 3), (2, 2), (1, 1), has_residual=True, relu=True)
_FIRST = replace(_CONV, has_residual=False)
PROBLEMS: dict[str, Problem] = {
    "conv": _CONV,
    "projection": projected(_CONV, 80, (2, 2), beyond=1),
    "bottleneck-residual": BottleneckProblem(_FIRST, 64, has_residual=True, relu=True),
    "bottleneck-projection": BottleneckProblem(
        _FIRST, 64, projection=projected(_FIRST, 80, (2, 2), beyond=1).projection, relu=True
    ),
    "stem": StemProblem(replace(_FIRST, c_in=3, height=21, width=23, kernel=(7, 7), padding=(3, 3))),
    "head": HeadProblem(5, 70, 7, 7, 33),
}


@dataclass(frozen=True)
class Trial:
    problem: Problem
    inputs: Inputs
    correct: Tensor

    def compute(self, relu: bool = True, problem: Problem | None = None, **changes: Tensor | None) -> Tensor:
        """The operator in float32, rounded as it does, with some of its inputs or hyperparameters replaced."""
        y = compute(problem or self.problem, replace(self.inputs, **changes), relu)
        return y.to(self.problem.dtype)

    @property
    def conv(self) -> ConvProblem:
        """The convolution of x."""
        if isinstance(self.problem, BottleneckProblem):
            return self.problem.first
        if isinstance(self.problem, StemProblem):
            return self.problem.conv
        assert isinstance(self.problem, ConvProblem)
        return self.problem


def compute(problem: Problem, inputs: Inputs, relu: bool = True) -> Tensor:
    """Written out once more, independently of the operators' references."""
    i = inputs.to(torch.float32)
    if isinstance(problem, HeadProblem):
        return F.linear(i.x.mean((2, 3)).to(problem.dtype).float(), i.weight, i.bias)
    if isinstance(problem, StemProblem):
        y = F.conv2d(i.x, i.weight, i.bias, problem.conv.stride, problem.conv.padding)
        return F.max_pool2d(y.relu() if relu else y, 3, 2, 1)
    if isinstance(problem, BottleneckProblem):
        y = F.conv2d(i.x, i.weight, i.bias, problem.first.stride, problem.first.padding)
        y = F.conv2d(y.relu().to(problem.dtype).float(), i.expand_weight, i.expand_bias)
    else:
        y = F.conv2d(i.x, i.weight, i.bias, problem.stride, problem.padding)
    if problem.projection:
        y = y + F.conv2d(i.shortcut, i.shortcut_weight, None, problem.projection.stride)
    if i.residual is not None:
        y = y + i.residual
    return y.relu() if relu else y


@functools.cache
def make_trial(name: str, dtype: str) -> Trial:
    problem = with_dtype(PROBLEMS[name], DTYPES[dtype])
    inputs = make_inputs(problem)
    trial = Trial(problem, inputs, torch.empty(0))
    return replace(trial, correct=trial.compute())


def with_value(y: Tensor, index: tuple[int | slice, ...], value: Tensor | float) -> Tensor:
    changed = y.clone()
    changed[index] = value
    return changed


def swapped(tensor: Tensor, axis: int) -> Tensor:
    """The first two channels along an axis change places."""
    order = torch.arange(tensor.shape[axis])
    order[:2] = torch.tensor([1, 0])
    return tensor.index_select(axis, order)


def one_value_slightly_off(trial: Trial) -> Tensor:
    """The largest value, off by a few roundings: well under 1 % in float16."""
    pre, sigma = oracle(trial.problem, trial.inputs)
    index = tuple(int(i) for i in torch.unravel_index(pre.argmax(), pre.shape))
    return with_value(trial.correct, index, pre[index] + 1.5 * MAX_Z[trial.problem.dtype] * sigma[index])


def relu_before_addition(trial: Trial) -> Tensor:
    no_residual = trial.compute(residual=torch.zeros_like(trial.inputs.residual)).float()
    return (no_residual + trial.inputs.residual.float()).to(trial.problem.dtype)


def last_k_slice_lost(trial: Trial) -> Tensor:
    weight = trial.inputs.weight.clone()
    weight[:, -16:, -1, -1] = 0
    return trial.compute(weight=weight)


def tap_transposed(trial: Trial) -> Tensor:
    weight = trial.inputs.weight.clone()
    weight[:, :, 0, 1], weight[:, :, 1, 0] = trial.inputs.weight[:, :, 1, 0], trial.inputs.weight[:, :, 0, 1]
    return trial.compute(weight=weight)


def padding_with_the_edge(trial: Trial) -> Tensor:
    (pad_h, pad_w), x = trial.conv.padding, trial.inputs.x.float()
    x = F.pad(x, (pad_w, pad_w, pad_h, pad_h), mode="replicate").to(trial.problem.dtype)
    unpadded = replace(trial.conv, height=x.shape[2], width=x.shape[3], padding=(0, 0))
    problem: Problem = unpadded
    if isinstance(trial.problem, BottleneckProblem):
        problem = replace(trial.problem, first=unpadded)
    if isinstance(trial.problem, StemProblem):
        problem = StemProblem(unpadded)
    return trial.compute(problem=problem, x=x)


def coarser_operands(trial: Trial) -> Tensor:
    """An operand that lost bits on the way: bfloat16 called float16, tf32 called float32, and the like."""
    kept = {torch.float16: 2.0**8, torch.bfloat16: 2.0**5, torch.float32: 2.0**11}[trial.problem.dtype]
    mantissa, exponent = torch.frexp(trial.inputs.x.double())
    return trial.compute(x=torch.ldexp((mantissa * kept).round() / kept, exponent).to(trial.problem.dtype))


def accumulated_in_storage_type(trial: Trial) -> Tensor:
    """A sum over taps and slices of 16 channels that is rounded after every term."""
    x, weight, conv = trial.inputs.x.float(), trial.inputs.weight.float(), trial.conv
    y = trial.inputs.bias.float()[:, None, None].expand(trial.correct.shape).to(trial.problem.dtype)
    for c in range(0, conv.c_in, 16):
        for r, s in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            tap = torch.zeros_like(weight[:, c : c + 16])
            tap[:, :, r, s] = weight[:, c : c + 16, r, s]
            y = (y.float() + F.conv2d(x[:, c : c + 16], tap, None, conv.stride, conv.padding)).to(trial.problem.dtype)
    return (y.float() + trial.inputs.residual.float()).relu().to(trial.problem.dtype)


def truncated(trial: Trial) -> Tensor:
    """Rounded towards zero in place of to nearest."""
    exact = oracle(trial.problem, trial.inputs)[0].relu()
    nearest = exact.to(trial.problem.dtype)
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    return torch.where(nearest.double() > exact, below, nearest)


def shortcut_phase_off_by_one(trial: Trial) -> Tensor:
    return trial.compute(shortcut=trial.inputs.shortcut.roll(-1, dims=3))


def last_shortcut_slice_lost(trial: Trial) -> Tensor:
    weight = trial.inputs.shortcut_weight.clone()
    weight[:, -16:] = 0
    return trial.compute(shortcut_weight=weight)


def hidden_of(trial: Trial, relu: bool = True) -> Tensor:
    i = trial.inputs.to(torch.float32)
    hidden = F.conv2d(i.x, i.weight, i.bias, trial.conv.stride, trial.conv.padding)
    return (hidden.relu() if relu else hidden).to(trial.problem.dtype)


def from_hidden(trial: Trial, hidden: Tensor) -> Tensor:
    """The second convolution of a bottleneck on what the first is claimed to have given."""
    assert isinstance(trial.problem, BottleneckProblem)
    i = trial.inputs
    second = replace(i, x=hidden, weight=i.expand_weight, bias=i.expand_bias)
    return compute(trial.problem.second, second).to(trial.problem.dtype)


def one_hidden_row_lost(trial: Trial) -> Tensor:
    return from_hidden(trial, with_value(hidden_of(trial), (0, slice(None), -1), 0.0))


def convolved(trial: Trial) -> Tensor:
    i = trial.inputs.to(torch.float32)
    return F.conv2d(i.x, i.weight, i.bias, trial.conv.stride, trial.conv.padding).relu()


def pooled(trial: Trial, kernel: int, padding: int, *, shift: int = 0) -> Tensor:
    """Pooled over another window of the same stride, in an output of the right size."""
    _, _, height, width = trial.problem.out_shape
    y = F.pad(convolved(trial).roll((shift, shift), dims=(2, 3)), (0, 2, 0, 2))
    return F.max_pool2d(y, kernel, 2, padding)[:, :, :height, :width].to(trial.problem.dtype)


def mean_off_by_one_pixel(trial: Trial) -> Tensor:
    return trial.compute(x=with_value(trial.inputs.x, (..., -1, -1), 0.0))


def mean_over_one_pixel_fewer(trial: Trial) -> Tensor:
    x = trial.inputs.x.float()
    pixels = x[0, 0].numel()
    mean = (x.sum((2, 3)) / (pixels - 1)).to(trial.problem.dtype)
    return F.linear(mean.float(), trial.inputs.weight.float(), trial.inputs.bias.float()).to(trial.problem.dtype)


def neighbour_at_the_corner(trial: Trial) -> Tensor:
    return with_value(trial.correct, (0, slice(None), 0, 0), trial.correct[0, :, 0, 1])


Defect = Callable[[Trial], Tensor]
ANY: dict[str, Defect] = {
    "zeros": lambda trial: torch.zeros_like(trial.correct),
    "constant": lambda trial: torch.full_like(trial.correct, float(trial.correct.float().mean())),
    "nan-everywhere": lambda trial: torch.full_like(trial.correct, float("nan")),
    "nan-in-one-lane": lambda trial: with_value(trial.correct, (1, 3, ...), float("nan")),
    "inf-in-one-lane": lambda trial: with_value(trial.correct, (1, 3, ...), float("inf")),
    "channels-swapped": lambda trial: swapped(trial.correct, 1),
    "images-swapped": lambda trial: trial.correct.flip(0),
    "one-value-slightly-off": one_value_slightly_off,
    "other-batch's-output": lambda trial: trial.compute(x=make_inputs(trial.problem, seed=1).x),
    "bias-dropped": lambda trial: trial.compute(bias=torch.zeros_like(trial.inputs.bias)),
    "operands-rounded-coarser": coarser_operands,
    "wrong-shape": lambda trial: trial.correct[..., :1],
    "wrong-dtype": lambda trial: trial.correct.double(),
}
OF_A_CONVOLUTION: dict[str, Defect] = {
    "one-corner-pixel-wrong": neighbour_at_the_corner,
    "tap-transposed": tap_transposed,
    "stride-phase-off-by-one": lambda trial: trial.compute(x=trial.inputs.x.roll(1, dims=3)),
    "padding-with-the-edge": padding_with_the_edge,
    "last-k-slice-lost": last_k_slice_lost,
}
# Not of a stem: a maximum over nine pixels is almost never negative.
OF_A_RELU: dict[str, Defect] = {"relu-dropped": lambda trial: trial.compute(relu=False)}
OF_A_RESIDUAL: dict[str, Defect] = {
    "residual-dropped": lambda trial: trial.compute(residual=torch.zeros_like(trial.inputs.residual)),
    "relu-before-addition": relu_before_addition,
}
OF_A_PROJECTION: dict[str, Defect] = {
    "projection-dropped": lambda trial: trial.compute(shortcut=torch.zeros_like(trial.inputs.shortcut)),
    "projection-channels-swapped": lambda trial: trial.compute(shortcut=swapped(trial.inputs.shortcut, 1)),
    "shortcut-phase-off-by-one": shortcut_phase_off_by_one,
    "last-shortcut-slice-lost": last_shortcut_slice_lost,
}
OF_A_BOTTLENECK: dict[str, Defect] = {
    "hidden-relu-dropped": lambda trial: from_hidden(trial, hidden_of(trial, relu=False)),
    "hidden-channels-swapped": lambda trial: from_hidden(trial, swapped(hidden_of(trial), 1)),
    "hidden-row-lost": one_hidden_row_lost,
    "expand-bias-dropped": lambda trial: trial.compute(expand_bias=torch.zeros_like(trial.inputs.expand_bias)),
}
OF_A_STEM: dict[str, Defect] = {
    "pool-over-2x2": lambda trial: pooled(trial, 2, 0),
    "pool-window-shifted": lambda trial: pooled(trial, 3, 1, shift=1),
    "pool-not-padded": lambda trial: pooled(trial, 3, 0),
}
OF_A_HEAD: dict[str, Defect] = {
    "mean-lacks-a-pixel": mean_off_by_one_pixel,
    "mean-divided-by-one-pixel-fewer": mean_over_one_pixel_fewer,
    "input-channels-swapped": lambda trial: trial.compute(x=swapped(trial.inputs.x, 1)),
}
DEFECTS: dict[str, dict[str, Defect]] = {
    "conv": {**ANY, **OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_RESIDUAL},
    "projection": {**ANY, **OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_PROJECTION},
    "bottleneck-residual": {**ANY, **OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_RESIDUAL, **OF_A_BOTTLENECK},
    "bottleneck-projection": {**ANY, **OF_A_CONVOLUTION, **OF_A_RELU, **OF_A_PROJECTION, **OF_A_BOTTLENECK},
    "stem": {**ANY, **OF_A_CONVOLUTION, **OF_A_STEM},
    "head": {**ANY, **OF_A_HEAD},
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_output_is_accepted(dtype: str, name: str) -> None:
    trial = make_trial(name, dtype)
    assert p1_failures(trial.correct, trial.problem, trial.inputs) == []


@pytest.mark.parametrize(("name", "defect"), [(name, defect) for name in PROBLEMS for defect in DEFECTS[name]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_output_is_refused(dtype: str, name: str, defect: str) -> None:
    trial = make_trial(name, dtype)
    broken = DEFECTS[name][defect](trial)
    assert p1_failures(broken, trial.problem, trial.inputs) != []


@pytest.mark.parametrize("defect", [accumulated_in_storage_type, truncated])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_wrong_rounding_is_refused(dtype: str, defect: Defect) -> None:
    """Not in float32, where the order of the additions matters more than either."""
    trial = make_trial("conv", dtype)
    assert p1_failures(defect(trial), trial.problem, trial.inputs) != []


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_operator_call_is_complete(name: str) -> None:
    """Every input reaches the operator; none twice."""
    problem = PROBLEMS[name]
    inputs = make_inputs(problem)
    tensors = [argument for argument in operator_call(problem, inputs)[1] if isinstance(argument, Tensor)]
    assert sorted(map(id, tensors)) == sorted(map(id, inputs.named().values()))
