"""Places in one allocation for buffers that do not all live at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.runtime.engines.kernel_plan import ALIGNMENT


@dataclass(frozen=True)
class Buffer:
    """Bytes that hold something from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int

    @property
    def room(self) -> int:
        """Its size in whole units of ALIGNMENT."""
        return -(-max(self.size, 1) // ALIGNMENT) * ALIGNMENT

    def meets(self, other: Buffer) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Where buffers lie.

    Attributes:
        offsets: in bytes, in the order of the buffers.
        size: of the allocation.
        live: the largest sum of buffers that live at the same time: no arena is smaller.
        all: of all buffers: what they would take without reuse.
    """

    offsets: tuple[int, ...]
    size: int
    live: int
    all: int


def plan_arena(buffers: Sequence[Buffer], start: int = 0) -> Arena:
    """Places for `buffers` behind the first `start` bytes, a multiple of ALIGNMENT: `size` includes them, `live` not.

    The largest first, each into the smallest gap that holds it between those which it meets, as in Pisarchyk and Lee,
    "Efficient Memory Management for Deep Neural Net Inference", 2020 (greedy by size).
    """
    offsets: dict[int, int] = {}
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].room, buffers[i].first)):
        buffer = buffers[index]
        taken = sorted((offsets[i], offsets[i] + buffers[i].room) for i in offsets if buffers[i].meets(buffer))
        best, end = None, start
        for low, high in taken:
            gap = low - end
            if gap >= buffer.room and (best is None or gap < best[1]):
                best = (end, gap)
            end = max(end, high)
        offsets[index] = end if best is None else best[0]
    steps = {buffer.first for buffer in buffers}
    live = max((sum(b.room for b in buffers if b.first <= step <= b.last) for step in steps), default=0)
    size = max((offsets[i] + buffers[i].room for i in offsets), default=start)
    return Arena(tuple(offsets[i] for i in range(len(buffers))), size, live, sum(b.room for b in buffers))
