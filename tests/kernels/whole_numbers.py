"""Whole numbers as inputs, and the whole numbers that an operator makes of them, which every order of sums gives."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators.mean_linear import HeadProblem
from kernels.operators.registry import OPERATORS, Arguments
from kernels.problems import Problem
from tests.kernels.launching import composition

# By type: up to where it holds every whole number, the largest input and weight, and the weights of a filter that are
# not 0, so that no value of an operator goes beyond. A tensor core's 10 bits of a float32 operand hold them too.
EXACT = {torch.float32: (2**24, 8, 3, 400), torch.float16: (2**11, 2, 1, 48), torch.bfloat16: (2**8, 2, 1, 6)}
BENT: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "relu6": lambda v, _: F.relu6(v), "leaky_relu": lambda v, _: F.leaky_relu(v, 2.0),
    "prelu": lambda v, slope: v if slope is None else F.prelu(v, slope),
}  # fmt: skip


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


def expected_of(problem: Problem, inputs: Arguments[Tensor]) -> Tensor:
    """The whole numbers that the operator gives for whole numbers, which are many and within what its type holds."""
    wide = inputs.map(lambda tensor: tensor.cpu())
    exact = composition(problem.with_dtype(torch.float64), wide)
    activation = getattr(problem, "activation", "")
    if activation:
        slope = wide.tensors().get("slope")
        exact = BENT[activation](exact, None if slope is None else slope.double())
    assert bool((exact == exact.round()).all()) and exact.abs().max() <= EXACT[problem.dtype][0]
    assert (exact != 0).double().mean() > 0.2 and len(exact.unique()) > 5
    return exact.to(problem.dtype)
