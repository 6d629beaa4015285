"""Inputs, the float64 oracle, and the criterion by which an operator's output equals it."""

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.config import ConvProblem

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# Root mean square of a rounding error, in units of roundoff times value.
ROUNDING_RMS = 0.41
MAX_RMS_Z = 1.6
MAX_Z = {torch.float16: 9.0, torch.bfloat16: 9.0, torch.float32: 16.0}
# Below this many sigma, ReLU must give an exact 0.
ZERO_BELOW_SIGMA = 8.0


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]

    def clone(self) -> "Inputs":
        return Inputs(
            self.x.clone(),
            self.weight.clone(),
            self.bias.clone(),
            None if self.residual is None else self.residual.clone(),
        )


def conv_arguments(problem: ConvProblem) -> dict:
    return {
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
        "groups": problem.groups,
        "relu": problem.relu,
    }


def make_inputs(problem: ConvProblem, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Normal x, bias and residual, weights that keep the variance, all in the problem's dtype and channels_last."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(problem).encode()) + seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return values.to(device=device, dtype=problem.dtype).contiguous(memory_format=layout)

    out_shape = (problem.batch, problem.c_out, problem.out_height, problem.out_width)
    return Inputs(
        x=normal(problem.batch, problem.c_in, problem.height, problem.width),
        weight=normal(problem.c_out, problem.c_in_per_group, *problem.kernel, scale=1 / math.sqrt(problem.gemm_k)),
        bias=normal(problem.c_out, scale=0.5),
        residual=normal(*out_shape) if problem.has_residual else None,
    )


def oracle(problem: ConvProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(value before the activation, its sigma), both float64.

    sigma^2 = u32^2 * max(1, K/2) * (conv(x^2, w^2) + b^2 + r^2) + (0.41 * u_out)^2 * pre^2

    The operands are exactly those the operator gets, so there is no term for their rounding.
    """
    x, weight, bias = (t.detach().cpu().double() for t in (inputs.x, inputs.weight, inputs.bias))
    residual = 0.0 if inputs.residual is None else inputs.residual.detach().cpu().double()
    hyper = (problem.stride, problem.padding, problem.dilation, problem.groups)
    pre = F.conv2d(x, weight, bias, *hyper) + residual
    power = F.conv2d(x.square(), weight.square(), bias.square(), *hyper) + residual**2
    accumulation = UNIT_ROUNDOFF[torch.float32] ** 2 * max(1.0, problem.gemm_k / 2) * power
    storage = (ROUNDING_RMS * UNIT_ROUNDOFF[problem.dtype]) ** 2 * pre.square()
    return pre, (accumulation + storage).sqrt()


def p1_failures(y: Tensor, problem: ConvProblem, inputs: Inputs) -> list[str]:
    """Every way in which y is not the operator's output for these inputs; empty if it is."""
    pre, sigma = oracle(problem, inputs)
    if y.shape != pre.shape or y.dtype != problem.dtype:
        return [f"output is {tuple(y.shape)} {y.dtype}, expected {tuple(pre.shape)} {problem.dtype}"]
    value = y.detach().cpu().double()
    if not bool(value.isfinite().all()):
        return [f"{int((~value.isfinite()).sum())} of {value.numel()} values are not finite"]
    error = (value - (pre.relu() if problem.relu else pre)).abs()
    z = torch.where(error == 0, 0.0, error / sigma)
    failures = []
    # Values that ReLU makes 0 have no error and would hide that of the others.
    active = pre >= -ZERO_BELOW_SIGMA * sigma if problem.relu else torch.ones_like(pre, dtype=torch.bool)
    rms_z = float(z[active].square().sum().div(active.sum().clamp(min=1)).sqrt())
    if not rms_z <= MAX_RMS_Z:
        failures.append(f"rms z is {rms_z:.3g}, expected at most {MAX_RMS_Z}")
    if not float(z.max()) <= MAX_Z[problem.dtype]:
        where = tuple(int(i) for i in torch.unravel_index(z.argmax(), z.shape))
        failures.append(
            f"max z is {float(z.max()):.3g} at {where}, expected at most {MAX_Z[problem.dtype]}:"
            f" got {float(value[where])}, oracle {float(pre[where])} before the activation"
        )
    if bool((value[~active] != 0).any()):
        failures.append("values that ReLU makes 0 are not exactly 0")
    return failures
