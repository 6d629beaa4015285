"""Arithmetic on what a register holds: one word for all threads, a word each, or None where it is not known.

A word of all threads is an int from 0 to 2**32 - 1 (a predicate a bool), words of each an int64 array (a bool array).
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Value = Any
WORD = 0xFFFFFFFF
SECTOR_BITS = 5  # 32 bytes
_COMPARISONS: dict[str, Callable[[Value, Value], Value]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def signed(value: Value) -> Value:
    return (value ^ 0x80000000) - 0x80000000


def joined(low: Value, high: Value) -> Value:
    """64 bits, signed, as an array holds them."""
    return low + (signed(high) << 32)


def same(value: Value) -> int | None:
    """The word where it is the same for all threads."""
    if value is None or isinstance(value, (int, bool)):
        return value
    first = int(value[0])
    return first if bool((value == first).all()) else None


def every(value: Value) -> bool:
    return value if isinstance(value, bool) else bool(value.all())


def some(value: Value) -> bool:
    return value if isinstance(value, bool) else bool(value.any())


def negation(value: Value) -> Value:
    return None if value is None else not value if isinstance(value, bool) else ~value


def both(a: Value, b: Value) -> Value:
    if a is False or b is False:
        return False
    if a is None or b is None:
        known = b if a is None else a
        return False if known is not None and not some(known) else None
    return b if a is True else a if b is True else a & b


def either(a: Value, b: Value) -> Value:
    return negation(both(negation(a), negation(b)))


def chosen(condition: Value, a: Value, b: Value) -> Value:
    """a where the condition holds, else b."""
    if condition is None:
        return None
    if every(condition):
        return a
    if not some(condition):
        return b
    return None if a is None or b is None else np.where(condition, a, b)


def number_of(predicate: Value) -> Value:
    return int(predicate) if isinstance(predicate, bool) else predicate.astype(np.int64)


def compared(how: str, a: Value, b: Value) -> Value:
    return _COMPARISONS[how](a, b)


def logic(table: int, a: Value, b: Value, c: Value) -> Value:
    """Bitwise function of three words by its table of 8 bits."""
    if table == 0xC0:
        return a & b
    if table == 0xFC:
        return a | b
    if table == 0x3C:
        return a ^ b
    if table == 0xEA:
        return a & b | c
    if table == 0xF8:
        return a | b & c
    result: Value = 0
    for index in range(8):
        if table >> index & 1:
            x = a if index & 4 else a ^ WORD
            y = b if index & 2 else b ^ WORD
            z = c if index & 1 else c ^ WORD
            result = result | (x & y & z)
    return result


def predicate_logic(table: int, values: Sequence[Value]) -> Value:
    """The same of three predicates; known too where the unknown ones make no difference."""
    for index, value in enumerate(values):
        if value is None:
            either_way = [predicate_logic(table, [*values[:index], v, *values[index + 1 :]]) for v in (False, True)]
            unknown = either_way[0] is None or either_way[1] is None or not np.array_equal(*either_way)
            return None if unknown else either_way[0]
    found: Value = False
    for index in range(8):
        if table >> index & 1:
            a, b, c = (value if index & bit else negation(value) for value, bit in zip(values, (4, 2, 1), strict=True))
            found = either(found, both(both(a, b), c))
    return found


def carries(product: Value, addend: Value) -> Value:
    """Whether the sum of a product and 64 bits takes more than 64."""
    if isinstance(product, int) and isinstance(addend, int):
        return product + (addend & (1 << 64) - 1) >> 64 > 0
    with np.errstate(over="ignore"):
        total = np.asarray(product + addend, np.int64).view(np.uint64)
    return total < np.asarray(product, np.int64).view(np.uint64)


def bits(value: Any) -> Value:
    """Of float32."""
    words = np.asarray(value, np.float32).view(np.uint32).astype(np.int64)
    return int(words) if words.ndim == 0 else words


def float_of(words: Value) -> Any:
    return np.asarray(words, np.int64).astype(np.uint32).view(np.float32)


def words_of(value: Any) -> Value:
    """Words of whole numbers, one or many."""
    array = np.asarray(value).astype(np.int64) & WORD
    return int(array) if array.ndim == 0 else array


def sectors(address: Any, active: Any) -> Any:
    """The sectors of 32 bytes that each warp asks for: pairs of (warp, sector), each once."""
    warp = np.arange(len(address)) >> 5 << 52
    return np.unique((warp | address >> SECTOR_BITS)[active])


def wavefronts(address: Any, active: Any, width: int) -> int:
    """Passes that the 32 banks take: each row of addresses at once, in each bank one word at a time."""
    if not active.any():
        return 0
    rows = np.arange(len(address))[:, None, None] << 40
    word = address[:, :, None] // 4 + np.arange(max(1, width // 4))
    keys = np.unique((rows | word)[np.broadcast_to(active[:, :, None], word.shape)])
    bank, counts = np.unique(keys >> 40 << 5 | keys & 31, return_counts=True)
    most = np.zeros(int(bank[-1] >> 5) + 1, np.int64)
    np.maximum.at(most, bank >> 5, counts)
    return int(most.sum())
