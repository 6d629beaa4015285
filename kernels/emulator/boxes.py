"""TMA: boxes of tensors loaded into shared memory, the mbarriers that count them, the fence between the proxies.

A load takes effect at the wait for its mbarrier; until then what it overwrites is undefined.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from kernels.emulator.block import Block, instruction
from kernels.emulator.program import Address, Instruction
from kernels.emulator.report import Stopped
from kernels.emulator.tensor_cores import swizzled
from kernels.emulator.values import UNSIGNED, Array

_FORMAT, _MAGIC, _MOST_AXES = "<8sQiii5q5q5i", b"EMULATED", 5
_SWIZZLES = (0, 32, 64, 128)  # bytes, of a tensor map


@dataclass(frozen=True)
class TensorMap:
    """What a CUtensorMap says of a tensor, outermost axis first; strides in elements."""

    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def pack(self) -> bytes:
        """128 bytes, as a kernel gets them."""
        filler = [0] * (_MOST_AXES - len(self.shape))
        axes = [value for sizes in (self.shape, self.strides, self.box) for value in (*sizes, *filler)]
        return struct.pack(_FORMAT, _MAGIC, self.address, self.itemsize, self.swizzle, len(self.shape), *axes)

    @classmethod
    def unpack(cls, data: bytes) -> TensorMap:
        """Raises ValueError for what `pack` has not made."""
        magic, address, itemsize, swizzle, rank, *axes = struct.unpack(_FORMAT, data.ljust(128, b"\0"))
        if magic != _MAGIC:
            raise ValueError("expected a tensor map")
        shape, strides, box = (tuple(axes[at : at + rank]) for at in range(0, 3 * _MOST_AXES, _MOST_AXES))
        return cls(address, itemsize, shape, strides, box, swizzle)

    def faults(self) -> list[str]:
        """What a driver refuses."""
        found, line = [], self.box[-1] * self.itemsize
        outer = self.strides[:-1]
        if self.address % 16 or any(stride * self.itemsize % 16 for stride in outer) or self.strides[-1] != 1:
            found.append("TMA: address or strides are no multiples of 16 bytes")
        if max(self.box) > 256 or line % 16 or (self.swizzle and line > _SWIZZLES[self.swizzle]):
            found.append("TMA: box beyond the limits")
        return found


@dataclass
class Barrier:
    """An mbarrier: phases passed, arrivals per phase, arrivals and bytes that this one still lacks, its first epoch."""

    phase: int
    count: int
    missing: int
    missing_bytes: int
    epoch: int

    def turn(self) -> None:
        if not self.missing and not self.missing_bytes:
            self.phase, self.missing = self.phase + 1, self.count


@dataclass(frozen=True)
class BoxLoad:
    """One under way: the mbarrier's address, and which bytes of shared memory become what."""

    barrier: int
    places: Array
    data: Array


def _barrier(block: Block, address: int) -> Barrier:
    if address not in block.barriers:
        block.defect("an mbarrier that is not initialised")
        raise Stopped
    return block.barriers[address]


@instruction(r"mbarrier\.(init|inval)\.shared(::cta)?\.b64")
def _init_inval(block: Block, i: Instruction, mask: Array | None) -> None:
    for thread in block.selected(mask):
        address, warp = block.addresses(i.args[0])[thread : thread + 1], block.warp[thread : thread + 1]
        at = int(address[0])
        block.shared.write(block.shared.cells(address, 8), warp)
        if i.parts[1] == "inval":
            _barrier(block, at)
            del block.barriers[at]
            if any(load.barrier == at for load in block.box_loads):
                block.defect("mbarrier.inval while a TMA load will complete on it")
        else:
            count = int(block.bits(i.args[1], 4)[thread])
            block.barriers[at] = Barrier(0, count, count, 0, block.shared.epoch)


@instruction(r"mbarrier\.arrive(\.expect_tx)?\.shared(::cta)?\.b64")
def _arrive(block: Block, i: Instruction, mask: Array | None) -> None:
    for thread in block.selected(mask):
        barrier = _barrier(block, int(block.addresses(i.args[1])[thread]))
        if barrier.epoch == block.shared.epoch and block.warp[thread]:
            block.defect("race: mbarrier used by another warp than initialised it, no barrier between")
        if "expect_tx" in i.parts:
            barrier.missing_bytes += int(block.bits(i.args[2], 4)[thread])
        barrier.missing -= 1
        barrier.turn()


