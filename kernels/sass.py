"""One block of a compiled kernel, followed through its machine code: what it issues, and what it asks of memory.

`nvdisasm -hex` gives the instructions with the compiler's scheduling: how long each stalls the warp, and which
results it waits for. The integer instructions, which decide on branches and addresses, are executed for all threads of
the block at once; what is loaded or computed in floating point is unknown. So loops run as often as they do on a GPU
and every access has its addresses, with no knowledge of what the kernel is for.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Value = Any  # of a register: an int or an int64 array over threads, from 0 to 2**32 - 1; None is unknown
WORD = 0xFFFFFFFF
# More than any kernel here executes; a loop that is followed wrongly ends.
MAX_INSTRUCTIONS = 400_000

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;?\s*\}?\s*/\* 0x")
_HEX = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_CONSTANT = re.compile(r"c\[(?:0x)?0\w*\]\[(0x[0-9a-f]+)\]")
_BANKS = 32


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: the predicate that it is executed under, with `!` where negated; empty is always.
        opcode: mnemonic and modifiers.
        operands: as nvdisasm writes them.
        stall: cycles until the warp can issue the next one.
        sets, reads: the scoreboard that is released when its result is there, its sources are read; 7 is none.
        waits: scoreboards that it waits for, a bit each.
    """

    guard: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    stall: int
    sets: int
    reads: int
    waits: int


@dataclass(frozen=True)
class Code:
    """Instructions in order, and where each label points."""

    instructions: Sequence[Instruction]
    labels: Mapping[str, int]


@dataclass
class Trace:
    """What one block did.

    Attributes:
        issued: instructions of one warp by opcode; all warps follow the same path.
        cycles: one warp's time if it never waits for another: its stalls, and the least latency of what it waits for.
        load_sectors, store_sectors: of 32 bytes between L2 and the multiprocessor, all warps, one request each.
        load_bytes, store_bytes: what the threads asked for, as often as they did.
        tensor_bytes: loaded and stored, by the number of the pointer parameter, each sector once.
        shared_wavefronts: of 128 bytes, all warps.
        box_loads: TMA loads by rank.
    """

    issued: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    shared_wavefronts: int = 0
    box_loads: Counter[str] = field(default_factory=Counter)

    @property
    def instructions(self) -> int:
        return sum(self.issued.values())


