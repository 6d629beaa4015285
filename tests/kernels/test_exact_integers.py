"""Whole numbers add up exactly in any order: every operator agrees with integer arithmetic, without a tolerance."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS
from kernels.operators.mean_linear import HeadProblem
from kernels.operators.registry import OPERATORS, Arguments
from kernels.problems import Problem
from tests.kernels.cases import CASES, DTYPES, ONE_OF_EACH, SMALL
from tests.kernels.launching import composition, launch, on_device, operator, quick_config

# By type: up to where it holds every whole number, the largest input and weight, and the weights of a filter that are
# not 0, so that no value of an operator goes beyond. A tensor core's 10 bits of a float32 operand hold them too.
EXACT = {torch.float32: (2**24, 8, 3, 400), torch.float16: (2**11, 2, 1, 48), torch.bfloat16: (2**8, 2, 1, 6)}
ODD = ("conv c_in-13-1x1", "conv depthwise-multiplier-2", "conv dilation-2", "conv kernel-5x2-stride-1x3",
       "projection tails-everywhere", "bottleneck tails-everywhere", "stem 13-20-3x3-no-padding")  # fmt: skip
HEAD = HeadProblem(5, 70, 4, 4, 33)  # of 16 pixels: a mean over 49 is rounded however whole it is
BENT: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "relu6": lambda v, _: F.relu6(v), "leaky_relu": lambda v, _: F.leaky_relu(v, 2.0),
    "prelu": lambda v, slope: v if slope is None else F.prelu(v, slope),
}  # fmt: skip
PROBLEMS: dict[str, Problem] = {**ONE_OF_EACH, **{name: CASES[name] for name in ODD}, "head": HEAD} | {
    name: replace(SMALL, relu=False, activation=name, negative_slope=2.0 * (name == "leaky_relu")) for name in BENT
}


def integers(problem: Problem, device: torch.device) -> Arguments[Tensor]:
    """The operator's arguments; each filter has as many weights as keep its sums exact, each anywhere in K."""
    _, most, weight, terms = EXACT[problem.dtype]
    generator = torch.Generator().manual_seed(zlib.crc32(repr(problem).encode()))

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        summed = name.endswith("weight") and len(shape) > 1  # else a factor for each channel: nothing adds up
        size = weight if summed else most
        values = torch.randint(-size, size + 1, shape, generator=generator)
        if summed:
            order = torch.rand(shape, generator=generator).flatten(1).argsort(1).argsort(1)
            values = torch.where(order.reshape(shape) < terms, values, 0)
        if isinstance(problem, HeadProblem) and name == "x":
            values[..., 0, 0] -= values.sum((2, 3)) % (problem.height * problem.width)  # a mean that is whole
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return values.to(device, problem.dtype).contiguous(memory_format=layout)

    tensors = {name: draw(name, shape) for name, shape in problem.shapes.items()}
    return OPERATORS[problem.operator](**tensors, **problem.settings)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operator_agrees_with_integer_arithmetic(dtype: str, name: str, device: torch.device) -> None:
    """In its reference and in its kernels, in few large tiles and as a GPU's rule chooses them."""
    problem = PROBLEMS[name].with_dtype(DTYPES[dtype])
    inputs = integers(problem, device)
    exact = composition(problem.with_dtype(torch.float64), inputs.map(Tensor.cpu))
    if name in BENT:
        slope = inputs.tensors().get("slope")
        exact = BENT[name](exact, None if slope is None else slope.cpu().double())
    assert bool((exact == exact.round()).all()) and exact.abs().max() <= EXACT[problem.dtype][0]
    assert (exact != 0).double().mean() > 0.2 and len(exact.unique()) > 5
    expected = exact.to(problem.dtype)
    assert torch.equal(operator(inputs).cpu(), expected)
    for config in (quick_config(problem), heuristic_config(problem, TARGETS["sm_90"])):
        assert torch.equal(launch(problem, inputs, on_device(config, device)).cpu(), expected), config
