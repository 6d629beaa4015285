"""Shared memory of one block, with a race detector.

Cells of 2 bytes know the epoch (barriers so far) and warp of their last write and reads: two warps in one epoch, one of
them writing, are a race. They also know what is under way: async copies and TMA loads into them, wgmmas that read them,
and what the generic proxy touched since its last fence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator.report import Stopped
from tests.emulator.values import UNDEFINED, UNSIGNED, Array

_SEVERAL = -2  # warps that read a cell
TMA = -3  # in place of a warp: whoever waited on the mbarrier is ordered after it


class SharedMemory:
    """`size` bytes; `defect` is told what goes wrong."""

    def __init__(self, size: int, defect: Callable[[str], None]) -> None:
        self.size, self._defect = size, defect
        words = np.full(max(size, 16) // 4 + 4, UNDEFINED & 0xFFFFFFFF, np.uint32)
        self.views = {width: words.view(kind) for width, kind in UNSIGNED.items() if width <= 4} | {
            8: words[: words.size // 2 * 2].view(np.uint64)
        }
        cells = words.size * 2
        self.epoch = 0
        self.written, self.writer = np.full(cells, -1, np.int32), np.zeros(cells, np.int16)
        self._read, self._reader = np.full(cells, -1, np.int32), np.zeros(cells, np.int16)
        self.arriving = np.zeros(cells, bool)  # of an async copy or TMA load under way
        self.computing = np.zeros(cells, np.int16)  # wgmmas under way that read it
        self.generic_writes, self.generic_reads = np.zeros(cells, bool), np.zeros(cells, bool)  # since the last fence

    def cells(self, address: Array, size: int) -> Array:
        """[n, k] cells of accesses of `size` bytes at [n] addresses, which are within bounds and aligned."""
        if bool(((address < 0) | (address + size > self.size)).any()):
            self._defect("shared memory out of bounds")
            raise Stopped
        if bool((address % size).any()):
            self._defect("misaligned access to shared memory")
            raise Stopped
        cells: Array = (address[:, None] >> 1) + np.arange(max(size // 2, 1))
        return cells

    def read(self, cells: Array, warps: Array) -> None:
        """Checks that warps [n] may read cells [n, k] now, and notes it."""
        warp = np.broadcast_to(warps[:, None], cells.shape)
        if self.arriving[cells].any():
            self._defect("read of shared memory under an async copy")
        if (self.written[cells] < 0).any():
            self._defect("read of shared memory nobody wrote")
        if ((self.written[cells] == self.epoch) & (self.writer[cells] != warp)).any():
            self._defect("race: read after write in shared memory, no barrier between")
        foreign = (self._read[cells] == self.epoch) & (self._reader[cells] != warp)
        self._read[cells], self._reader[cells] = self.epoch, warp
        self._reader[cells[(self._reader[cells] != warp) | foreign]] = _SEVERAL
        self.generic_reads[cells] = True

    def check_write(self, cells: Array, warps: Array) -> None:
        """Checks that warps [n] may write cells [n, k] now, or let something asynchronous do so."""
        warp = np.broadcast_to(warps[:, None], cells.shape)
        if self.arriving[cells].any():
            self._defect("write to shared memory under an async copy")
        if self.computing[cells].any():
            self._defect("race: write to shared memory that a wgmma under way reads")
        for epoch, last, what in ((self.written, self.writer, "write"), (self._read, self._reader, "read")):
            if ((epoch[cells] == self.epoch) & (last[cells] != warp)).any():
                self._defect(f"race: write after {what} in shared memory, no barrier between")

    def note_write(self, cells: Array, warps: Array) -> bool:
        """Notes a write through the generic proxy; whether several warps wrote a cell."""
        self.written[cells], self.writer[cells] = self.epoch, warps[:, None]
        self.generic_writes[cells] = True
        return bool((self.writer[cells] != warps[:, None]).any())

    def write(self, cells: Array, warps: Array) -> None:
        self.check_write(cells, warps)
        if self.note_write(cells, warps):
            self._defect("note: several warps write one cell of shared memory in one instruction")

    def start_arrival(self, cells: Array, warps: Array) -> None:
        """An async copy or TMA load is under way: what it overwrites is no longer there."""
        self.check_write(cells, warps)
        self.arriving[cells] = True
        self.views[2][cells] = UNDEFINED & 0xFFFF

    def end_arrival(self, cells: Array, warps: Array | None) -> None:
        """It is complete: a copy for the warps [n] that waited, a TMA load (None) for all behind its mbarrier."""
        self.arriving[cells] = False
        if warps is None:
            self.written[cells], self.writer[cells] = max(self.epoch - 1, 0), TMA
        elif self.note_write(cells, warps):
            self._defect("race: async copies of several warps to one cell")

    def read_by_wgmma(self, cells: Array) -> None:
        """Checks that a wgmma may read them, through the async proxy, from now until `computing` is taken back."""
        if self.arriving[cells].any():
            self._defect("wgmma reads shared memory under a TMA load or async copy")
        if (self.written[cells] < 0).any():
            self._defect("wgmma reads shared memory nobody wrote")
        if ((self.written[cells] == self.epoch) & (self.writer[cells] != TMA)).any():
            self._defect("race: wgmma reads what was written since the last barrier")
        if self.generic_writes[cells].any():
            self._defect("wgmma reads what the generic proxy wrote, no fence.proxy.async since")
        self.computing[cells] += 1

    def fence_proxies(self) -> None:
        self.generic_writes[:] = self.generic_reads[:] = False
