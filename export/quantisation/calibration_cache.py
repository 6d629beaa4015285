"""Calibrated ranges kept between exports, in a folder that nobody else can write to."""

from __future__ import annotations

import math

from export.base.private_cache import Records
from export.quantisation.scheme import Range


def read(key: str) -> dict[str, Range] | None:
    """What `write` kept under `key`; None where there is nothing, or nothing sound."""
    try:
        ranges = {
            str(name): (float(low), float(high)) for name, (low, high) in Records("calibration").read(key).items()
        }
    except (ValueError, OverflowError, TypeError, AttributeError):
        return None
    sound = all(math.isfinite(low) and math.isfinite(high) and low <= high for low, high in ranges.values())
    return ranges if sound else None


def write(key: str, ranges: dict[str, Range]) -> None:
    """Keep `ranges` under `key`."""
    Records("calibration").write(key, ranges)
