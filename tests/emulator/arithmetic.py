"""Moves, arithmetic, comparisons, conversions and exchanges between the lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.block import Block, instruction
from tests.emulator.program import Instruction
from tests.emulator.values import UNSIGNED, Array, decode, encode, width

_INT, _INT_8 = "[sub](16|32|64)", "[sub](8|16|32|64)"
_TINY = np.float32(2.0**-126)
_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_UNARY: dict[str, Callable[..., Any]] = {"neg": np.negative, "abs": np.abs, "ex2": np.exp2}
_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _flushed(i: Instruction, value: Array) -> Array:
    return np.where(np.abs(value) < _TINY, np.copysign(0, value), value) if "ftz" in i.parts else value


@instruction(r"mov\.([bu](16|32|64)|f32|pred)")
def _mov(block: Block, i: Instruction, mask: Array | None) -> None:
    to, source = i.args
    if i.parts[1] == "pred":
        block.put(to, block.predicate(source), mask)
    elif isinstance(source, tuple):
        size = width(i.parts[1]) // len(source)
        pieces = np.stack([block.bits(part, size) for part in source], 1)
        block.put(to, pieces.view(UNSIGNED[width(i.parts[1])])[:, 0], mask)
    elif isinstance(to, tuple):
        size = width(i.parts[1])
        pieces = block.bits(source, size).view(UNSIGNED[size // len(to)]).reshape(block.threads, -1)
        for part, value in zip(to, pieces.T, strict=True):
            block.put(part, np.ascontiguousarray(value), mask)
    else:
        block.put(to, block.bits(source, width(i.parts[1])), mask)


@instruction(rf"(add|sub|min|max)\.{_INT}|(and|or|xor)\.b(16|32|64)|mul\.lo\.{_INT}|(add|sub)\.[su]16x2")
@instruction(r"(add|sub|mul)(\.rn)?(\.ftz)?\.f32(x2)?|(min|max)(\.ftz)?\.NaN\.(f32|b?f16(x2)?)")
def _binary(block: Block, i: Instruction, mask: Array | None) -> None:
    a, b = (block.get(arg, i.parts[-1]) for arg in i.args[1:])
    block.set(i.args[0], _flushed(i, _BINARY[i.parts[0]](a, b)), i.parts[-1], mask)


@instruction(r"(min|max)(\.ftz)?\.f32")
def _number_of_two(block: Block, i: Instruction, mask: Array | None) -> None:
    """Of a NaN and a number the number."""
    a, b = (block.get(arg, "f32") for arg in i.args[1:])
    block.set(i.args[0], (np.fmin if i.parts[0] == "min" else np.fmax)(a, b), "f32", mask)


@instruction(r"(add|sub)\.rn\.f32\.b?f16")
def _mixed(block: Block, i: Instruction, mask: Array | None) -> None:
    a, b = block.get(i.args[1], i.parts[-1]), block.get(i.args[2], "f32")
    block.set(i.args[0], _BINARY[i.parts[0]](a, b), "f32", mask)


@instruction(r"(and|or|xor)\.pred")
def _predicates(block: Block, i: Instruction, mask: Array | None) -> None:
    block.put(i.args[0], _BINARY[i.parts[0]](*(block.predicate(arg) for arg in i.args[1:])), mask)


@instruction(r"not\.(pred|b(16|32|64))")
def _not(block: Block, i: Instruction, mask: Array | None) -> None:
    value = block.predicate(i.args[1]) if i.parts[1] == "pred" else block.bits(i.args[1], width(i.parts[1]))
    block.put(i.args[0], ~value, mask)


@instruction(rf"neg\.{_INT}|(neg|abs)(\.ftz)?\.f32|ex2\.approx(\.ftz)?\.f32")
def _unary(block: Block, i: Instruction, mask: Array | None) -> None:
    kind = i.parts[-1]
    block.set(i.args[0], _flushed(i, _UNARY[i.parts[0]](block.get(i.args[1], kind))), kind, mask)


def _product(block: Block, i: Instruction) -> tuple[Array, str]:
    """The low, high or whole product of a mul or mad, and its type."""
    how, kind = i.parts[1:3]
    a, b = (block.get(arg, kind) for arg in i.args[1:3])
    if how == "lo":
        return a * b, kind
    bits = 8 * width(kind)
    if bits == 64:
        high = [(int(x) * int(y)) >> 64 & 2**64 - 1 for x, y in zip(a, b, strict=True)]
        return np.array(high, np.uint64), kind
    whole = a.astype(np.int64) * b.astype(np.int64) if kind[0] == "s" else a.astype(np.uint64) * b.astype(np.uint64)
    return (whole >> whole.dtype.type(bits), kind) if how == "hi" else (whole, f"{kind[0]}{2 * bits}")


@instruction(rf"mul\.(hi\.{_INT}|wide\.[su](16|32))|mad\.(lo\.{_INT}|wide\.[su](16|32))")
def _mul_mad(block: Block, i: Instruction, mask: Array | None) -> None:
    value, kind = _product(block, i)
    if i.parts[0] == "mad":
        value = value + block.get(i.args[3], kind)
    block.set(i.args[0], value, kind, mask)


@instruction(r"fma\.rn(\.ftz)?\.f32(x2)?")
def _fma(block: Block, i: Instruction, mask: Array | None) -> None:
    a, b, c = (block.get(arg, i.parts[-1]).astype(np.float64) for arg in i.args[1:])
    block.set(i.args[0], _flushed(i, (a * b + c).astype(np.float32)), i.parts[-1], mask)


@instruction(r"div\.(full|approx|rn)(\.ftz)?\.f32")
def _div(block: Block, i: Instruction, mask: Array | None) -> None:
    block.set(i.args[0], _flushed(i, block.get(i.args[1], "f32") / block.get(i.args[2], "f32")), "f32", mask)


@instruction(r"(div|rem)\.[su](16|32|64)")
def _whole_division(block: Block, i: Instruction, mask: Array | None) -> None:
    """Towards 0, in double precision, which 32 bits and sizes of tensors fit in."""
    a, b = (block.get(arg, i.parts[1]).astype(np.int64) for arg in i.args[1:])
    if bool(((b == 0) & (True if mask is None else mask)).any()):
        block.defect("integer division by zero")
    b = np.where(b == 0, 1, b)
    quotient = np.trunc(a / b).astype(np.int64)
    block.set(i.args[0], quotient if i.parts[0] == "div" else a - b * quotient, i.parts[1], mask)


@instruction(r"sh[lr]\.[sub](16|32|64)")
def _shift(block: Block, i: Instruction, mask: Array | None) -> None:
    value, by = block.get(i.args[1], i.parts[1]), block.bits(i.args[2], 4)
    bits = 8 * value.itemsize
    amount = np.minimum(by, bits - 1).astype(value.dtype)
    shifted = value << amount if i.parts[0] == "shl" else value >> amount
    if i.parts[0] == "shl" or i.parts[1][0] != "s":  # a signed shift to the right leaves the sign
        shifted = np.where(by >= bits, 0, shifted)
    block.set(i.args[0], shifted, i.parts[1], mask)


@instruction(r"bfe\.[su](32|64)")
def _bfe(block: Block, i: Instruction, mask: Array | None) -> None:
    """Bits [position, position + length), which lie within the register."""
    position, length = (int(block.bits(arg, 4)[0]) for arg in i.args[2:])
    bits = block.bits(i.args[1], width(i.parts[1]))
    position, left = bits.dtype.type(position), bits.dtype.type(8 * bits.itemsize - length)
    value = decode(bits >> position << left, i.parts[1])
    block.set(i.args[0], value >> value.dtype.type(left), i.parts[1], mask)


@instruction(r"prmt\.b32")
def _prmt(block: Block, i: Instruction, mask: Array | None) -> None:
    pool = np.stack([block.bits(arg, 4) for arg in i.args[1:3]], 1).view(np.uint8)  # [threads, 8]
    selectors = block.bits(i.args[3], 4)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    chosen = np.take_along_axis(pool, (selectors & 7).astype(np.int64), 1)
    signs = np.where(chosen & 128, 255, 0)
    out = np.where(selectors & 8, signs, chosen).astype(np.uint8)
    block.put(i.args[0], out.view(np.uint32)[:, 0], mask)


@instruction(r"lop3\.b32")
def _lop3(block: Block, i: Instruction, mask: Array | None) -> None:
    a, b, c = (block.bits(arg, 4) for arg in i.args[1:4])
    table, out = int(block.bits(i.args[4], 4)[0]), np.zeros(block.threads, np.uint32)
    for k in (k for k in range(8) if table >> k & 1):
        out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    block.put(i.args[0], out, mask)


@instruction(r"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)(\.and|\.or|\.xor)?(\.ftz)?\.([sub](16|32|64)|f32)")
def _setp(block: Block, i: Instruction, mask: Array | None) -> None:
    a, b = (block.get(arg, i.parts[-1]) for arg in i.args[1:3])
    value = _COMPARISONS[i.parts[1]](a, b)
    if len(i.args) == 4:
        value = _BINARY[i.parts[2]](value, block.predicate(i.args[3]))
    block.put(i.args[0], value, mask)


@instruction(r"selp\.([sub](16|32|64)|f32)")
def _selp(block: Block, i: Instruction, mask: Array | None) -> None:
    a, b = (block.bits(arg, width(i.parts[1])) for arg in i.args[1:3])
    block.put(i.args[0], np.where(block.predicate(i.args[3]), a, b), mask)


@instruction(r"cvt\.rn\.b?f16x2\.f32")
def _cvt_two(block: Block, i: Instruction, mask: Array | None) -> None:
    high, low = (block.get(arg, "f32") for arg in i.args[1:])
    block.set(i.args[0], np.stack([low, high], 1), i.parts[2], mask)


@instruction(rf"cvt\.{_INT_8}\.{_INT_8}|cvt\.rn\.(b?f16|f32)\.(f32|[su]32)|cvt\.f32\.b?f16|cvt\.rzi\.[su]32\.f32")
def _cvt(block: Block, i: Instruction, mask: Array | None) -> None:
    to, source = i.parts[-2:]
    value = block.get(i.args[1], source)
    bits = encode(np.trunc(value) if "rzi" in i.parts else value, to)
    if width(to) == 1:  # in a wider register, as the same number
        bits = encode(decode(bits, to), "b32")
    block.put(i.args[0], bits, mask)


@instruction(r"cvta\.param\.u64")
def _cvta(block: Block, i: Instruction, mask: Array | None) -> None:
    block.put(i.args[0], block.bits(i.args[1], 8), mask)


@instruction(r"shfl\.sync\.(bfly|idx)\.b32")
def _shfl(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    by = block.bits(i.args[2], 4).astype(np.int64)
    lane = block.lane ^ by if i.parts[2] == "bfly" else by & 31
    block.put(i.args[0], block.bits(i.args[1], 4)[block.warp * 32 + lane], mask)


@instruction(r"elect\.sync")
def _elect(block: Block, i: Instruction, mask: Array | None) -> None:
    block.require_all(mask)
    assert isinstance(i.args[0], str)
    lane, elected = i.args[0].split("|")
    block.put(lane, np.zeros(block.threads, np.uint32), mask)
    block.put(elected, block.lane == 0, mask)


@instruction(r"bar\.warp\.sync")
def _warp_sync(block: Block, i: Instruction, mask: Array | None) -> None:
    """Nothing to wait for: the threads of a warp run together, and races are looked for between warps."""
