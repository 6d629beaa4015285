"""One block of a compiled kernel, followed through its machine code: what it issues, and what it asks of memory.

The integer instructions, which decide on branches and addresses, are executed for all threads of the block at once;
what is loaded or computed in floating point is unknown. So loops run as often as they do on a GPU and every access has
its addresses, whatever the kernel is for.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels.prediction.sass import TRUE, ZERO, Code, Instruction, Operand, following, matrix_flops, width
from kernels.prediction.words import (
    SECTOR_BITS,
    WORD,
    Value,
    bits,
    both,
    carries,
    chosen,
    compared,
    either,
    every,
    float_of,
    joined,
    logic,
    negation,
    number_of,
    predicate_logic,
    same,
    sectors,
    signed,
    some,
    wavefronts,
    words_of,
)

# More than any kernel here executes; a loop that is followed wrongly ends.
MAX_INSTRUCTIONS = 1_000_000
# Least cycles from issue to result that microbenchmarks of these architectures report: of a load from L2 and from L1,
# a TMA load, shared memory and shuffles, anything else whose latency varies.
L2_LATENCY, L1_LATENCY, BOX_LATENCY, SHARED_LATENCY, OTHER_LATENCY = 200, 33, 400, 22, 12


@dataclass
class Trace:
    """What one block did.

    Attributes:
        issued: instructions of one warp by opcode; all warps follow the same path.
        matrix_flops, matrix_cycles: of one warp's share of the products, and that it keeps its tensor core busy.
        cycles: one warp's time if it never waits for another: its stalls, and the least latency of what it waits for.
        load_sectors, store_sectors: of 32 bytes between L2 and the multiprocessor, all warps; what L1 still has is not
            loaded again.
        shared_wavefronts: of 128 bytes, all warps.
        box_loads: TMA loads by rank.
        loop_instructions, loop_flops: of one warp, in the loops that multiply: how lean they are.
    """

    issued: Counter[str] = field(default_factory=Counter)
    matrix_flops: float = 0.0
    matrix_cycles: float = 0.0
    cycles: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    shared_wavefronts: int = 0
    box_loads: Counter[str] = field(default_factory=Counter)
    loop_instructions: int = 0
    loop_flops: float = 0.0

    @property
    def instructions(self) -> int:
        return sum(self.issued.values())


class Block:
    """One block at work.

    Args:
        threads: in the block.
        index: of the block along each grid axis.
        constants: the launch's constant bank: 32-bit words by byte offset.
        arrival: what an atomic addition finds in memory, the same for every one.
        flops_per_cycle: of the tensor core of one warp, by the mnemonic of a matrix instruction.
    """

    def __init__(
        self,
        code: Code,
        threads: int,
        index: tuple[int, int, int],
        constants: Mapping[int, int],
        arrival: int,
        flops_per_cycle: Callable[[str], float],
    ) -> None:
        self.code, self.threads, self.constants, self.arrival = code, threads, constants, arrival
        self.trace = Trace()
        self._lane = np.arange(threads) & 31
        self._everyone = np.ones(threads, bool)
        self._special: dict[str, Value] = {
            "SR_TID.X": np.arange(threads), "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CgaCtaId": 0, "SR_LANEID": self._lane,
            "SR_CTAID.X": index[0], "SR_CTAID.Y": index[1], "SR_CTAID.Z": index[2],
        }  # fmt: skip
        self._registers: dict[str, Value] = dict.fromkeys(ZERO, 0) | dict.fromkeys(TRUE, True)
        self._shared: dict[int, Value] = {}
        self._in_l1: set[int] = set()
        self._conflicts: dict[tuple[str, bytes, bytes], int] = {}
        self._returns: list[int] = []
        self._flops_per_cycle, self._clock = flops_per_cycle, _Clock()

    def run(self) -> Trace:
        """Follow the block to its end.

        Raises:
            ValueError: a branch back depends on what is not known, or the block does not end.
        """
        code, at = self.code, 0
        flops: dict[int, list[float]] = {}  # of each instruction, every time that it is issued
        loops: set[tuple[int, int]] = set()  # first and last instruction
        for _ in range(MAX_INSTRUCTIONS):
            i, before = code.instructions[at], self.trace.matrix_flops
            guard = True if i.guard is None else self._predicate(i.guard)
            self.trace.issued[i.opcode] += 1
            if guard is not False or i.label:
                self._latency = OTHER_LATENCY
                self._handle(i, guard)
            busy = self._multiply(i) if "MMA" in i.name and guard is not False else 0.0
            self._clock.issue(i, self._latency, self._barrier(i), busy, guard is not False)
            flops.setdefault(at, []).append(self.trace.matrix_flops - before)
            if i.name == "EXIT" and guard is not None and every(guard):
                break
            to = self._next(i, at, guard)
            if to == at:  # what lies behind the kernel's end
                break
            if to < at:
                loops.add((to, at))
            at = to
        else:
            raise ValueError(f"a block that has not ended after {MAX_INSTRUCTIONS} instructions")
        self.trace.cycles = self._clock.now
        multiplying = [range(to, at + 1) for to, at in loops if any(sum(flops.get(n, ())) for n in range(to, at + 1))]
        for n in {n for loop in multiplying for n in loop}:
            self.trace.loop_instructions += len(flops.get(n, ()))
            self.trace.loop_flops += sum(flops.get(n, ()))
        return self.trace

    def _next(self, i: Instruction, at: int, guard: Value) -> int:
        """The instruction after this one: where threads part, the way of those that have more to do."""
        if i.name == "RET" and self._returns:
            return self._returns.pop()
        if i.name not in ("BRA", "CALL", "JMP") or not i.label or "DIV" in i.modifiers:
            return at + 1
        to = self.code.labels[i.label]
        for operand in i.operands[:-1]:
            guard = both(guard, self._predicate(operand))
        if guard is None and to <= at:
            raise ValueError(f"{i.opcode} to {i.label} goes back on what is not known")
        taken = guard is not None and (some(guard) if to <= at or self._multiplies_there(at, to) else every(guard))
        if taken and i.name == "CALL":
            self._returns.append(at + 1)
        return to if taken else at + 1

    def _multiplies_there(self, at: int, to: int) -> bool:
        """Whether a branch forward goes to the half of an if and else that has the products, the work of one warp."""
        before = self.code.instructions[to - 1]
        if before.name != "BRA" or before.guard is not None or len(before.operands) > 1 or not before.label:
            return False
        here, there = slice(at + 1, to), slice(to, self.code.labels[before.label])
        return [any("MMA" in i.name for i in self.code.instructions[half]) for half in (here, there)] == [False, True]

    # What is read and written.

    def _predicate(self, o: Operand) -> Value:
        value = self._registers.get(o.register)
        return negation(value) if o.inverted else value

    def _word(self, o: Operand) -> Value:
        """The 32 bits of an operand."""
        if o.number is not None:
            return o.number & WORD
        value = self._registers.get(o.register) if o.register else self.constants.get(o.constant)
        if value is None:
            return None
        if o.absolute:
            value = abs(signed(value))
        if o.negative:
            return -value & WORD
        return value ^ WORD if o.inverted else value

    def _pair(self, o: Operand) -> Value:
        """64 bits: an operand and the register or constant after it."""
        if o.number is not None:
            return o.number
        if o.register:
            low, high = self._registers.get(o.register), self._registers.get(following(o.register))
        else:
            low, high = self.constants.get(o.constant), self.constants.get(o.constant + 4)
        if low is None or high is None:
            return None
        value = joined(low, high)
        return -value if o.negative else value

    def _put(self, name: str, value: Value, guard: Value) -> None:
        if name in ZERO or name in TRUE or not name:
            return
        if guard is not True:
            old = self._registers.get(name)
            # Of threads that do not write, what was never known is not asked for.
            value = chosen(guard, value, value if old is None and isinstance(guard, np.ndarray) else old)
        self._registers[name] = value

    def _put_pair(self, name: str, value: Value, guard: Value) -> None:
        self._put(name, None if value is None else value & WORD, guard)
        self._put(following(name), None if value is None else value >> 32 & WORD, guard)

    def _address(self, o: Operand) -> Value:
        total: Value = 0
        for term, wide, sign in o.terms:
            if isinstance(term, int):
                total = total + sign * term
                continue
            value = self._registers.get(term)
            if wide:
                high = self._registers.get(following(term))
                value = None if value is None or high is None else joined(value, high)
            if value is None:
                return None
            total = total + sign * value
        return total

    def _barrier(self, i: Instruction) -> int | None:
        """The address of the mbarrier in shared memory that an instruction waits for or lets be released."""
        if i.name in ("UTMALDG", "UTCBAR"):
            terms = i.operands[0].terms
            name = terms[0][0] if terms else ""
            step = 1 if i.name == "UTMALDG" else 0  # behind the address of the tile
            return same(self._registers.get(following(name, step))) if isinstance(name, str) else None
        return same(self._address(i.operands[-2])) if i.name == "SYNCS" and "PHASECHK" in i.modifiers else None

    # What the instructions do. A name with a U before it does the same for all threads together.

    def _handle(self, i: Instruction, guard: Value) -> None:
        handler = _HANDLERS.get(i.name) or _HANDLERS.get(i.name.removeprefix("U"))
        if handler is not None:
            handler(self, i, i.operands, guard)
        elif not i.label:
            self._forget(i, guard)

    def _forget(self, i: Instruction, guard: Value) -> None:
        """What an instruction that is not followed writes is unknown."""
        words = 4 if "MMA" in i.name else width(i.modifiers) // 4
        words = max([words, *(int(m[1:]) for m in i.modifiers if i.name == "LDTM" and m[1:].isdigit())])
        outputs = i.operands[:1] if i.operands and not i.operands[0].is_predicate else i.operands[:2]
        for output in outputs:
            for step in range(max(1, words) if not output.is_predicate else 1):
                self._put(following(output.register, step) if step else output.register, None, guard)

    def _move(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        if "64" in i.modifiers:
            self._put_pair(ops[0].register, self._pair(ops[1]), guard)
        else:
            self._put(ops[0].register, self._word(ops[1]), guard)

    def _half_constants(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        """HFMA2 of zero: how constants are moved without an integer unit, two halves, the upper one first."""
        if ops[1].register != "RZ" or ops[2].register != "RZ" or len(ops) < 5:
            self._forget(i, guard)
            return
        upper, lower = (int(np.float16(o.text).view(np.uint16)) for o in ops[3:5])
        self._put(ops[0].register, upper << 16 | lower, guard)

    def _clear(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        value = 0 if ops[1].register in ZERO else None
        self._put(ops[0].register, value, guard)
        if "32" not in i.modifiers:
            self._put(following(ops[0].register), value, guard)

    def _read_special(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        self._put(ops[0].register, self._special.get(ops[1].text), guard)

    def _load_constant(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        for step in range(max(1, width(i.modifiers) // 4)):
            value = self.constants.get(ops[1].constant + 4 * step) if ops[1].constant >= 0 else None
            self._put(following(ops[0].register, step) if step else ops[0].register, value, guard)

    def _add(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        outputs = 1
        while ops[outputs].is_predicate:
            outputs += 1
        values = [o for o in ops[outputs:] if not o.is_predicate]
        if "64" in i.modifiers:
            pairs = [self._pair(o) for o in values]
            self._put_pair(ops[0].register, None if None in map(_known, pairs) else sum(pairs), guard)
            return
        words = [self._word(o) for o in values]
        carries = [self._predicate(o) for o in ops[outputs:] if o.is_predicate] if "X" in i.modifiers else []
        total: Value = None
        if None not in map(_known, (*words, *carries)):
            total = sum(words) + sum(map(number_of, carries))
            for word, o in zip(words, values, strict=True):
                if outputs > 1 and o.negative and "X" not in i.modifiers:
                    total = total + (number_of(word == 0) << 32)  # a negated word adds 2**32 - it: of 0 that carries
        self._put(ops[0].register, None if total is None else total & WORD, guard)
        for number, output in enumerate(ops[1:outputs]):
            over = None if total is None else (total >> 32) > number
            self._put(output.register, over, guard)

    def _multiply_add(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        output, *carry_out, a_, b_, c_ = ops[: 5 if ops[1].is_predicate else 4]
        a, b = self._word(a_), self._word(b_)
        carry = self._predicate(ops[-1]) if "X" in i.modifiers else False
        if "U32" not in i.modifiers:
            a, b = (None if word is None else signed(word) for word in (a, b))
        moved = a_.register == "RZ" or b_.register == "RZ"  # a move in disguise, whatever the other factor
        product = 0 if moved else None if a is None or b is None else a * b
        wide = "WIDE" in i.modifiers or "HI" in i.modifiers
        c = self._pair(c_) if wide else self._word(c_)
        total = None if product is None or c is None or carry is None else product + c + number_of(carry)
        if "WIDE" in i.modifiers:
            self._put_pair(output.register, total, guard)
        else:
            shift = 32 if "HI" in i.modifiers else 0
            self._put(output.register, None if total is None else total >> shift & WORD, guard)
        for predicate in carry_out:
            known = product is not None and c is not None and wide and "X" not in i.modifiers
            self._put(predicate.register, carries(product, c) if known else None, guard)

    def _shift_add(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        """LEA: (a << shift) + b, or with HI the upper half of that of 64 bits."""
        carry_out = ops[1] if ops[1].is_predicate else None
        values = [o for o in ops[1:] if not o.is_predicate]
        a, b, shift = self._word(values[0]), self._word(values[1]), values[-1].number or 0
        shifted: Value = None
        if "HI" not in i.modifiers:
            shifted = None if a is None else a << shift & WORD
        elif "SX32" in i.modifiers:
            shifted = None if a is None else signed(a) >> 32 - shift & WORD
        else:
            high = self._word(values[2]) if len(values) > 3 else 0
            if a is not None and high is not None:
                shifted = (high << shift | a >> 32 - shift) & WORD
        carry: Value = 0
        if "X" in i.modifiers and ops[-1].is_predicate:
            predicate = self._predicate(ops[-1])
            carry = None if predicate is None else number_of(predicate)
        total = None if shifted is None or b is None or carry is None else shifted + b + carry
        self._put(ops[0].register, None if total is None else total & WORD, guard)
        if carry_out is not None:
            self._put(carry_out.register, None if total is None else total > WORD, guard)

    def _shift(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        low, by, high = (self._word(o) for o in ops[1:4])
        left, upper = "L" in i.modifiers, "HI" in i.modifiers
        is_signed = "S32" in i.modifiers or "S64" in i.modifiers
        value: Value = None
        if by is not None:
            by = min(by, 63) if isinstance(by, int) else np.minimum(by, 63)
            if left and not upper:
                value = None if low is None else low << by & WORD
            elif low is not None and high is not None:
                if left:
                    value = (joined(low, high) << by) >> 32 & WORD
                elif upper:
                    value = (signed(high) if is_signed else high) >> by & WORD
                else:
                    value = joined(low, high) >> by & WORD
        self._put(ops[0].register, value, guard)

    def _logic(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        first = 1 if ops[0].is_predicate else 0
        words = [self._word(o) for o in ops[first + 1 : first + 4]]
        result = None if None in map(_known, words) else logic(ops[first + 4].number or 0, *words)
        self._put(ops[first].register, result, guard)
        if first:
            self._put(ops[0].register, None if result is None else result != 0, guard)

    def _predicate_logic(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        values = [self._predicate(o) for o in ops[2:5]]
        for output, table in ((ops[0], ops[5]), (ops[1], ops[6])):
            self._put(output.register, predicate_logic(table.number or 0, values), guard)

    def _compare(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        how, wide = i.modifiers[0], "U64" in i.modifiers or "S64" in i.modifiers
        a, b = (self._pair(o) if wide else self._word(o) for o in ops[2:4])
        result: Value = None
        if a is not None and b is not None:
            if "U32" not in i.modifiers and not wide:
                a, b = signed(a), signed(b)
            if "EX" in i.modifiers:  # the upper halves, and what came of the lower ones
                strict = {"GE": "GT", "LE": "LT", "EQ": "NE"}.get(how, how)
                result = chosen(a == b, self._predicate(ops[5]), False if how == "EQ" else compared(strict, a, b))
            else:
                result = compared(how, a, b)
        combine, other = either if "OR" in i.modifiers else both, self._predicate(ops[4])
        self._put(ops[0].register, combine(result, other), guard)
        self._put(ops[1].register, combine(negation(result), other), guard)

    def _select(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        wide = "64" in i.modifiers
        values = [self._pair(o) if wide else self._word(o) for o in ops[1:3]]
        (self._put_pair if wide else self._put)(ops[0].register, chosen(self._predicate(ops[3]), *values), guard)

    def _least(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        """Minimum, or maximum where the predicate is false; VIADDMNMX adds the first two before."""
        if "U64" in i.modifiers or "S64" in i.modifiers:  # of pairs; behind the predicate stands that of a longer chain
            output, a, b = (o for o in ops if not o.is_predicate)
            pairs, least = [self._pair(a), self._pair(b)], self._predicate(ops[-2])
            known = None not in map(_known, pairs) and isinstance(least, bool)
            pair = (np.minimum(*pairs) if least else np.maximum(*pairs)) if known else None
            self._put_pair(output.register, int(pair) if isinstance(pair, np.integer) else pair, guard)
            return
        words, least = [self._word(o) for o in ops[1:] if not o.is_predicate], self._predicate(ops[-1])
        value: Value = None
        if None not in map(_known, words) and isinstance(least, bool):
            if len(words) == 3:
                words = [words[0] + words[1] & WORD, words[2]]
            if "U32" not in i.modifiers:
                words = [signed(word) for word in words]
            value = words_of(np.minimum(*words) if least else np.maximum(*words))
        self._put(ops[0].register, value, guard)

    def _extend(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        word, size = self._word(ops[1]), self._word(ops[2])
        value: Value = None
        if word is not None and isinstance(size, int):
            value = word & (1 << size) - 1
            if "U32" not in i.modifiers:
                sign = 1 << size - 1
                value = (value ^ sign) - sign & WORD
        self._put(ops[0].register, value, guard)

    def _absolute(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        word = self._word(ops[1])
        self._put(ops[0].register, None if word is None else abs(signed(word)), guard)

    def _permute(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        a, control, b = (self._word(o) for o in ops[1:4])
        value: Value = None
        if a is not None and b is not None and isinstance(control, int) and not i.modifiers:
            value = 0
            for place in range(4):
                pick = control >> 4 * place & 15
                byte = (b if pick & 4 else a) >> 8 * (pick & 3) & 255
                value = value | ((byte >> 7) * 255 if pick & 8 else byte) << 8 * place
        self._put(ops[0].register, value, guard)

    def _to_float(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        word = self._word(ops[1])
        value: Value = None
        if word is not None and "RP" in i.modifiers:  # rounded up, as divisions want it
            exact = np.asarray(signed(word) if "S32" in i.modifiers else word, np.float64)
            near = exact.astype(np.float32)
            value = bits(np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near))
        self._put(ops[0].register, value, guard)

    def _special_function(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        word = self._word(ops[1]) if "RCP" in i.modifiers else None
        with np.errstate(all="ignore"):
            value = None if word is None else bits(np.float32(1) / float_of(word))
        self._put(ops[0].register, value, guard)

    def _to_integer(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        word = self._word(ops[1])
        value: Value = None
        if word is not None and "TRUNC" in i.modifiers:
            value = words_of(np.clip(np.nan_to_num(float_of(word).astype(np.float64)), 0, WORD))
        self._put(ops[0].register, value, guard)

    def _elect(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        self._put(ops[0].register, self._lane == 0, guard)

    def _vote(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        value = self._predicate(ops[-1])
        result = None if value is None else some(value) if "ANY" in i.modifiers else every(value)
        for output in ops[:-1]:
            self._put(output.register, result if output.is_predicate else None, guard)

    def _predicates_to_word(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        mask, value = ops[3].number or 0, self._word(ops[2])
        value = None if value is None else value & ~mask & WORD
        for bit in range(7):
            if mask >> bit & 1 and value is not None:
                predicate = self._registers.get(f"P{bit}")
                value = None if predicate is None else value | number_of(predicate) << bit
        self._put(ops[0].register, value, guard)

    def _word_to_predicates(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        word, mask = self._word(ops[1]), ops[2].number or 0
        for bit in range(7):
            if mask >> bit & 1:
                self._put(f"P{bit}", None if word is None else (word >> bit & 1) != 0, guard)

    def _shuffle(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        self._latency = SHARED_LATENCY
        word, lane = self._word(ops[2]), self._word(ops[3])
        value: Value = None
        if "IDX" in i.modifiers and word is not None and lane is not None:
            value = self._of_each(word)[np.arange(self.threads) & ~31 | self._of_each(lane) & 31]
        self._put(ops[1].register, value, guard)

    def _synchronise(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        if "PHASECHK" in i.modifiers:
            self._put(ops[0].register, True, guard)

    def _tensor_memory(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        """Columns of tensor memory are asked for, and there."""
        if "FIND_AND_SET" in i.modifiers:
            self._put(ops[0].register, True, guard)
            self._put(ops[1].register, 0, guard)

    def _load_box(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        if guard is None or some(guard):
            self.trace.box_loads[i.modifiers[0]] += 1

    def _multiply(self, i: Instruction) -> float:
        """Cycles that a matrix instruction takes the tensor cores that it uses."""
        flops, share = matrix_flops(i), 1.0
        for o in i.operands:
            if o.text.startswith("idesc["):  # one for the whole block, whose sides are in a register
                sides = same(self._registers.get(str(o.terms[0][0])))
                if sides is None:
                    raise ValueError(f"{i.opcode} of a tile whose size is not known")
                m, n, share = (sides >> 24 & 31) << 4, (sides >> 17 & 63) << 3, self.threads / 128
                flops = 2.0 * m * n * 16 / (self.threads // 32)
        cycles = flops / self._flops_per_cycle(i.name)
        self.trace.matrix_flops += flops
        self.trace.matrix_cycles += cycles
        return cycles * share

    # Memory.

    def _of_each(self, value: Value) -> Any:
        return np.full(self.threads, value) if isinstance(value, int) else value

    def _active(self, *guards: Value) -> Any:
        """The threads that take part; what is not known may."""
        active = self._everyone
        for guard in guards:
            if guard is not None and guard is not True:
                active = active & guard
        return active

    def _count_sectors(self, i: Instruction, address: Value, active: Any, cached: bool) -> int:
        if address is None:
            return -(-int(active.sum()) * width(i.modifiers) >> SECTOR_BITS)
        wanted = sectors(self._of_each(address), active)
        if not cached:
            return len(wanted)
        fresh = set((wanted & (1 << 52) - 1).tolist()) - self._in_l1
        self._in_l1 |= fresh
        return len(fresh)

    def _load(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        source = next(o for o in ops if "[" in o.text)
        cached = "STRONG" not in i.modifiers
        count = self._count_sectors(i, self._address(source), self._active(guard), cached)
        self.trace.load_sectors += count
        self._latency = L2_LATENCY if count else L1_LATENCY
        self._forget(i, guard)

    def _store(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        self.trace.store_sectors += self._count_sectors(i, self._address(ops[0]), self._active(guard), False)

    def _copy(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        """LDGSTS: from global to shared memory; where its own predicate is false, zeros."""
        self._latency = L2_LATENCY
        wanted = self._predicate(ops[2]) if len(ops) > 2 else True
        active = self._active(guard)
        read = self._count_sectors(i, self._address(ops[1]), self._active(guard, wanted), "BYPASS" not in i.modifiers)
        self.trace.load_sectors += read
        self._touch_shared(i, self._address(ops[0]), active)

    def _atomic(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        self._latency = L2_LATENCY
        self.trace.load_sectors += 1
        for output in ops[:2]:
            if output.register and not output.is_predicate:
                self._put(output.register, self.arrival, True)

    def _touch_shared(self, i: Instruction, address: Value, active: Any) -> None:
        size = width(i.modifiers)
        matrices = int(i.modifiers[-1]) if i.name == "LDSM" and i.modifiers[-1].isdigit() else 1
        if address is None:
            ideal = self.threads // 32 * matrices if i.name == "LDSM" else -(-int(active.sum()) * size // 128)
            self.trace.shared_wavefronts += ideal
            return
        where = self._of_each(address)
        key = (i.opcode, (where - (int(where[0]) & ~127)).tobytes(), active.tobytes())
        if key not in self._conflicts:
            if i.name == "LDSM":
                rows = where.reshape(-1, 32)[:, : 8 * matrices].reshape(-1, 8)
                self._conflicts[key] = wavefronts(rows, np.ones(rows.shape, bool), 16)
            else:
                lanes = 32 * 4 // max(size, 4)
                self._conflicts[key] = wavefronts(where.reshape(-1, lanes), active.reshape(-1, lanes), size)
        self.trace.shared_wavefronts += self._conflicts[key]

    def _load_shared(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        self._latency = SHARED_LATENCY
        address = self._address(ops[1])
        self._touch_shared(i, address, self._active(guard))
        if i.name == "LDSM":
            for step in range(4):
                self._put(following(ops[0].register, step) if step else ops[0].register, None, guard)
            return
        self._forget(i, guard)
        at = same(address)
        if at is not None and width(i.modifiers) == 4:
            self._put(ops[0].register, self._shared.get(at), guard)

    def _store_shared(self, i: Instruction, ops: Sequence[Operand], guard: Value) -> None:
        """What one thread leaves for all, at one address, is remembered."""
        address, active = self._address(ops[0]), self._active(guard)
        self._touch_shared(i, address, active)
        at = same(address)
        if at is not None and width(i.modifiers) == 4 and active.any():
            word = self._word(ops[1])
            self._shared[at] = same(word[active]) if isinstance(word, np.ndarray) else word


def _known(value: Value) -> bool | None:
    """None of what is None; comparing an array with None would compare each word."""
    return None if value is None else True


_HANDLERS: dict[str, Any] = {
    **dict.fromkeys(("MOV", "R2UR"), Block._move),
    "HFMA2": Block._half_constants,
    "CS2R": Block._clear,
    **dict.fromkeys(("S2R", "S2UR"), Block._read_special),
    **dict.fromkeys(("LDC", "LDCU", "ULDC"), Block._load_constant),
    **dict.fromkeys(("IADD3", "IADD", "VIADD"), Block._add),
    "IMAD": Block._multiply_add,
    "LEA": Block._shift_add,
    "SHF": Block._shift,
    "LOP3": Block._logic,
    "PLOP3": Block._predicate_logic,
    "ISETP": Block._compare,
    "SEL": Block._select,
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX"), Block._least),
    "SGXT": Block._extend,
    "IABS": Block._absolute,
    "PRMT": Block._permute,
    "I2F": Block._to_float,
    "MUFU": Block._special_function,
    "F2I": Block._to_integer,
    "ELECT": Block._elect,
    **dict.fromkeys(("VOTE", "VOTEU"), Block._vote),
    "P2R": Block._predicates_to_word,
    "R2P": Block._word_to_predicates,
    "SHFL": Block._shuffle,
    "SYNCS": Block._synchronise,
    "UTCATOMSWS": Block._tensor_memory,
    "UTMALDG": Block._load_box,
    "LDG": Block._load,
    "STG": Block._store,
    "LDGSTS": Block._copy,
    "ATOMG": Block._atomic,
    **dict.fromkeys(("LDS", "LDSM"), Block._load_shared),
    "STS": Block._store_shared,
}


class _Clock:
    """When one warp issues its instructions, if no other is in its way.

    Stalls and scoreboards are the compiler's; how long a scoreboard is held is the least latency of its kind.
    """

    def __init__(self) -> None:
        self.now = 0
        self._released = [0] * 8
        self._copied, self._copies = 0, [0]  # asynchronous copies since the last group, and the groups
        self._tensor_free, self._products = 0.0, [0.0]  # the same of matrix instructions
        self._barriers: dict[int, float] = {}

    def issue(self, i: Instruction, latency: int, barrier: int | None, busy: float, executed: bool) -> None:
        """
        Args:
            latency: until its result is there.
            barrier: the mbarrier that it waits for, or that its end releases.
            busy: cycles that it takes its tensor core.
            executed: whether any thread's predicate holds.
        """
        now = max([self.now, *(self._released[board] for board in i.waits)])
        left = i.operands[-1].number or 0 if i.operands else 0  # groups that may stay on their way
        if i.name == "DEPBAR" and len(i.operands) > 1:
            now = max(now, self._copies[max(0, len(self._copies) - 1 - left)])
        elif i.name == "WARPGROUP" and "DEPBAR" in i.modifiers:
            now = int(max(now, self._products[max(0, len(self._products) - 1 - left)]))
        elif i.name == "SYNCS" and barrier is not None:
            now = int(max(now, self._barriers.get(barrier, 0)))
        elif i.name == "LDGSTS":
            self._copied = now + latency
        elif i.name == "LDGDEPBAR":
            self._copies.append(max(self._copied, self._copies[-1]))
        elif i.name == "UTMALDG" and executed and barrier is not None:
            self._barriers[barrier] = now + BOX_LATENCY
        elif i.name == "UTCBAR" and executed and barrier is not None:
            self._barriers[barrier] = self._tensor_free
        elif busy:
            start = max(now, self._tensor_free)
            self._tensor_free = start + busy
            if i.name == "HMMA":  # waits in front of its tensor core, the later kinds behind one another
                now = int(start)
            if any(o.text.startswith("gsb") for o in i.operands):
                self._products.append(self._tensor_free)
        if i.sets < 6 and i.name not in ("LDGSTS", "LDGDEPBAR"):
            self._released[i.sets] = max(self._released[i.sets], now + latency)
        if i.reads < 6:
            self._released[i.reads] = max(self._released[i.reads], now + OTHER_LATENCY)
        self.now = now + i.stall
