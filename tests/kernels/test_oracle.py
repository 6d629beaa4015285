"""The comparator accepts a correct output and refuses every output that is broken on purpose."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.config import ConvProblem
from tests.kernels.conv_cases import DTYPES
from tests.kernels.oracle import MAX_Z, Inputs, make_inputs, oracle, p1_failures

PROBLEM = ConvProblem(2, 64, 10, 9, 48, (3, 3), (2, 2), (1, 1), has_residual=True, relu=True)


@dataclass(frozen=True)
class Trial:
    problem: ConvProblem
    inputs: Inputs
    correct: Tensor

    def compute(self, relu: bool = True, **changes: object) -> Tensor:
        """The operator in float32, rounded once, with some of its inputs or hyperparameters replaced."""
        given = {"x": self.inputs.x, "weight": self.inputs.weight, "bias": self.inputs.bias}
        given |= {"residual": self.inputs.residual, "padding": self.problem.padding} | changes
        x, weight, bias, residual = (given[name].float() for name in ("x", "weight", "bias", "residual"))
        y = F.conv2d(x, weight, bias, self.problem.stride, given["padding"]) + residual
        return (y.relu() if relu else y).to(self.problem.dtype)


def make_trial(dtype: torch.dtype) -> Trial:
    problem = replace(PROBLEM, dtype=dtype)
    inputs = make_inputs(problem)
    trial = Trial(problem, inputs, torch.empty(0))
    return replace(trial, correct=trial.compute())


def with_value(y: Tensor, index: tuple[int, ...], value: Tensor | float) -> Tensor:
    changed = y.clone()
    changed[index] = value
    return changed


def swap_channels(trial: Trial) -> Tensor:
    order = list(range(trial.problem.c_out))
    order[0], order[1] = 1, 0
    return trial.correct[:, order]


def wrong_corner_pixel(trial: Trial) -> Tensor:
    return with_value(trial.correct, (0, slice(None), 0, 0), trial.correct[0, :, 0, 1])


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


def stride_phase_off_by_one(trial: Trial) -> Tensor:
    return trial.compute(x=trial.inputs.x.roll(1, dims=3))


def padding_with_the_edge(trial: Trial) -> Tensor:
    return trial.compute(x=F.pad(trial.inputs.x.float(), (1, 1, 1, 1), mode="replicate"), padding=(0, 0))


def coarser_operands(trial: Trial) -> Tensor:
    """An operand that lost bits on the way: bfloat16 called float16, tf32 called float32, and the like."""
    kept = {torch.float16: 2.0**8, torch.bfloat16: 2.0**5, torch.float32: 2.0**11}[trial.problem.dtype]
    mantissa, exponent = torch.frexp(trial.inputs.x.double())
    return trial.compute(x=torch.ldexp((mantissa * kept).round() / kept, exponent))


def accumulated_in_storage_type(trial: Trial) -> Tensor:
    """A sum over taps and slices of 16 channels that is rounded after every term."""
    x, weight = trial.inputs.x.float(), trial.inputs.weight.float()
    y = trial.inputs.bias.float()[:, None, None].expand(trial.correct.shape).to(trial.problem.dtype)
    for c in range(0, trial.problem.c_in, 16):
        for r, s in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            tap = torch.zeros_like(weight[:, c : c + 16])
            tap[:, :, r, s] = weight[:, c : c + 16, r, s]
            term = F.conv2d(x[:, c : c + 16], tap, None, trial.problem.stride, trial.problem.padding)
            y = (y.float() + term).to(trial.problem.dtype)
    return (y.float() + trial.inputs.residual.float()).relu().to(trial.problem.dtype)


def truncated(trial: Trial) -> Tensor:
    """Rounded towards zero in place of to nearest."""
    exact = oracle(trial.problem, trial.inputs)[0].relu()
    nearest = exact.to(trial.problem.dtype)
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    return torch.where(nearest.double() > exact, below, nearest)


BROKEN: dict[str, Callable[[Trial], Tensor]] = {
    "zeros": lambda trial: torch.zeros_like(trial.correct),
    "constant": lambda trial: torch.full_like(trial.correct, float(trial.correct.float().mean())),
    "nan-everywhere": lambda trial: torch.full_like(trial.correct, float("nan")),
    "nan-in-one-lane": lambda trial: with_value(trial.correct, (1, 3, 2, 1), float("nan")),
    "inf-in-one-lane": lambda trial: with_value(trial.correct, (1, 3, 2, 1), float("inf")),
    "channels-swapped": swap_channels,
    "images-swapped": lambda trial: trial.correct.flip(0),
    "one-corner-pixel-wrong": wrong_corner_pixel,
    "one-value-slightly-off": one_value_slightly_off,
    "other-batch's-output": lambda trial: trial.compute(x=make_inputs(trial.problem, seed=1).x),
    "residual-dropped": lambda trial: trial.compute(residual=torch.zeros_like(trial.inputs.residual)),
    "bias-dropped": lambda trial: trial.compute(bias=torch.zeros_like(trial.inputs.bias)),
    "relu-dropped": lambda trial: trial.compute(relu=False),
    "relu-before-addition": relu_before_addition,
    "last-k-slice-lost": last_k_slice_lost,
    "tap-transposed": tap_transposed,
    "stride-phase-off-by-one": stride_phase_off_by_one,
    "padding-with-the-edge": padding_with_the_edge,
    "operands-rounded-coarser": coarser_operands,
    "wrong-shape": lambda trial: trial.correct[:, :, :, :1],
    "wrong-dtype": lambda trial: trial.correct.double(),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_output_is_accepted(dtype: str) -> None:
    trial = make_trial(DTYPES[dtype])
    assert p1_failures(trial.correct, trial.problem, trial.inputs) == []


@pytest.mark.parametrize("defect", BROKEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_output_is_refused(dtype: str, defect: str) -> None:
    trial = make_trial(DTYPES[dtype])
    broken = BROKEN[defect](trial)
    assert p1_failures(broken, trial.problem, trial.inputs) != []


@pytest.mark.parametrize("defect", [accumulated_in_storage_type, truncated])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_wrong_rounding_is_refused(dtype: str, defect: Callable[[Trial], Tensor]) -> None:
    """Not in float32, where the order of the additions matters more than either."""
    trial = make_trial(DTYPES[dtype])
    assert p1_failures(defect(trial), trial.problem, trial.inputs) != []
