"""Calibrated ranges kept between exports, in a folder that nobody else can write to."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from pathlib import Path

from export.base.errors import ExportError
from export.base.private_cache import private_folder
from export.quantisation.scheme import Range

_LOG = logging.getLogger(__name__)


def read(key: str) -> dict[str, Range] | None:
    """What `write` kept under `key`; None where there is nothing, or nothing sound."""
    folder = _folder()
    if folder is None:
        return None
    try:
        record = json.loads((folder / f"{key}.json").read_bytes())
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in record.items()}
    except (OSError, ValueError, OverflowError, TypeError, AttributeError, RecursionError):
        return None
    sound = all(math.isfinite(low) and math.isfinite(high) and low <= high for low, high in ranges.values())
    return ranges if sound else None


def write(key: str, ranges: dict[str, Range]) -> None:
    """Keep `ranges` under `key`. A cache that cannot be written is not worth an error."""
    folder = _folder()
    if folder is None:
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as stream:
            try:
                json.dump(ranges, stream)
                stream.flush()
                os.replace(stream.name, folder / f"{key}.json")
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        _LOG.debug("calibration not cached: %s", error)


def _folder() -> Path | None:
    """The private folder of calibrations, None where there cannot be one."""
    try:
        return private_folder("calibration")
    except ExportError as error:
        _LOG.warning("%s: calibration not cached", error)
    except (OSError, RuntimeError) as error:
        _LOG.debug("calibration not cached: %s", error)
    return None
