"""What kind of error a wrong value is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from export.runtime.parity.checks import NAN, OVERFLOW, SATURATION, UNDERFLOW, WRONG, Fault


def fault_of(
    y: Tensor, expected: Tensor, z: Tensor | None, dtype: torch.dtype, weights: Iterable[Tensor] = (), kind: str = ""
) -> Fault:
    """Classify the worst element of a result that was refused.

    Args:
        y: what was computed.
        expected: what float64 makes of the same input.
        z: the error in units of what is allowed; None where `y` is not finite.
        dtype: the storage type.
        weights: what the operator multiplies with, before it was rounded to that type.
        kind: of the error, where it is known already.
    """
    limits = torch.finfo(dtype)
    if z is None:
        found, broken = (OVERFLOW, y.isinf()) if bool(y.isinf().any()) else (NAN, y.isnan())
        index = _place(torch.where(broken, expected.abs().nan_to_num(), -1.0))
        return Fault(kind or found, index, y[index].item(), expected[index].item())
    index = _place(z.nan_to_num(nan=torch.inf))
    got, wanted = y[index].item(), expected[index].item()
    found = WRONG
    if abs(got) >= limits.max:
        found = SATURATION
    elif (0 < abs(wanted) < limits.tiny and abs(got) <= limits.tiny) or any(flushed(w, dtype) for w in weights):
        found = UNDERFLOW
    return Fault(kind or found, index, got, wanted)


def quantised_fault_of(q: Tensor, expected: Tensor, zero_point: Tensor) -> Fault:
    """Classify the worst element of refused whole numbers of the type of their zero point."""
    limits, index = torch.iinfo(zero_point.dtype), _place((q - expected).abs())
    saturated = q[index].item() in {limits.min, limits.max} - {zero_point.item()}  # zeros are no sign of it
    return Fault(SATURATION if saturated else WRONG, index, q[index].item(), expected[index].item())


def _place(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))


def flushed(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding loses more of float64 values than it can where they are normal numbers of the type."""
    return bool((values.to(dtype).double() - values).norm() > torch.finfo(dtype).eps / 2 * values.norm())
