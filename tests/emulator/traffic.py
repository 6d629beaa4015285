"""What the memory pipeline would see of a launch: sectors of global memory, wavefronts of shared memory."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from tests.emulator.program import Instruction
from tests.emulator.values import Array

Traffic = dict[tuple[str, str, str], Counter[str]]  # (space, opcode, line of source) -> requests and what they take


def new_traffic() -> Traffic:
    return defaultdict(Counter)


def count_global(traffic: Traffic, i: Instruction, address: Array, size: int, warps: Array) -> None:
    """Sectors of 32 bytes that each warp's request touches, and how few could hold its bytes."""
    counts = traffic["global", i.op, i.source]
    for warp in np.unique(warps):
        mine = address[warps == warp]
        counts["requests"] += 1
        counts["sectors"] += len(np.unique((mine[:, None] + np.arange(0, size, min(size, 4))) >> 5))
        counts["ideal"] += -(-len(np.unique(mine)) * size // 32)
        counts["bytes"] += len(mine) * size


def count_shared(traffic: Traffic, i: Instruction, address: Array, size: int, threads: Array) -> None:
    """Passes over the 32 banks; a request of more than 4 bytes per thread takes one for each part of the warp."""
    counts = traffic["shared", i.op, i.source]
    together = 32 // max(size // 4, 1)
    phases = threads // 32 * 32 + threads % 32 // together
    for phase in np.unique(phases):
        words = np.unique((address[phases == phase][:, None] >> 2) + np.arange(max(size // 4, 1)))
        counts["ideal"] += 1
        counts["wavefronts"] += int(np.bincount(words % 32).max())
