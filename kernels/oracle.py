"""P1 for one operator: random inputs, the float64 oracle, and the criterion by which an output equals it.

What the tests hold every kernel to, and `scripts/tune.py` every configuration before it is timed.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.problems import BottleneckProblem, ConvProblem, HeadProblem, Problem, Projection, StemProblem

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# Root mean square of a rounding error, in units of roundoff times value.
ROUNDING_RMS = 0.41
MAX_RMS_Z = 1.6
MAX_Z = {torch.float16: 9.0, torch.bfloat16: 9.0, torch.float32: 16.0}
# Below this many sigma, ReLU must give an exact 0.
ZERO_BELOW_SIGMA = 8.0


@dataclass(frozen=True)
class Inputs:
    """The tensors of any problem: `residual` is a shortcut that is added as it is, `shortcut` one that is projected."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    expand_weight: Tensor | None = None
    expand_bias: Tensor | None = None
    residual: Tensor | None = None
    shortcut: Tensor | None = None
    shortcut_weight: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def clone(self) -> "Inputs":
        return Inputs(**{name: tensor.clone() for name, tensor in self.named().items()})

    def to(self, *arguments: Any) -> "Inputs":
        return Inputs(**{name: tensor.to(*arguments) for name, tensor in self.named().items()})

    def equal(self, other: "Inputs") -> bool:
        mine, others = self.named(), other.named()
        return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def operator_call(problem: Problem, inputs: Inputs) -> tuple[str, tuple[Any, ...]]:
    """The operator that computes `problem`, by name, and its positional arguments."""
    i = inputs
    if isinstance(problem, HeadProblem):
        return "mean_linear", (i.x, i.weight, i.bias)
    if isinstance(problem, StemProblem):
        conv = problem.conv
        return "conv2d_bias_relu_maxpool", (i.x, i.weight, i.bias, conv.stride, conv.padding)
    conv = problem.first if isinstance(problem, BottleneckProblem) else problem
    geometry = (conv.stride, conv.padding, conv.dilation)
    shortcut_stride = problem.projection.stride if problem.projection else (1, 1)
    if isinstance(problem, BottleneckProblem):
        shortcut = i.residual if i.shortcut is None else i.shortcut
        expand = (i.expand_weight, i.expand_bias, shortcut, i.shortcut_weight)
        return "conv2d_conv1x1_bias_act", (i.x, i.weight, i.bias, *expand, *geometry, shortcut_stride, problem.relu)
    if problem.projection:
        shortcuts = (i.shortcut, i.shortcut_weight)
        return "conv2d_projection_bias_act", (
            i.x,
            i.weight,
            i.bias,
            *shortcuts,
            *geometry,
            shortcut_stride,
            problem.relu,
        )
    return "conv2d_bias_act", (i.x, i.weight, i.bias, i.residual, *geometry, problem.groups, problem.relu)


