"""Memory that was freed, back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return what lies free between living values: glibc keeps it, though no large tensor may fit into the holes.

    Whoever goes on to use as much pays for the pages again: it is for the end of a step. Nothing is done elsewhere.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
