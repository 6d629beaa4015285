"""Calibrated ranges kept between exports, in a folder that nobody else can write to."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from pathlib import Path

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
            json.dump(ranges, stream)
        os.replace(stream.name, folder / f"{key}.json")
    except OSError as error:
        _LOG.debug("calibration not cached: %s", error)


def _folder() -> Path | None:
    """resnet-deploy/calibration in $XDG_CACHE_HOME or ~/.cache, where it is this user's own and closed to others."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "resnet-deploy" / "calibration"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = folder.lstat()
    except (OSError, RuntimeError) as error:
        _LOG.debug("calibration not cached: %s", error)
        return None
    if folder.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        _LOG.warning("%s is not private to this user (expected mode 0700): calibration not cached", folder)
        return None
    return folder