def parse(sass: str) -> Code:
    """The instructions of `nvdisasm -c -hex`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = sass.splitlines()
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        found = _LINE.match(line)
        if found is None:
            continue
        high = int(_HEX.search(lines[number + 1])[1], 16)  # type: ignore[index]
        control = high >> 41
        instructions.append(
            Instruction(
                guard="" if found[2] in (None, "PT", "UPT") else found[2],
                opcode=tuple(found[3].split(".")),
                operands=tuple(part.strip() for part in found[4].split(",")) if found[4] else (),
                stall=control & 15,
                sets=control >> 5 & 7,
                reads=control >> 8 & 7,
                waits=control >> 11 & 63,
            )
        )
    return Code(tuple(instructions), labels)


@dataclass(frozen=True)
class Latencies:
    """Least cycles from issue to result."""

    global_load: int = 200
    l1_load: int = 33
    box_load: int = 400
    shared: int = 22
    other: int = 12


class Block:
    """One block at work.

    Args:
        threads: in the block.
        block: its index along each grid axis.
        constants: the launch's constant bank by byte offset, 32-bit words.
        arrival: what an atomic addition finds, the same for every one.
        tensor_cycles: cycles that one warp's matrix instruction keeps its tensor core busy, by opcode.
    """

    def __init__(
        self,
        code: Code,
        threads: int,
        block: tuple[int, int, int],
        constants: Mapping[int, int],
        arrival: int | None,
        latencies: Latencies,
    ) -> None:
        self.code, self.threads, self.block, self.constants = code, threads, block, constants
        self.arrival, self.latencies = arrival, latencies
        self.registers: dict[str, Value] = {}
        self.shared: dict[int, Value] = {}
        self.trace = Trace()
        self._lane = np.arange(threads) % 32
        # Scoreboards, groups of asynchronous copies and barriers of TMA: when they are released.
        self._released = [0] * 8
        self._copies, self._groups = 0, [0]
        self._boxes: dict[int, int] = {}
        # Sectors that this block has loaded through L1, and whether its last load found some that are not there.
        self._in_l1: set[int] = set()
        self._missed = True

    def run(self) -> Trace:
        """Follow the block to its end.

        Raises:
            ValueError: a branch back depends on what is not known here.
        """
        at, steps, returns = 0, 0, []
        trace, code = self.trace, self.code
        while True:
            steps += 1
            if steps > MAX_INSTRUCTIONS:
                raise ValueError(f"no end after {MAX_INSTRUCTIONS} instructions")
            i = code.instructions[at]
            guard = self.predicate(i.guard) if i.guard else True
            name = i.opcode[0]
            trace.issued[".".join(i.opcode)] += 1
            if name == "LDG":
                self._execute(i, guard)
            self._schedule(i, guard)
            if name in ("BRA", "CALL", "JMP", "BREAK"):
                target = _TARGET.search(i.operands[-1] if i.operands else "")
                if target is None or (len(i.opcode) > 1 and i.opcode[1] == "DIV"):
                    at += 1
                    continue
                to = code.labels[target[1]]
                for operand in i.operands[:-1]:
                    if re.fullmatch(r"!?U?P\w+", operand):
                        guard = _both(guard, self.predicate(operand))
                if guard is None and to <= at:
                    raise ValueError(f"{i.opcode} at {at} goes back on what is not known")
                taken = False if guard is None else bool(np.any(guard) if to <= at else np.all(guard))
                if taken and to == at:
                    break
                if taken and name == "CALL":
                    returns.append(at + 1)
                at = to if taken else at + 1
                continue
            if name == "RET":
                at = returns.pop()
                continue
            if name == "EXIT":
                if guard is not None and np.all(guard):
                    break
                at += 1
                continue
            if name != "LDG":
                self._execute(i, guard)
            at += 1
        return trace

    # What is read and written.

    def predicate(self, text: str) -> Value:
        negated = text.startswith("!")
        name = text.lstrip("!")
        value: Value = True if name in ("PT", "UPT") else self.registers.get(name)
        if value is None:
            return None
        return np.logical_not(value) if negated else value

    def word(self, text: str) -> Value:
        """The 32 bits of an operand."""
        text = text.replace(".reuse", "")
        if text[0] == "-" and not text[1:2].isdigit():
            value = self.word(text[1:])
            return None if value is None else (-value) & WORD
        if text[0] == "~":
            value = self.word(text[1:])
            return None if value is None else value ^ WORD
        if text[0] == "|":
            value = self.word(text.strip("|"))
            return None if value is None else np.abs(_signed(value))
        if text in ("RZ", "URZ", "SRZ"):
            return 0
        if text[0] in "RU":
            if ".H" in text or ".B" in text:
                return None
            return self.registers.get(text.split(".")[0])
        if text[0] == "c":
            found = _CONSTANT.match(text)
            return None if found is None else self.constants.get(int(found[1], 16))
        try:
            return int(text, 16 if "0x" in text else 10) & WORD
        except ValueError:
            return None

    def pair(self, text: str) -> Value:
        """64 bits: an operand and the register or constant after it."""
        text = text.replace(".reuse", "").removesuffix(".64")
        if re.fullmatch(r"-?(0x)?[0-9a-f]+", text):
            return int(text, 16 if "0x" in text else 10)
        if text[0] == "-":
            value = self.pair(text[1:])
            return None if value is None else -value
        low, high = self.word(text), self.word(_next(text))
        return None if low is None or high is None else _join(low, high)

    def put(self, name: str, value: Value, guard: Value) -> None:
        name = name.replace(".reuse", "")
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if guard is None:
            value = None
        elif guard is not True and value is not None and not np.all(guard):
            old = self.registers.get(name)
            if not np.any(guard):
                return
            value = None if old is None and np.ndim(guard) == 0 else np.where(guard, value, 0 if old is None else old)
        self.registers[name] = value

    def put_pair(self, name: str, value: Value, guard: Value) -> None:
        self.put(name, None if value is None else _low(value), guard)
        self.put(_next(name), None if value is None else _low(value >> 32), guard)

    def address(self, text: str) -> Value:
        """Of a memory operand: `[R2.64+UR4+0x10]`, with a descriptor before it or not."""
        total: Value = 0
        for term in re.findall(r"[+-]?[^+-]+", text[text.rindex("[") + 1 : text.rindex("]")]):
            sign = -1 if term[0] == "-" else 1
            term = term.lstrip("+-")
            if term in ("RZ", "URZ"):
                continue
            if term[0] in "RU":
                value = self.pair(term) if term.endswith(".64") else self.word(term.split(".")[0])
            else:
                value = int(term, 16)
            if value is None:
                return None
            total = total + sign * value
        return total

    # When it is issued and its result is there.

    def _schedule(self, i: Instruction, guard: Value) -> None:
        trace, name = self.trace, i.opcode[0]
        now = trace.cycles
        for board in range(6):
            if i.waits >> board & 1:
                now = max(now, self._released[board])
        if name == "DEPBAR" and i.operands and i.operands[0].startswith("SB"):
            left = int(i.operands[1], 16) if len(i.operands) > 1 else 0
            groups = self._groups[: len(self._groups) - left]
            now = max([now, *groups])
        if name == "SYNCS" and "PHASECHK" in i.opcode:
            at = _one(self.address(i.operands[-2]))
            now = max(now, self._boxes.get(at, 0)) if at is not None else now
        latency = self.latencies.other
        if name == "LDG" and not self._missed:
            latency = self.latencies.l1_load
        elif name in ("LDG", "ATOMG", "LDGSTS"):
            latency = self.latencies.global_load
        elif name in ("LDS", "LDSM", "STS", "SHFL"):
            latency = self.latencies.shared
        if name == "LDGSTS":
            self._copies = max(self._copies, now + latency)
        elif name == "LDGDEPBAR":
            self._groups.append(max(self._copies, self._groups[-1]))
        elif name == "UTMALDG" and (guard is None or np.any(guard)):
            box = re.search(r"UR(\d+)", i.operands[0])
            at = _one(self.word(f"UR{int(box[1]) + 1}")) if box else None
            if at is not None:
                self._boxes[at] = now + self.latencies.box_load
        if i.sets < 6 and name not in ("LDGSTS", "LDGDEPBAR"):
            self._released[i.sets] = max(self._released[i.sets], now + latency)
        if i.reads < 6:
            self._released[i.reads] = max(self._released[i.reads], now + self.latencies.other)
        trace.cycles = now + max(1, i.stall)

    # What it does.

    def _execute(self, i: Instruction, guard: Value) -> None:
        name = i.opcode[0]
        handler = getattr(self, "_" + name.lower(), None)
        if handler is None and name.startswith("U"):
            handler = getattr(self, "_" + name[1:].lower(), None)
        if handler is not None:
            handler(i, i.operands, guard)
        elif i.operands:
            self._forget(i)

    def _forget(self, i: Instruction) -> None:
        """What an instruction that is not followed writes is unknown."""
        width = 1
        if i.opcode[0] in ("HMMA", "IMMA") or "128" in i.opcode:
            width = 4
        elif "64" in i.opcode or "WIDE" in i.opcode:
            width = 2
        for operand in i.operands[:2] if i.operands[0] in ("PT", "UPT") or _is_predicate(i.operands[0]) else i.operands[:1]:
            name = operand
            for _ in range(width):
                if re.fullmatch(r"U?[RP]\d+", name):
                    self.registers[name] = None
                    name = _next(name)

    def _mov(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        if "64" in i.opcode:
            self.put_pair(ops[0], self.pair(ops[1]), guard)
        else:
            self.put(ops[0], self.word(ops[1]), guard)

    _r2ur = _mov

    def _cs2r(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        self.put(ops[0], self.word(ops[1]), guard)
        if "32" not in i.opcode:
            self.put(_next(ops[0]), self.word(ops[1]), guard)

    def _s2r(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        special = {"SR_TID.X": np.arange(self.threads), "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CgaCtaId": 0,
                   "SR_LANEID": self._lane, "SR_CTAID.X": self.block[0], "SR_CTAID.Y": self.block[1],
                   "SR_CTAID.Z": self.block[2]}  # fmt: skip
        self.put(ops[0], special.get(ops[1]), guard)

    def _s2ur(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        self._s2r(i, ops, guard)

    def _ldc(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        width = 4 if "128" in i.opcode else 2 if "64" in i.opcode else 1
        name, source = ops[0], ops[1]
        for _ in range(width):
            self.put(name, self.word(source), guard)
            name, source = _next(name), _next(source)

    _ldcu = _ldc

    def _iadd3(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        carries, values = [], list(ops[1:])
        while values and _is_predicate(values[0]):
            carries.append(values.pop(0))
        if "64" in i.opcode:
            pairs = [self.pair(v) for v in values[:3]]
            self.put_pair(ops[0], None if any(v is None for v in pairs) else sum(pairs), guard)
            return
        words = [self.word(v) for v in values[:3]]
        inputs = [self.predicate(v) for v in values[3:]] if "X" in i.opcode else []
        if any(w is None for w in (*words, *inputs)):
            total = None
        else:
            total = sum(words)
            for p in inputs:
                total = total + (p if isinstance(p, (bool, int)) else p.astype(np.int64))
            for value, text in zip(words, values, strict=False):
                # A negated word adds 2**32 - b, which for 0 carries.
                if text[0] == "-" and carries and "X" not in i.opcode:
                    total = total + (1 << 32) * (value == 0)
        self.put(ops[0], None if total is None else total & WORD, guard)
        for carry in carries[:1]:
            self.put(carry, None if total is None else total > WORD, guard)
        for carry in carries[1:]:
            self.put(carry, None if total is None else total > 2 * WORD + 1, guard)

    def _viadd(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        self._iadd3(i, (*ops, "RZ"), guard)

    def _iadd(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        carries = sum(_is_predicate(op) for op in ops[1:3])
        self._iadd3(i, (*ops[: 3 + carries], "RZ", *ops[3 + carries :]), guard)

    def _imad(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        kind = i.opcode[1:]
        values, carry_out = list(ops[1:]), None
        if _is_predicate(values[0]):
            carry_out = values.pop(0)
        a, b = self.word(values[0]), self.word(values[1])
        carry: Value = 0
        if "X" in kind:
            carry = self.predicate(values[3]) if len(values) > 3 else None
        unsigned = "U32" in kind
        if a is not None and b is not None and not unsigned:
            a, b = _signed(a), _signed(b)
        zero = (isinstance(a, int) and a == 0) or (isinstance(b, int) and b == 0)
        product = 0 if zero else None if a is None or b is None else a * b
        if "WIDE" in kind or "HI" in kind:
            c = self.pair(values[2])
            total = None if product is None or c is None or carry is None else product + c + carry
            if "HI" in kind:
                self.put(ops[0], None if total is None else total >> 32 & WORD, guard)
                return
            self.put_pair(ops[0], total, guard)
            if carry_out:
                self.put(carry_out, None, guard)
            return
        c = self.word(values[2])
        total = None if product is None or c is None or carry is None else (product + c + carry) & WORD
        self.put(ops[0], total, guard)
        if carry_out:
            self.put(carry_out, None, guard)

    def _lea(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        kind, values, carry_out = i.opcode[1:], list(ops[1:]), None
        if _is_predicate(values[0]):
            carry_out = values.pop(0)
        a, b = self.word(values[0]), self.word(values[1])
        carry: Value = 0
        if "X" in kind and _is_predicate(values[-1]):
            carry = self.predicate(values.pop())
        if "HI" in kind:
            shift = int(values[-1], 16)
            if "SX32" in kind:
                wide = None if a is None else _signed(a)
            else:
                c = self.word(values[2]) if len(values) > 3 else 0
                wide = None if a is None or c is None else _join(a, c)
            shifted = None if wide is None else (wide << shift >> 32 if shift < 31 else wide >> (32 - shift)) & WORD
        else:
            shifted = None if a is None else a << int(values[2], 16) & WORD
        total = None if shifted is None or b is None or carry is None else shifted + b + carry
        self.put(ops[0], None if total is None else total & WORD, guard)
        if carry_out:
            self.put(carry_out, None if total is None else total > WORD, guard)

    def _shf(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        kind = i.opcode[1:]
        low, shift, high = self.word(ops[1]), self.word(ops[2]), self.word(ops[3])
        signed = "S32" in kind or "S64" in kind
        value: Value = None
        if shift is not None:
            shift = np.minimum(shift, 32)
            if "L" in kind and "HI" not in kind:
                value = None if low is None else low << shift & WORD
            elif "L" in kind:
                value = None if low is None or high is None else _join(low, high) << shift >> 32 & WORD
                if ops[1] == "RZ" and high is not None:
                    value = high << shift & WORD
            elif "HI" in kind and high is not None:
                value = (_signed(high) if signed else high) >> shift & WORD
            elif low is not None and high is not None:
                value = _join(low, _signed(high) & WORD) >> shift & WORD
        self.put(ops[0], value, guard)

    def _lop3(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        values, out = list(ops), None
        if _is_predicate(values[0]):
            out = values.pop(0)
        a, b, c = (self.word(v) for v in values[1:4])
        table = int(values[4], 16)
        result: Value = None
        if a is not None and b is not None and c is not None:
            result = 0
            for bit in range(8):
                if table >> bit & 1:
                    x = a if bit & 4 else a ^ WORD
                    y = b if bit & 2 else b ^ WORD
                    z = c if bit & 1 else c ^ WORD
                    result = result | (x & y & z)
        self.put(values[0], result, guard)
        if out:
            self.put(out, None if result is None else result != 0, guard)

    def _plop3(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a, b, c = (self.predicate(v) for v in ops[2:5])
        for name, text in ((ops[0], ops[5]), (ops[1], ops[6])):
            table, result = int(text, 16), None
            if a is None or b is None or c is None:
                # A table that does not ask for the unknown one needs no value of it.
                known = [False if v is None else v for v in (a, b, c)]
                other = [True if v is None else v for v in (a, b, c)]
                first, second = _lookup(table, *known), _lookup(table, *other)
                result = first if np.array_equal(first, second) else None
            else:
                result = _lookup(table, a, b, c)
            self.put(name, result, guard)

    def _isetp(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        kind = i.opcode[1:]
        wide = "U64" in kind or "S64" in kind
        read = self.pair if wide else self.word
        a, b = read(ops[2]), read(ops[3])
        with_ = self.predicate(ops[4]) if len(ops) > 4 else True
        result: Value = None
        if a is not None and b is not None:
            if "U32" not in kind and not wide:
                a, b = _signed(a), _signed(b)
            result = _compare(kind[0], a, b)
            if "EX" in kind:
                low = self.predicate(ops[5])
                equal = a == b
                strict = {"GE": "GT", "LE": "LT"}.get(kind[0], kind[0])
                if kind[0] == "NE":
                    result = None if low is None else np.logical_or(result, low)
                elif kind[0] == "EQ":
                    result = None if low is None else np.logical_and(result, low)
                elif low is None:
                    result = None
                else:
                    result = np.where(equal, low, _compare(strict, a, b))
                    result = bool(result) if result.ndim == 0 else result
        self.put(ops[0], _either(result, with_) if "OR" in kind else _both(result, with_), guard)
        if ops[1] not in ("PT", "UPT"):
            inverse = None if result is None else np.logical_not(result)
            self.put(ops[1], _either(inverse, with_) if "OR" in kind else _both(inverse, with_), guard)

    def _sel(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a, b, p = self.word(ops[1]), self.word(ops[2]), self.predicate(ops[3])
        if p is None or (a is None and b is None):
            value = None
        elif np.all(p):
            value = a
        elif not np.any(p):
            value = b
        else:
            value = None if a is None or b is None else np.where(p, a, b)
        self.put(ops[0], value, guard)

    def _imnmx(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a, b, p = self.word(ops[1]), self.word(ops[2]), self.predicate(ops[-1])
        value: Value = None
        if a is not None and b is not None and p is not None and np.ndim(p) == 0:
            if "U32" not in i.opcode:
                a, b = _signed(a), _signed(b)
            value = (np.minimum(a, b) if p else np.maximum(a, b)) & WORD
        self.put(ops[0], value, guard)

    _vimnmx = _imnmx

    def _viaddmnmx(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a, b, c, p = self.word(ops[1]), self.word(ops[2]), self.word(ops[3]), self.predicate(ops[-1])
        value: Value = None
        if a is not None and b is not None and c is not None and p is not None and np.ndim(p) == 0:
            total = (a + b) & WORD
            if "U32" not in i.opcode:
                total, c = _signed(total), _signed(c)
            value = (np.minimum(total, c) if p else np.maximum(total, c)) & WORD
        self.put(ops[0], value, guard)

    def _sgxt(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a, width = self.word(ops[1]), self.word(ops[2])
        value: Value = None
        if a is not None and width is not None:
            low = a & ((1 << width) - 1)
            value = low if "U32" in i.opcode else np.where(low >> (width - 1) & 1, low | (WORD << width & WORD), low)
        self.put(ops[0], value, guard)

    def _iabs(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a = self.word(ops[1])
        self.put(ops[0], None if a is None else np.abs(_signed(a)), guard)

    def _prmt(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a, control, b = self.word(ops[1]), self.word(ops[2]), self.word(ops[3])
        value: Value = None
        if a is not None and b is not None and isinstance(control, int) and len(i.opcode) == 1:
            wide, value = _join(a, b), 0
            for index in range(4):
                pick = control >> 4 * index & 15
                byte = wide >> 8 * (pick & 7) & 255
                if pick & 8:
                    byte = (byte >> 7) * 255
                value = value | byte << 8 * index
        self.put(ops[0], value, guard)

    def _i2f(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a = self.word(ops[1])
        if a is not None and "S32" in i.opcode:
            a = _signed(a)
        value: Value = None
        if a is not None:
            near = np.asarray(a, np.float64).astype(np.float32)
            value = _bits(np.where(near < a, np.nextafter(near, np.float32(np.inf)), near))
        self.put(ops[0], value, guard)

    def _mufu(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a = self.word(ops[1]) if "RCP" in i.opcode else None
        value: Value = None
        if a is not None:
            with np.errstate(all="ignore"):
                value = _bits(np.float32(1) / _float(a))
        self.put(ops[0], value, guard)

    def _f2i(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        a = self.word(ops[1])
        value: Value = None
        if a is not None and "TRUNC" in i.opcode:
            with np.errstate(all="ignore"):
                value = np.clip(np.nan_to_num(_float(a).astype(np.float64)), 0, WORD).astype(np.int64)
                value = int(value) if np.ndim(value) == 0 else value
        self.put(ops[0], value, guard)

    def _elect(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        self.put(ops[0], self._lane == 0, guard)

    def _vote(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        *outs, source = ops
        value = self.predicate(source)
        if value is not None:
            value = bool(np.any(value)) if "ANY" in i.opcode else bool(np.all(value))
        for out in outs:
            self.put(out, value if _is_predicate(out) else None, guard)

    _voteu = _vote

    def _p2r(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        old, mask = self.word(ops[2]), int(ops[3], 16)
        value: Value = None if old is None else old & ~mask & WORD
        for bit in range(7):
            if mask >> bit & 1 and value is not None:
                p = self.predicate(f"P{bit}")
                value = None if p is None else value | (np.asarray(p).astype(np.int64) << bit)
        self.put(ops[0], value, guard)

    def _r2p(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        value, mask = self.word(ops[1]), int(ops[2], 16)
        for bit in range(7):
            if mask >> bit & 1:
                self.put(f"P{bit}", None if value is None else (value >> bit & 1) != 0, guard)

    def _shfl(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        value, lane = self.word(ops[2]), self.word(ops[3])
        result: Value = None
        if "IDX" in i.opcode and value is not None and lane is not None:
            source = np.broadcast_to(value, (self.threads,))
            result = source[np.arange(self.threads) // 32 * 32 + np.broadcast_to(lane, (self.threads,)) % 32]
        self.put(ops[1], result, guard)

    def _syncs(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        if "PHASECHK" in i.opcode:
            self.put(ops[0], True, guard)
        elif _is_register(ops[0]):
            self.put(ops[0], None, guard)

    def _utmaldg(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        if guard is None or np.any(guard):
            self.trace.box_loads[i.opcode[1]] += 1

    # Memory.

    def _active(self, *guards: Value) -> Any:
        active = np.ones(self.threads, bool)
        for guard in guards:
            if guard is not None:
                active &= guard
        return active

    def _global(self, i: Instruction, address: Value, active: Any, store: bool = False) -> None:
        width = _bytes(i.opcode)
        count = int(active.sum())
        sectors = -(-count * width // 32)
        self._missed = True
        if address is not None:
            where = np.broadcast_to(np.asarray(address, np.int64) >> 5, (self.threads,))
            sectors = _distinct(where, active)
            if i.opcode[0] == "LDG" and "STRONG" not in i.opcode:
                fresh = set(np.unique(where[active]).tolist()) - self._in_l1
                self._in_l1 |= fresh
                sectors, self._missed = min(sectors, len(fresh)), bool(fresh)
        if store:
            self.trace.store_sectors += sectors
            self.trace.store_bytes += count * width
        else:
            self.trace.load_sectors += sectors
            self.trace.load_bytes += count * width

    def _ldg(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        operands = [o for o in ops if "[" in o]
        self._global(i, self.address(operands[0]), self._active(guard))
        name = next(o for o in ops if o[0] != "P" and o[0] != "!")
        for _ in range(max(1, _bytes(i.opcode) // 4)):
            self.put(name, None, guard)
            name = _next(name) if name != "RZ" else name

    def _stg(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        self._global(i, self.address(ops[0]), self._active(guard), store=True)

    def _ldgsts(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        predicate = self.predicate(ops[2]) if len(ops) > 2 else True
        self._global(i, self.address(ops[1]), self._active(guard, predicate))
        self._shared(i, self.address(ops[0]), self._active(guard))

    def _atomg(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        self.trace.load_sectors += 1
        for operand in ops[:2]:
            if _is_register(operand):
                self.put(operand, self.arrival, guard)

    def _shared(self, i: Instruction, address: Value, active: Any) -> None:
        width = _bytes(i.opcode)
        count = int(active.sum())
        if i.opcode[0] == "LDSM":
            matrices = int(i.opcode[-1]) if i.opcode[-1].isdigit() else 1
            if address is None:
                self.trace.shared_wavefronts += matrices * self.threads // 32
                return
            rows = np.broadcast_to(address, (self.threads,)).reshape(-1, 32)[:, : 8 * matrices]
            self.trace.shared_wavefronts += _wavefronts(rows.reshape(-1, 8), np.ones(rows.size, bool).reshape(-1, 8), 16)
        elif address is None:
            self.trace.shared_wavefronts += -(-count * width // 128)
        else:
            lanes = min(32, max(8, 128 // max(width, 4)))
            where = np.broadcast_to(address, (self.threads,)).reshape(-1, lanes)
            self.trace.shared_wavefronts += _wavefronts(where, active.reshape(-1, lanes), width)

    def _lds(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        address = self.address(ops[1])
        self._shared(i, address, self._active(guard))
        width, name, at = max(1, _bytes(i.opcode) // 4), ops[0], _one(address)
        for word in range(width):
            self.put(name, self.shared.get(at + 4 * word) if at is not None and width == 1 else None, guard)
            name = _next(name) if name != "RZ" else name

    def _ldsm(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        self._shared(i, self.address(ops[1]), self._active(guard))
        name = ops[0]
        for _ in range(int(i.opcode[-1]) if i.opcode[-1].isdigit() else 1):
            self.put(name, None, guard)
            name = _next(name)

    def _sts(self, i: Instruction, ops: Sequence[str], guard: Value) -> None:
        address, active = self.address(ops[0]), self._active(guard)
        self._shared(i, address, active)
        at = _one(address)
        if at is not None and _bytes(i.opcode) == 4 and (guard is None or np.any(guard)):
            self.shared[at] = self.word(ops[1])


def _next(name: str) -> str:
    """The register or constant after one."""
    if name in ("RZ", "URZ", "PT", "SRZ"):
        return name
    if constant := re.match(r"(c\[\w+\])\[(0x[0-9a-f]+)\]", name):
        return f"{constant[1]}[{hex(int(constant[2], 16) + 4)}]"
    found = re.match(r"(U?[RP])(\d+)", name)
    return f"{found[1]}{int(found[2]) + 1}" if found else name


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def _is_register(text: str) -> bool:
    return re.fullmatch(r"U?R\d+", text) is not None


def _signed(value: Value) -> Value:
    return value - ((value >> 31 & 1) << 32)


def _low(value: Value) -> Value:
    return value & WORD


def _join(low: Value, high: Value) -> Value:
    """64 bits as a signed number, which is what an array can hold."""
    return low + (_signed(high) << 32)


def _one(value: Value) -> int | None:
    """The value where it is the same for all threads."""
    if value is None:
        return None
    first = int(np.ravel(value)[0])
    return first if np.all(np.asarray(value) == first) else None


def _bits(value: Any) -> Value:
    bits = np.asarray(value, np.float32).view(np.uint32).astype(np.int64)
    return int(bits) if bits.ndim == 0 else bits


def _float(bits: Value) -> Any:
    return np.asarray(bits, np.int64).astype(np.uint32).view(np.float32)


def _both(a: Value, b: Value) -> Value:
    for one, other in ((a, b), (b, a)):
        if one is not None and not np.any(one):
            return False
        if one is None:
            return None if other is None or np.any(other) else False
    return np.logical_and(a, b)


def _either(a: Value, b: Value) -> Value:
    if a is None or b is None:
        known = b if a is None else a
        return True if known is not None and np.all(known) else None
    return np.logical_or(a, b)


def _lookup(table: int, a: Value, b: Value, c: Value) -> Value:
    index = np.asarray(a).astype(int) * 4 + np.asarray(b).astype(int) * 2 + np.asarray(c).astype(int)
    result = (table >> index & 1) != 0
    return bool(result) if np.ndim(result) == 0 else result


def _compare(kind: str, a: Value, b: Value) -> Value:
    return {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}[kind]


def _bytes(opcode: Sequence[str]) -> int:
    for modifier in opcode[1:]:
        if modifier in ("128", "64"):
            return int(modifier) // 8
        if modifier in ("U16", "S16", "16"):
            return 2
        if modifier in ("U8", "S8", "8"):
            return 1
    return 4


def _distinct(where: Any, active: Any) -> int:
    """Different values among the active threads of each warp, in all."""
    marked = np.sort(np.where(active, where, -1).reshape(-1, 32), axis=1)
    changes = np.diff(marked, axis=1) != 0
    return int(changes.sum() + len(marked) - (marked[:, 0] == -1).sum())


def _wavefronts(address: Any, active: Any, width: int) -> int:
    """Passes that the 32 banks take: each row of addresses at once, in each bank one word at a time."""
    words = max(1, width // 4)
    rows = np.repeat(np.arange(len(address))[:, None], address.shape[1], 1)
    word = address[:, :, None] // 4 + np.arange(words)
    keys = np.unique((rows[:, :, None] << 40 | word)[np.broadcast_to(active[:, :, None], word.shape)])
    if not len(keys):
        return 0
    bank = keys >> 40 << 5 | (keys & ((1 << 40) - 1)) % _BANKS
    found, counts = np.unique(bank, return_counts=True)
    most = np.zeros(int(found[-1] >> 5) + 1, np.int64)
    np.maximum.at(most, found >> 5, counts)
    return int(most.sum())
