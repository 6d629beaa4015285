"""Matrix products of warps (mma) and, asynchronously, of groups of four (wgmma): 16-bit operands, float32 sums.

A product and its addition are exact and rounded once. What a wgmma reads, it reads at the wait for it; until then its
accumulators are undefined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.emulator.block import Block, instruction
from kernels.emulator.program import Instruction, Operand, vector
from kernels.emulator.report import Stopped
from kernels.emulator.values import UNDEFINED, Array, decode

_G, _T, _PAIR = np.arange(32) // 4, np.arange(32) % 4, np.arange(2)
_SWIZZLES = {1: 128, 2: 64, 3: 32}  # bytes, of a wgmma's matrix descriptor


def swizzled(address: Array, width: int) -> Array:
    """Bytes' places in shared memory: 16-byte chunks permuted, in patterns that repeat in absolute addresses."""
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4) if width else address


def _operand(block: Block, registers: tuple[str, ...], kind: str, down: bool) -> Array:
    """[warps, 16, 16] of a left operand in registers; `down` [warps, 16, 8] of a right one."""
    values = np.stack([decode(block.bits(r, 4)[:, None].view(np.uint16), kind) for r in registers])
    count = len(registers)
    n = np.arange(count)[:, None, None]
    values = values.reshape(count, -1, 32, 2).transpose(1, 0, 2, 3)
    if down:
        out = np.empty((values.shape[0], 16, 8))
        out[:, 2 * _T[:, None] + _PAIR + 8 * n, _G[:, None]] = values
    else:
        out = np.empty((values.shape[0], 16, 16))
        out[:, _G[:, None] + 8 * (n & 1), 2 * _T[:, None] + _PAIR + 8 * (n >> 1)] = values
    return out