@instruction(r"mbarrier\.try_wait\.parity\.shared(::cta)?\.b64")
def _try_wait(block: Block, i: Instruction, mask: Array | None) -> None:
    threads = block.selected(mask)
    (address,), (parity,) = (
        np.unique(values[threads]) for values in (block.addresses(i.args[1]), block.bits(i.args[2], 4))
    )
    barrier = _barrier(block, int(address))
    for load in [load for load in block.box_loads if load.barrier == address]:
        block.box_loads.remove(load)
        block.shared.end_arrival(np.unique(load.places >> 1), None)
        block.shared.views[1][load.places] = load.data
        barrier.missing_bytes -= load.places.size
        barrier.turn()
    if barrier.phase & 1 == parity:
        block.defect("deadlock: nothing under way completes this mbarrier's phase")
        raise Stopped
    block.put(i.args[0], np.ones(block.threads, bool), mask)


@instruction(r"fence\.proxy\.async(\.shared::cta)?")
def _fence(block: Block, i: Instruction, mask: Array | None) -> None:
    block.shared.fence_proxies()


@instruction(r"cp\.async\.bulk\.tensor\.[1-5]d\.shared::c(ta|luster)\.global\.mbarrier::complete_tx::bytes")
def _load(block: Block, i: Instruction, mask: Array | None) -> None:
    source = i.args[1]
    assert isinstance(source, Address)
    descriptors, places, barriers = (block.addresses(arg) for arg in (source, i.args[0], i.args[2]))
    corners = np.stack([block.get(coordinate, "s32") for coordinate in reversed(source.coordinates)], 1)
    for thread in block.selected(mask):
        start = int(descriptors[thread])
        try:
            described = TensorMap.unpack(block.parameters[start : start + 128].tobytes())
        except ValueError:
            block.defect("TMA through something that is no descriptor")
            raise Stopped from None
        if len(described.shape) != len(source.coordinates):
            block.defect(f"TMA of {i.parts[4]} boxes from a tensor of {len(described.shape)} axes")
            raise Stopped
        warp = block.warp[thread : thread + 1]
        _load_box(block, described, int(places[thread]), int(barriers[thread]), corners[thread], warp)


def _load_box(block: Block, tensor: TensorMap, to: int, barrier: int, corner: Array, warp: Array) -> None:
    """Puts a load of the box at `corner` under way; elements outside the tensor are 0."""
    swizzle = _SWIZZLES[tensor.swizzle]
    for fault in tensor.faults():
        block.defect(fault, str(tensor))
    if to % max(8 * swizzle, 128):
        block.defect("TMA: destination not aligned to its swizzle pattern", str(to))
    inside, offset = np.ones(tensor.box, bool), np.zeros(tensor.box, np.int64)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.strides, strict=True)):
        index = (int(corner[axis]) + np.arange(tensor.box[axis])).reshape([-1] + [1] * (len(tensor.box) - axis - 1))
        inside &= (index >= 0) & (index < size)
        offset += index * stride
    data = np.zeros(tensor.box, UNSIGNED[tensor.itemsize])
    if inside.any():
        address = tensor.address + offset[inside] * tensor.itemsize
        here = block.load(address, tensor.itemsize, np.repeat(warp, address.size))
        data[inside] = block.memory.views[tensor.itemsize][here // tensor.itemsize]
    places = swizzled(to + np.arange(math.prod(tensor.box) * tensor.itemsize), swizzle)
    if places.max() >= block.shared.size:
        block.defect("TMA beyond shared memory")
        raise Stopped
    cells = np.unique(places >> 1).reshape(1, -1)
    block.shared.start_arrival(cells, warp)
    if block.shared.generic_writes[cells].any() or block.shared.generic_reads[cells].any():
        block.defect("TMA overwrites what the generic proxy touched, no fence.proxy.async since")
    _barrier(block, barrier)
    if block.shared.generic_writes[barrier >> 1]:
        block.defect("note: mbarrier.init not fenced before TMA uses it")
    block.box_loads.append(BoxLoad(barrier, places, data.reshape(-1).view(np.uint8)))