def make_inputs(problem: Problem, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Normal activations and biases, weights that keep the variance, all in the problem's dtype and channels_last."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(problem).encode()) + seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return values.to(device=device, dtype=problem.dtype).contiguous(memory_format=layout)

    def weight(c_out: int, c_in: int, kernel: Sequence[int] = (1, 1)) -> Tensor:
        return normal(c_out, c_in, *kernel, scale=1 / math.sqrt(c_in * math.prod(kernel)))

    def of_convolution(conv: ConvProblem) -> dict[str, Tensor]:
        return {
            "x": normal(conv.batch, conv.c_in, conv.height, conv.width),
            "weight": weight(conv.c_out, conv.c_in_per_group, conv.kernel),
            "bias": normal(conv.c_out, scale=0.5),
        }

    if isinstance(problem, HeadProblem):
        return Inputs(
            x=normal(problem.batch, problem.c_in, problem.height, problem.width),
            weight=normal(problem.c_out, problem.c_in, scale=1 / math.sqrt(problem.c_in)),
            bias=normal(problem.c_out, scale=0.5),
        )
    if isinstance(problem, StemProblem):
        return Inputs(**of_convolution(problem.conv))
    tensors = of_convolution(problem.first if isinstance(problem, BottleneckProblem) else problem)
    c_out = problem.c_out
    if isinstance(problem, BottleneckProblem):
        tensors["expand_weight"] = weight(c_out, problem.first.c_out)
        tensors["expand_bias"] = normal(c_out, scale=0.5)
    if problem.has_residual:
        tensors["residual"] = normal(*problem.out_shape)
    if projection := problem.projection:
        tensors["shortcut"] = normal(problem.batch, projection.c_in, projection.height, projection.width)
        tensors["shortcut_weight"] = weight(c_out, projection.c_in)
    return Inputs(**tensors)


def oracle(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(value before the last activation, its sigma), both float64.

    sigma^2 = u32^2 * max(1, K/2) * sum of squared terms + (0.41 * u_out)^2 * pre^2

    over the terms of the convolution, of its projection, the bias and the residual; K counts the projection's channels.
    The operands are exactly those the operator gets, so there is no term for their rounding. A value in between (the
    first convolution of a bottleneck, the mean of a head) has a sigma_h of this form itself, which adds
    sum of sigma_h^2 * weight^2 where it is active. A maximum has the sigma of the pixel that it is taken from.
    """
    i = Inputs(**{name: tensor.detach().cpu().double() for name, tensor in inputs.named().items()})
    if isinstance(problem, HeadProblem):
        ones = torch.full((1, 1, problem.height, problem.width), 1 / (problem.height * problem.width)).double()
        pixels = i.x.flatten(0, 1)[:, None]
        mean, sigma_mean = (t.view(i.x.shape[:2]) for t in _convolution(problem.dtype, pixels, ones))
        columns = (i.weight[:, :, None, None], i.bias)
        pre, sigma = _convolution(problem.dtype, mean[:, :, None, None], *columns, sigma_x=sigma_mean[:, :, None, None])
        return pre.flatten(1), sigma.flatten(1)
    if isinstance(problem, StemProblem):
        pre, sigma = _convolution(problem.dtype, i.x, i.weight, i.bias, conv=problem.conv)
        pooled, where = F.max_pool2d(pre, 3, 2, 1, return_indices=True)
        return pooled, sigma.flatten(2).gather(2, where.flatten(2)).view(pooled.shape)
    if isinstance(problem, BottleneckProblem):
        assert i.expand_weight is not None
        hidden, sigma_hidden = _convolution(problem.dtype, i.x, i.weight, i.bias, conv=problem.first)
        return _convolution(
            problem.dtype,
            hidden.relu(),
            i.expand_weight,
            i.expand_bias,
            sigma_x=sigma_hidden * (hidden > 0),
            added=i,
            projection=problem.projection,
        )
    return _convolution(problem.dtype, i.x, i.weight, i.bias, conv=problem, added=i, projection=problem.projection)


def _convolution(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    conv: ConvProblem | None = None,
    sigma_x: Tensor | None = None,
    added: Inputs | None = None,
    projection: Projection | None = None,
) -> tuple[Tensor, Tensor]:
    """(a convolution with the shortcut in `added`, its sigma); without `conv` of stride 1 and no padding."""
    hyper = (conv.stride, conv.padding, conv.dilation, conv.groups) if conv else ()
    reduction = math.prod(weight.shape[1:])
    pre = F.conv2d(x, weight, bias, *hyper)
    power = F.conv2d(x.square(), weight.square(), None if bias is None else bias.square(), *hyper)
    if added is not None and projection is not None:
        assert added.shortcut is not None and added.shortcut_weight is not None
        pre = pre + F.conv2d(added.shortcut, added.shortcut_weight, None, projection.stride)
        power = power + F.conv2d(added.shortcut.square(), added.shortcut_weight.square(), None, projection.stride)
        reduction += projection.c_in
    if added is not None and added.residual is not None:
        pre, power = pre + added.residual, power + added.residual.square()
    variance = UNIT_ROUNDOFF[torch.float32] ** 2 * max(1.0, reduction / 2) * power
    variance = variance + (ROUNDING_RMS * UNIT_ROUNDOFF[dtype]) ** 2 * pre.square()
    if sigma_x is not None:
        variance = variance + F.conv2d(sigma_x.square(), weight.square(), None, *hyper)
    return pre, variance.sqrt()


def has_relu(problem: Problem) -> bool:
    """Whether the operator's last step keeps positive values only; a maximum over such values does."""
    return isinstance(problem, StemProblem) or (not isinstance(problem, HeadProblem) and problem.relu)


def p1_failures(
    y: Tensor, problem: Problem, inputs: Inputs, expected: tuple[Tensor, Tensor] | None = None
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
    relu = has_relu(problem)
    error = (value - (pre.relu() if relu else pre)).abs()
    z = torch.where(error == 0, 0.0, error / sigma)
    failures = []
    # Values that ReLU makes 0 have no error and would hide that of the others.
    active = pre >= -ZERO_BELOW_SIGMA * sigma if relu else torch.ones_like(pre, dtype=torch.bool)
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
