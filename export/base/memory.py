"""Memory that was freed: kept for what comes next, or back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGE = (2**27, 2**25)  # bytes: older versions take no more than the second
_KEPT = 2**30


def give_back() -> None:
    """Return what lies free between living values: glibc keeps it, though no large tensor may fit into the holes.

    Whoever goes on to use as much pays for the pages again: it is for the end of a step. Nothing is done elsewhere.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep() -> None:
    """Keep what this process frees for its next values, up to a gigabyte, or until it is given back.

    glibc returns it as soon as the end of its memory is free, and the system clears each page again: for every second
    result of an operator. It is for a program's beginning. Nothing is done elsewhere.
    """
    option = _of_glibc("mallopt")
    if option is not None and any(option(_MMAP_THRESHOLD, size) for size in _LARGE):
        option(_TRIM_THRESHOLD, _KEPT)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None  # musl has none
