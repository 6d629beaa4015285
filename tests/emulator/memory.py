"""Global memory: allocations with guards between them, and who wrote what in which order.

Cells of 2 bytes know whether they were ever written and, of this launch, the block, warp and epoch (barriers so far) of
their last write. A block may see what another wrote only through an acq_rel atomic that follows it on both sides.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from tests.emulator.values import UNSIGNED, Array

_BASE = 0x7F00_0000_0000
_GUARD = 4096
_READ, _WRITE = 1, 2


class Arrival(NamedTuple):
    """What a block released by an atomic, and when another acquired it: epochs and warps of both."""

    released: int
    releaser: int
    acquired: int
    acquirer: int


class Memory:
    """The memory of one launch: `room` bytes for `allocate`."""

    def __init__(self, room: int) -> None:
        size = -(-room // _GUARD) * _GUARD + _GUARD
        self.data = np.zeros(size, np.uint8)
        self.views = {width: self.data.view(kind) for width, kind in UNSIGNED.items()}
        cells = size // 2
        self.access, self.written = np.zeros(cells, np.uint8), np.zeros(cells, bool)
        self.writer = np.zeros(cells, np.int32)  # block + 1; 0 is none in this launch
        self.warp, self.epoch = np.zeros(cells, np.int16), np.zeros(cells, np.int32)
        self.atomics: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)  # address -> block -> (epoch, warp)
        self.known: dict[int, dict[int, Arrival]] = defaultdict(dict)  # block -> block that it is ordered after
        self._top, self._names = _GUARD, [(0, _GUARD, "null")]

    @staticmethod
    def room(sizes: list[int]) -> int:
        """What allocations of these sizes take."""
        return sum(-(-size // _GUARD) * _GUARD + _GUARD for size in sizes)

    def allocate(self, name: str, content: Array, writable: bool, written: bool) -> int:
        """The address of a copy of `content`, flat bytes; not `written`: reading it before writing is a defect."""
        start, end = self._top, self._top + content.size
        cells = slice(start // 2, -(-end // 2))
        self.access[cells] = _WRITE if writable else _READ
        self.written[cells] = written
        self.data[start:end] = content
        self._names.append((start, end, name))
        self._top = -(-end // _GUARD) * _GUARD + _GUARD
        return _BASE + start

    def read(self, address: int, size: int) -> tuple[Array, Array]:
        """(bytes, whether each of them was written)."""
        start = address - _BASE
        return self.data[start : start + size], self.written[np.arange(start, start + size) >> 1]

    def name(self, offset: int) -> str:
        start, end, name = max(entry for entry in self._names if entry[0] <= offset)
        return f"{name}+{offset - start} of {end - start}"

    def offsets(self, address: Array, size: int, writing: bool) -> tuple[Array, Array, list[tuple[str, str]]]:
        """(offsets [n], cells [n, k], defects) of accesses of `size` bytes; offsets are -1 where nothing is near."""
        offset, found = address.astype(np.int64) - _BASE, []
        if bool(((offset < 0) | (offset >= self.data.size - size)).any()):
            return offset, offset, [("fatal: global access far out of bounds", hex(int(address.max())))]
        if bool((offset % size).any()):
            return offset, offset, [("fatal: misaligned global access", f"{size} bytes")]
        cells = (offset[:, None] >> 1) + np.arange(max(size // 2, 1))
        access = self.access[cells]
        for bad, kind in ((access == 0, "global access out of bounds"), (access == _READ, "write to an input")):
            if bad.any() and (writing or kind != "write to an input"):
                found.append((kind, self.name(int(offset[bad.any(1)][0]))))
        return offset, cells, found

    def is_ordered(self, cells: Array, warps: Array, block: int, epoch: int) -> bool:
        """Whether a block's warps [n] may touch what other blocks wrote into `cells` [n, k]."""
        writer = self.writer[cells]
        foreign = (writer > 0) & (writer != block + 1)
        if not foreign.any():
            return True
        acquirers = np.broadcast_to(warps[:, None], cells.shape)[foreign]
        others, epochs, writers = writer[foreign] - 1, self.epoch[cells][foreign], self.warp[cells][foreign]
        for other in np.unique(others):
            arrival, mine = self.known[block].get(int(other)), others == other
            if arrival is None:
                return False
            # A barrier, or the same warp, between the store and the release, and between the acquisition and this.
            before = (epochs < arrival.released) | ((epochs == arrival.released) & (writers == arrival.releaser))
            after = (epoch > arrival.acquired) | (acquirers == arrival.acquirer)
            if not (before & after)[mine].all():
                return False
        return True

    def other_warp_wrote(self, cells: Array, warps: Array, block: int, epoch: int) -> bool:
        """Whether another warp of the block did so since the last barrier."""
        own = (self.writer[cells] == block + 1) & (self.epoch[cells] == epoch)
        return bool((own & (self.warp[cells] != warps[:, None])).any())

    def note_write(self, cells: Array, warps: Array, block: int, epoch: int) -> None:
        self.written[cells], self.writer[cells] = True, block + 1
        self.epoch[cells], self.warp[cells] = epoch, warps[:, None]

    def exchange(self, address: int, block: int, epoch: int, warp: int) -> None:
        """An acq_rel atomic: this block is ordered after all whose atomics on that address came before."""
        for other, (released, releaser) in self.atomics[address].items():
            self.known[block][other] = Arrival(released, releaser, epoch, warp)
        self.atomics[address][block] = (epoch, warp)
