"""The error of an operator whose rounded weights are known: its mean shows sums that truncate or round now and then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.special import chdtri, stdtrit
from torch import Tensor, fx

from export.base.precision import Precision
from export.criteria.bounds import shared_variance
from export.criteria.explained import activations, allowed_error, float_arguments, laid_out, rounded, subnormal
from export.fusion.interpreter import computes
from export.fusion.nodes import constant
from export.fusion.program import FusedProgram
from kernels.rounding import MAX_RMS_Z, UNIT_ROUNDOFF, Rounding

_BY_CHANCE = 1e-6  # the share of right operators of few values that may be refused
_EXACT = 1e-9  # relative, of float64 sums in another order
_DRIFT = 4.9  # standard deviations of a mean, beyond which one in a million is


@dataclass(frozen=True)
class Beyond:
    """The error of an operator whose rounded weights are known, in units of what rounding explains beside them.

    Attributes:
        rms, peak: of z.
        values: how many of them are not exactly 0.
        drift: the mean of z away from zero.
        shared: the variance that the drift has from roundings inside the operator, which results share.
        scatter: what the drift may be, seen how much it differs between channels: where next to nothing is added to a
            shortcut, or a constant, all values of a channel are rounded alike.
        bias: what the drift may be with every draw: that of sums truncated after every 8 products, as on tensor cores,
            and that of results which become fewer the larger they are, so that more of them are rounded up than down.
    """

    rms: float
    peak: float
    values: int
    drift: float
    shared: float
    scatter: float
    bias: float

    def why_not(self, max_limit: float) -> str:
        found = why_not(self.rms, self.peak, rms_limit(self.values), max_limit, 0)
        limit = max(_DRIFT * (1 / max(self.values, 1) + self.shared) ** 0.5, self.scatter) + self.bias
        if found or abs(self.drift) <= limit:
            return found
        return (
            f"the mean error away from zero is {self.drift:.3g} times what rounding explains, the limit is {limit:.2g}"
        )


def beyond_weights(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    values: Mapping[str, Tensor],
    separate_addition: bool,
    y64: Tensor,
    pre: Tensor,
    every: bool,
) -> Beyond | None:
    """The error against the operator with the float64 weights, each rounded to the type.

    All values of an output channel share one rounding of its weights: of one channel, or few, one in nine is beyond the
    limit on the mean with nothing wrong. So that part is taken out of the error and out of what is allowed. It would
    also hide sums that are rounded to 16 bits now and then, which costs as much, and sums that are truncated, which
    draws all results towards 0. Looked at are the first images, as many as `y64` has: `every` one or as many as have
    _RESULTS results; and of these what has no activation but a ReLU behind it, which hides nothing of the sum that is
    rounded.
    """
    values = _first(values, node, len(y64))
    y, expected = values[node.name].double(), _with_weights(program, precision, node, values, precision.dtype)
    bare = node.meta.get("before_activation") is None and pre.shape == expected.shape  # a ReLU at most is behind it
    if not (bare or every):
        return None
    sigma = allowed_error(
        program,
        precision,
        node,
        values,
        separate_addition,
        expected if bare else pre,
        weights_too=False,
        truncates=not every,
    ).sigma
    live = (y != 0) | (expected != 0)
    if not every:  # such values are judged by who reads them
        live &= ~(subnormal(y, precision.dtype) & subnormal(expected, precision.dtype))
    count = int(torch.count_nonzero(live))
    if not count:
        return Beyond(0.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0)
    sign = expected.sign().float()
    z = torch.where(live, (y - expected).float() / sigma, 0.0)
    signed = z * sign
    read = {n: rounded(values[n.name], precision.dtype) for n in activations(node)}
    pull = torch.where(live, sign / sigma, 0.0) if bare else torch.zeros_like(sigma)
    shared = shared_variance(node.target, float_arguments(program, node, read), pull, Rounding(precision.roundoff))
    length = max(w[0].numel() for n in node.all_input_nodes if (w := constant(program.master, n)) is not None)
    return Beyond(
        (z.square().sum(dtype=torch.float64).item() / count) ** 0.5,
        z.abs().max().item(),
        count,
        signed.sum(dtype=torch.float64).item() / count,
        shared / count**2,
        _scatter(signed, live),
        length / 8 * UNIT_ROUNDOFF[torch.float32] / precision.roundoff + 4 * precision.roundoff,
    )


def same_weights(
    program: FusedProgram, precision: Precision, node: fx.Node, values: Mapping[str, Tensor], y64: Tensor
) -> bool:
    """Whether with the weights of float64 an operator is the captured one; else they are wrong, however rounded."""
    exact = _with_weights(program, precision, node, _first(values, node, len(y64)), torch.float64)
    return float((exact - y64).norm()) <= _EXACT * float(y64.norm())


def _first(values: Mapping[str, Tensor], node: fx.Node, count: int) -> dict[str, Tensor]:
    """What an operator read and computed of the first images."""
    rows = values[node.name].shape[:1]
    return {name: laid_out(value[:count] if value.shape[:1] == rows else value) for name, value in values.items()}


def _with_weights(
    program: FusedProgram, precision: Precision, node: fx.Node, values: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """What an operator makes in float64 of what it read, with its weights rounded to a type."""

    def value_of(n: fx.Node) -> Tensor:
        held = constant(program.master, n)
        value = rounded(values[n.name], precision.dtype) if held is None else rounded(held, dtype)
        return laid_out(value).double()

    result: Tensor = computes(node)(*fx.node.map_arg(node.args, value_of), **fx.node.map_arg(node.kwargs, value_of))
    return result


def _scatter(values: Tensor, live: Tensor) -> float:
    """What the mean of the live ones of [N, C, ...] may be once in a million times, each channel being one draw.

    Channels that are alike, as where they were repeated, are one.
    """
    others = [dim for dim in range(values.dim()) if dim != 1]
    totals = values.sum(others, dtype=torch.float64)
    sums, which = torch.unique(totals, return_inverse=True)
    counts = torch.zeros_like(sums).index_add(0, which, live.sum(others, dtype=torch.float32).double())
    sums = torch.zeros_like(sums).index_add(0, which, totals)
    total = counts.sum()
    channels = (total.square() / counts.square().sum()).item()  # as many of one size
    if channels < 2:
        return float("inf")
    deviation = (sums - sums.sum() / total * counts).square().sum().sqrt() / total
    return float(stdtrit(channels - 1, 1 - _BY_CHANCE / 2)) * (channels / (channels - 1)) ** 0.5 * deviation.item()


def rms_limit(values: int) -> float:
    """What the root mean square of z may be: with few values, the part that chance has in it is large."""
    return max(MAX_RMS_Z, float(chdtri(values, _BY_CHANCE) / values) ** 0.5) if values else MAX_RMS_Z


def why_not(rms: float, peak: float, rms_limit: float, max_limit: float, alive: int) -> str:
    """Why an operator fails, empty where it passes; `alive`: values that a ReLU should have made 0."""
    if alive:
        return f"{alive} values are not 0 where the ReLU's input is clearly negative"
    if not rms <= rms_limit:
        return f"rms error is {rms:.3g} times what rounding explains, the limit is {rms_limit:g}"
    if not peak <= max_limit:
        return f"largest error is {peak:.3g} times what rounding explains, the limit is {max_limit:g}"
    return ""