def _places(columns: int) -> tuple[Array, Array]:
    """(rows, columns) of the accumulators of 16 rows, by register and lane."""
    n = np.arange(columns // 2)[:, None]
    return _G + 8 * (n >> 1 & 1), 8 * (n // 4) + 2 * _T + (n & 1)


def _gathered(registers: list[Array], columns: int) -> Array:
    """[warps, 16, columns] of accumulators in registers."""
    values = np.stack([r.view(np.float32) for r in registers]).reshape(columns // 2, -1, 32).transpose(1, 0, 2)
    out = np.empty((values.shape[0], 16, columns))
    rows, places = _places(columns)
    out[:, rows, places] = values
    return out


def _scattered(sums: Array, columns: int) -> list[Array]:
    """The registers of [warps, 16, columns] accumulators."""
    rows, places = _places(columns)
    values = sums.astype(np.float32)[:, rows, places].transpose(1, 0, 2)
    return [np.ascontiguousarray(r).reshape(-1).view(np.uint32) for r in values]


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32")
def _mma(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    to, a, b, c = (vector(arg) for arg in i.args)
    left, right = _operand(block, a, i.parts[7], False), _operand(block, b, i.parts[7], True)
    sums = _gathered([block.bits(r, 4) for r in c], 8)
    for register, value in zip(to, _scattered(left @ right + sums, 8), strict=True):
        block.put(register, value, None)


@dataclass
class Wgmma:
    """One under way: its accumulators' registers and what they held (None: the result of one under way before it),
    the marker that they hold meanwhile, operands, and the cells that it reads."""

    registers: tuple[str, ...]
    before: list[Array] | None
    marker: Array
    kind: str
    columns: int
    from_zero: bool
    left: Array  # [warps, 16, 16] values of registers, or [warpgroups, 64, 16] byte addresses
    left_registers: dict[str, Array]
    right: Array  # [warpgroups, columns, 16] byte addresses
    cells: Array


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(f16\.f16|bf16\.bf16)")
def _wgmma(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    registers, left, right, scale = i.args[:4]
    assert isinstance(registers, tuple) and i.args[4:6] == ("1", "1"), i.args[3:]
    columns, kind = len(registers) * 2, i.parts[6]
    transposed = [int(str(flag)) for flag in i.args[6:]]
    accumulates = block.predicate(scale)
    if accumulates.any() != accumulates.all():
        block.defect("a wgmma that accumulates in some threads only")
    addresses = [_matrix(block, right, columns, bool(transposed[-1]))]
    if isinstance(left, tuple):
        values = _operand(block, left, kind, False)
    else:
        values = _matrix(block, left, 64, bool(transposed[0]))
        addresses.append(values)
    cells = np.unique(np.concatenate([a.reshape(-1) for a in addresses]) >> 1)
    block.shared.read_by_wgmma(cells)
    under_way = {r for group in (*block.wgmma_groups, block.wgmmas) for one in group for r in one.registers}
    before = None if under_way & {*registers} else [block.bits(r, 4) for r in registers]
    used = (*(registers if accumulates.any() else ()), *(left if isinstance(left, tuple) else ()))
    if any(id(block.registers.get(r)) not in block.fenced for r in used):
        block.defect("wgmma uses registers written since the last wgmma.fence")
    marker = np.full(block.threads, UNDEFINED & 0xFFFFFFFF, np.uint32)
    held = {r: block.registers[r] for r in left} if isinstance(left, tuple) else {}
    block.fenced[id(marker)] = marker
    for r in registers:
        block.registers[r] = marker
    block.wgmmas.append(
        Wgmma(registers, before, marker, kind, columns, not accumulates.any(), values, held, addresses[0], cells)
    )


def _matrix(block: Block, operand: Operand, rows: int, transposed: bool) -> Array:
    """[warpgroups, rows, 16] byte addresses of what a descriptor in a register says: K contiguous, or `transposed`."""
    found = []
    for mine in block.bits(operand, 8).reshape(-1, 128):
        if (mine != mine[0]).any():
            block.defect("wgmma descriptors differ within a warpgroup")
        fields = int(mine[0])
        start, lead, stride = ((fields >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        width = _SWIZZLES.get(fields >> 62, 0)
        if not width or fields >> 49 & 7:
            block.defect("wgmma descriptor without swizzle or with a base offset", hex(fields))
            raise Stopped
        row, k = np.arange(rows)[:, None], np.arange(16)
        if transposed:
            per = width // 2
            address = start + row // per * lead + k // 8 * stride + k % 8 * width + row % per * 2
        else:  # rows of `width` bytes, 8 of them a pattern
            address = start + row // 8 * stride + row % 8 * width + k * 2
        found.append(swizzled(address, width))
    addresses = np.stack(found)
    if addresses.max() >= block.shared.size:
        block.defect("wgmma beyond shared memory")
        raise Stopped
    return addresses


@instruction(r"wgmma\.fence\.sync\.aligned")
def _fence_registers(block: Block, i: Instruction, mask: Array | None) -> None:
    """Until the next, a wgmma may use what registers hold now, if moved to others too, or as wgmmas leave them."""
    block.require_all(mask)
    block.fenced = {id(value): value for value in block.registers.values()}


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def _commit(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    block.wgmma_groups.append(block.wgmmas)
    block.wgmmas = []


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def _wait(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    while len(block.wgmma_groups) > int(str(i.args[0])):
        group = block.wgmma_groups[0]
        while group:
            _finish(block, group.pop(0))
        block.wgmma_groups.pop(0)


def _finish(block: Block, one: Wgmma) -> None:
    """Computes a wgmma with what its operands hold now; a later one on the same registers goes on from its sums."""
    if block.shared.arriving[one.cells].any():
        block.defect("shared memory of a wgmma under way is overwritten by an async load")
    if any(block.registers[r] is not value for r, value in one.left_registers.items()):
        block.defect("register of a wgmma under way is written")
    block.shared.computing[one.cells] -= 1
    halves = block.shared.views[2]
    left, warps = one.left, block.threads // 32
    if not one.left_registers:
        left = decode(halves[one.left >> 1], one.kind).astype(np.float64).reshape(warps, 16, 16)
    right = decode(halves[one.right >> 1], one.kind).astype(np.float64).swapaxes(1, 2)
    assert one.before is not None
    sums = 0.0 if one.from_zero else _gathered(one.before, one.columns)
    results = _scattered(left @ np.repeat(right, 4, 0) + sums, one.columns)
    later = (w for group in (*block.wgmma_groups, block.wgmmas) for w in group if {*w.registers} & {*one.registers})
    following = next(later, None)
    if following is not None:
        following.before = results
        return
    for register, value in zip(one.registers, results, strict=True):
        if block.registers[register] is not one.marker:
            block.defect("accumulator of a wgmma under way is written", register)
        block.registers[register] = block.fenced[id(value)] = value
