"""Loads and stores, async copies, and atomics."""

from __future__ import annotations

import numpy as np

from tests.emulator.block import Block, instruction
from tests.emulator.program import Address, Instruction, Operand, vector
from tests.emulator.traffic import count_global, count_shared
from tests.emulator.values import UNSIGNED, Array, width

_KIND = r"(\.v[248])?\.([sub](8|16|32|64)|f32)"
_CACHES = r"(\.c[agsv]|\.nc|\.L[12]::\w+)*"


@instruction(r"ld\.param\.([sub](8|16|32|64)|f32)")
def _ld_param(block: Block, i: Instruction, mask: Array | None) -> None:
    address, size = i.args[1], width(i.parts[-1])
    assert isinstance(address, Address)
    start = block.program.parameters[address.base][0] + address.offset
    value = block.parameters[start : start + size].view(UNSIGNED[size])
    block.put(i.args[0], np.repeat(value, block.threads), mask)


@instruction(rf"ld\.(global|shared(::cta)?){_CACHES}{_KIND}")
def _ld(block: Block, i: Instruction, mask: Array | None) -> None:
    targets, size, threads = vector(i.args[0]), width(i.parts[-1]), block.selected(mask)
    address, total = block.addresses(i.args[1])[threads], size * len(targets)
    if i.parts[1] == "global":
        offset, view = block.load(address, total, block.warp[threads]), block.memory.views[size]
        if block.traffic is not None:
            count_global(block.traffic, i, address, total, block.warp[threads])
    else:
        offset, view = address, block.shared.views[size]
        block.shared.read(block.shared.cells(address, total), block.warp[threads])
        if block.traffic is not None:
            count_shared(block.traffic, i, address, total, threads)
    for k, target in enumerate(targets):
        value = np.zeros(block.threads, UNSIGNED[size])
        value[threads] = view[offset // size + k]
        block.put(target, value, mask)


@instruction(rf"st\.(global|shared(::cta)?){_CACHES}{_KIND}")
def _st(block: Block, i: Instruction, mask: Array | None) -> None:
    sources, size, threads = vector(i.args[1]), width(i.parts[-1]), block.selected(mask)
    address, total = block.addresses(i.args[0])[threads], size * len(sources)
    if i.parts[1] == "global":
        offset, view = block.store(address, total, block.warp[threads]), block.memory.views[size]
        if block.traffic is not None:
            count_global(block.traffic, i, address, total, block.warp[threads])
    else:
        offset, view = address, block.shared.views[size]
        _write_shared(block, i, address, total, threads)
    values = [block.bits(source, size)[threads] for source in sources]
    for k, value in enumerate(values):
        view[offset // size + k] = value
    if any((view[offset // size + k] != value).any() for k, value in enumerate(values)):
        block.defect("race: threads of one instruction store different values at one address")


def _write_shared(block: Block, i: Instruction, address: Array, size: int, threads: Array) -> None:
    block.shared.write(block.shared.cells(address, size), block.warp[threads])
    if block.traffic is not None:
        count_shared(block.traffic, i, address, size, threads)


def _matrices(block: Block, i: Instruction, address: Operand, count: int) -> tuple[Array, Array, list[Array]]:
    """Of ldmatrix and stmatrix: addresses, the lanes that give one, and of each matrix the halves' indices [T, 2]."""
    rows, used = block.addresses(address), np.nonzero(block.lane < 8 * count)[0]
    row, quad, first = block.lane // 4, block.lane % 4, block.warp * 32
    pair = np.arange(2)
    if "trans" in i.parts:
        halves = [(rows[(first + 8 * k + 2 * quad)[:, None] + pair] >> 1) + row[:, None] for k in range(count)]
    else:
        halves = [(rows[first + 8 * k + row] >> 1)[:, None] + 2 * quad[:, None] + pair for k in range(count)]
    return rows[used], used, halves


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def _ldmatrix(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    targets = vector(i.args[0])
    address, used, halves = _matrices(block, i, i.args[1], len(targets))
    block.shared.read(block.shared.cells(address, 16), block.warp[used])
    if block.traffic is not None:
        count_shared(block.traffic, i, address, 16, used)
    for target, index in zip(targets, halves, strict=True):
        block.put(target, block.shared.views[2][index].view(np.uint32)[:, 0], mask)


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def _stmatrix(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    sources = vector(i.args[1])
    address, used, halves = _matrices(block, i, i.args[0], len(sources))
    _write_shared(block, i, address, 16, used)
    values = [block.bits(source, 4)[:, None].view(np.uint16) for source in sources]
    for value, index in zip(values, halves, strict=True):
        block.shared.views[2][index] = value
    if any((block.shared.views[2][index] != value).any() for value, index in zip(values, halves, strict=True)):
        block.defect("race: threads of one instruction store different values at one address")


@instruction(r"cp\.async\.c[ag]\.shared\.global(\.L2::\w+)?")
def _cp_async(block: Block, i: Instruction, mask: Array | None) -> None:
    """Takes effect at the wait for it; until then what it overwrites is undefined."""
    size, threads = int(str(i.args[2]), 0), block.selected(mask)
    to, source = (block.addresses(arg)[threads] for arg in i.args[:2])
    given = block.bits(i.args[3], 4)[threads] if len(i.args) > 3 else np.full(len(threads), size)
    data = np.zeros((len(threads), size), np.uint8)
    reads = given > 0
    if reads.any():
        offset = block.load(source[reads], size, block.warp[threads[reads]])
        data[reads] = block.memory.data[offset[:, None] + np.arange(size)]
        data[np.arange(size) >= given[:, None]] = 0
    if block.traffic is not None:
        count_global(block.traffic, i, source[reads], size, block.warp[threads[reads]])
        count_shared(block.traffic, i, to, size, threads)
    cells = block.shared.cells(to, size)
    block.shared.start_arrival(cells, block.warp[threads])
    block.copies.append((cells, block.warp[threads], data.view(np.uint16)))


@instruction(r"cp\.async\.commit_group")
def _commit_copies(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    block.copy_groups.append(block.copies)
    block.copies = []


@instruction(r"cp\.async\.wait_group")
def _wait_copies(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    while len(block.copy_groups) > int(str(i.args[0])):
        for cells, warps, data in block.copy_groups.pop(0):
            block.shared.end_arrival(cells, warps)
            block.shared.views[2][cells] = data


@instruction(r"atom\.global\.(gpu|sys|cta)\.(acq_rel|relaxed)\.add\.u32")
def _atom(block: Block, i: Instruction, mask: Array | None) -> None:
    """Orders what comes before and after it, between blocks, if it is acq_rel and not of this block alone."""
    address, addend, before = block.addresses(i.args[1]), block.bits(i.args[2], 4), np.zeros(block.threads, np.uint32)
    for thread in block.selected(mask):
        warps = block.warp[thread : thread + 1]
        offset = int(block.load(address[thread : thread + 1], 4, warps)[0])
        for kind, detail in block.memory.offsets(address[thread : thread + 1], 4, True)[2]:
            block.defect(kind, detail)
        before[thread] = block.memory.views[4][offset // 4]
        block.memory.views[4][offset // 4] += addend[thread]
        if "acq_rel" in i.parts and "cta" not in i.parts:
            block.memory.exchange(offset, block.index, block.shared.epoch, int(warps[0]))
    block.put(i.args[0], before, mask)


@instruction(r"griddepcontrol\.wait")
def _wait_for_previous(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    block.waited = True


@instruction(r"griddepcontrol\.launch_dependents")
def _release_next(block: Block, i: Instruction, mask: Array | None) -> None:
    block.released = True
