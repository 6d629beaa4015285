"""How long work says where it is, and not too often."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str], None]
_SECONDS = 15.0


def silent(step: str) -> None:
    """Says nothing."""


def sparsely(progress: Progress) -> Progress:
    """`progress`, called at most every 15 seconds, the first time after that long."""
    said = time.perf_counter()

    def say(step: str) -> None:
        nonlocal said
        if time.perf_counter() - said >= _SECONDS:
            said = time.perf_counter()
            progress(step)

    return say
