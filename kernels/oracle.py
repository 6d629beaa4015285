"""P1 for one operator: random inputs, the float64 oracle, and the criterion by which an output equals it.

What the tests hold every kernel to, and `scripts/tune.py` every configuration before it is timed.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.operators.registry import OPERATORS, Arguments
from kernels.problems import Problem
from kernels.rounding import MAX_RMS_Z, MAX_Z, UNIT_ROUNDOFF, ZERO_BELOW_SIGMA, Rounding


def make_inputs(problem: Problem, device: torch.device | str = "cpu", seed: int = 0) -> Arguments[Tensor]:
    """The arguments of the operator that computes `problem`, in its dtype and channels_last.

    Normal activations and biases, weights that keep the variance.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(repr(problem).encode()) + seed)

    def normal(name: str, shape: tuple[int, ...]) -> Tensor:
        scale = (
            1 / math.sqrt(math.prod(shape[1:])) if name.endswith("weight") else 0.5 if name.endswith("bias") else 1.0
        )
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return values.to(device=device, dtype=problem.dtype).contiguous(memory_format=layout)

    tensors: dict[str, Any] = {name: normal(name, shape) for name, shape in problem.shapes.items()}
    return OPERATORS[problem.operator](**tensors, **problem.settings)


def oracle(problem: Problem, inputs: Arguments[Tensor]) -> tuple[Tensor, Tensor]:
    """(value before the last activation, the result's sigma as rounding.py explains it), both float64.

    The operands are exactly those the operator gets, so there is no term for their rounding.
    """
    exact = inputs.map(lambda tensor: tensor.detach().cpu().double())
    pre = exact.before_activation()
    rounding = Rounding(UNIT_ROUNDOFF[problem.dtype], dtype=torch.float64)
    return exact.pool(pre), exact.bound(pre, rounding).sigma


def p1_failures(
    y: Tensor, problem: Problem, inputs: Arguments[Tensor], expected: tuple[Tensor, Tensor] | None = None
) -> list[str]:
    """Every way in which y is not the operator's output for these inputs; empty if it is.

    `expected` is `oracle(problem, inputs)`, for whoever checks several outputs of the same inputs.
    """
    pre, sigma = expected or oracle(problem, inputs)
    if y.shape != pre.shape or y.dtype != problem.dtype:
        return [f"output is {tuple(y.shape)} {y.dtype}, expected {tuple(pre.shape)} {problem.dtype}"]
    value = y.detach().cpu().double()
    if not bool(value.isfinite().all()):
        return [f"{int((~value.isfinite()).sum())} of {value.numel()} values are not finite"]
    y64 = inputs.map(lambda tensor: tensor.detach().cpu().double()).activated(pre)
    # Values that an activation makes 0 have no error and would hide that of the others.
    active = pre >= -ZERO_BELOW_SIGMA * sigma if problem.relu else (y64 != 0) | (value != 0)
    return Deviation.of(value, y64, sigma, active).failures(problem.dtype)


@dataclass(frozen=True)
class Deviation:
    """How far values are from the exact ones, in units of what rounding explains.

    Attributes:
        rms_z: of those that are not exactly 0 behind an activation.
        max_z: of all.
        where: the worst.
        got, expected: there.
        wrong_zeros: how many are not 0 though an activation makes them.
        active: how many `rms_z` is of.
    """

    rms_z: float
    max_z: float
    where: tuple[int, ...]
    got: float
    expected: float
    wrong_zeros: int
    active: int

    @classmethod
    def of(cls, value: Tensor, y64: Tensor, sigma: Tensor, active: Tensor) -> "Deviation":
        """Of finite values, one at least; `active` are those that an activation has not made 0."""
        error = (value - y64).abs()
        z = torch.where(error == 0, 0.0, error / sigma)
        rms_z = float(z[active].square().sum().div(active.sum().clamp(min=1)).sqrt())
        where = tuple(int(i) for i in torch.unravel_index(z.argmax(), z.shape))
        wrong_zeros = int((value[~active] != 0).sum())
        return cls(rms_z, float(z.max()), where, float(value[where]), float(y64[where]), wrong_zeros, int(active.sum()))

    def failures(self, dtype: torch.dtype, rms_limit: float = MAX_RMS_Z) -> list[str]:
        """Why it is more than rounding, a line each; empty if it is not."""
        failures = []
        if not self.rms_z <= rms_limit:
            failures.append(f"rms z is {self.rms_z:.3g}, expected at most {rms_limit:.3g}")
        if not self.max_z <= MAX_Z[dtype]:
            failures.append(
                f"max z is {self.max_z:.3g} at {self.where}, expected at most {MAX_Z[dtype]}:"
                f" got {self.got}, expected {self.expected}"
            )
        if self.wrong_zeros:
            failures.append("values that ReLU makes 0 are not exactly 0")
        return failures
