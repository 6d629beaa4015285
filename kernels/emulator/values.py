"""Bits of registers and memory as numbers, and back."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
# What a register or cell that nobody wrote holds: NaN in every format.
UNDEFINED = 0x7FFF_7FFF_7FFF_7FFF


@cache
def _parts(kind: str) -> tuple[str, int]:
    """A type of PTX as one of its numbers, and how many there are if it is packed, else 0."""
    single, _, many = kind.partition("x")
    return single, int(many or 0)


@cache
def width(kind: str) -> int:
    """Bytes of a type of PTX: `s32`, `bf16x2`, ..."""
    single, many = _parts(kind)
    return int(single.lstrip("bsuf")) // 8 * (many or 1)


def decode(bits: Array, kind: str) -> Array:
    """[T] unsigned as [T] numbers of a type, or [T, 2] of a packed one; 16-bit floats as the float32 they are."""
    single, many = _parts(kind)
    if many:
        bits = bits.view(UNSIGNED[width(single)]).reshape(*bits.shape, many)
    if "f" not in kind:
        return bits.view((_SIGNED if kind[0] == "s" else UNSIGNED)[bits.itemsize])
    if single == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if single == "f16" else bits.view(np.float32)


def encode(values: Array, kind: str) -> Array:
    """What `decode` decodes; a float32 is rounded to the nearest 16-bit float, ties to even."""
    single, many = _parts(kind)
    if "f" not in kind:
        bits = values.astype(UNSIGNED[width(single)])
    elif single == "bf16":
        wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        bits = np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
    else:
        bits = np.ascontiguousarray(values, np.float16 if single == "f16" else np.float32).view(UNSIGNED[width(single)])
    return np.ascontiguousarray(bits).view(UNSIGNED[width(kind)])[:, 0] if many else bits
