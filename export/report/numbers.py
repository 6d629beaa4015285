"""Numbers as the report writes them."""

from __future__ import annotations

import math
from typing import TypeGuard


def is_finite(value: float | None) -> TypeGuard[float]:
    """parity.json has null for what is not finite."""
    return value is not None and math.isfinite(value)


def number(value: float | None, form: str) -> str:
    """In `form`, as format() takes it."""
    return format(value, form) if is_finite(value) else "∞"


def short(value: float | None) -> str:
    """With three digits or more: for numbers of any size."""
    if not is_finite(value):
        return "∞"
    if 100 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}" if value == 0 or 0.001 <= abs(value) < 1e6 else f"{value:.1e}"


def percent(share: float | None) -> str:
    """With three digits."""
    return f"{100 * share:.3g} %" if is_finite(share) else "∞"


def size(count: int) -> str:
    """Bytes in units of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
