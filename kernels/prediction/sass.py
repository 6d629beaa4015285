"""Machine code as `nvdisasm -c -hex` prints it: instructions, their operands and the compiler's scheduling of them."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_LINE = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)"
    r"\s*;?\s*\}?\s*/\* 0x[0-9a-f]{16} \*/"
)
_HIGH_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"`\((\.L\w+)\)")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
_REGISTER = re.compile(r"(UR|R|UP|P)(\d+)")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
ZERO = ("RZ", "URZ", "SRZ")
TRUE = ("PT", "UPT")


class Operand(NamedTuple):
    """One operand.

    Attributes:
        text: as nvdisasm writes it.
        register: its name, where it is one; RZ, URZ, PT and UPT have one too.
        constant: its offset in the constant bank, where it lies there; else -1.
        number: its value, where it is one.
        terms: of an address, what is added up: (register or number, whether it is 64 bits wide, sign).
        negative, inverted, absolute: what is done to it first; of a predicate, `inverted` is its negation.
    """

    text: str
    register: str = ""
    constant: int = -1
    number: int | None = None
    terms: tuple[tuple[str | int, bool, int], ...] = ()
    negative: bool = False
    inverted: bool = False
    absolute: bool = False

    @property
    def is_predicate(self) -> bool:
        return "P" in self.register


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        guard: the predicate that it is executed under; None is always.
        opcode: mnemonic and modifiers, with dots between them.
        name, modifiers: the same apart.
        operands: outputs first.
        label: where it branches.
        stall: cycles until the warp can issue the next one.
        sets, reads: the scoreboard that is released when its result is there, or its sources are read; 7 is none.
        waits: scoreboards that it waits for.
    """

    guard: Operand | None
    opcode: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    label: str
    stall: int
    sets: int
    reads: int
    waits: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """Instructions in order, and where each label points."""

    instructions: Sequence[Instruction]
    labels: Mapping[str, int]


@functools.lru_cache(maxsize=16)
def parse(sass: str) -> Code:
    """The instructions of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = sass.splitlines()
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        found, high = _LINE.match(line), _HIGH_WORD.match(lines[number + 1]) if number + 1 < len(lines) else None
        if found is None or high is None:
            continue
        guard, opcode, operands = found.groups()
        name, *modifiers = opcode.split(".")
        branch = _BRANCH.search(operands)
        control = int(high[1], 16) >> 41
        instructions.append(
            Instruction(
                guard=None if guard in (None, *TRUE) else _operand(guard),
                opcode=opcode,
                name=name,
                modifiers=tuple(modifiers),
                operands=tuple(_operand(part.strip()) for part in operands.split(",")) if operands else (),
                label=branch[1] if branch else "",
                stall=max(1, control & 15),
                sets=control >> 5 & 7,
                reads=control >> 8 & 7,
                waits=tuple(board for board in range(6) if control >> 11 + board & 1),
            )
        )
    return Code(tuple(instructions), labels)


@functools.cache
def _operand(text: str) -> Operand:
    body = text.replace(".reuse", "")
    negative, inverted = body.startswith("-"), body[0] in "~!"
    body = body.lstrip("-~!")
    absolute = body.startswith("|")
    body = body.strip("|")
    if "[" in body and not body.startswith("c["):
        return Operand(text, terms=_address(body[body.rindex("[") + 1 : body.rindex("]")]))
    if constant := _CONSTANT.fullmatch(body):
        return Operand(text, "", int(constant[1], 16), None, (), negative, inverted, absolute)
    name, _, part = body.partition(".")
    if name in (*ZERO, *TRUE) or _REGISTER.fullmatch(name):
        if part and part not in ("64", "U32", "S32"):  # a half or a byte of it
            return Operand(text)
        return Operand(text, name, -1, None, (), negative, inverted, absolute)
    if _NUMBER.fullmatch(body):
        number = int(body, 16 if body.startswith("0x") else 10)
        return Operand(text, number=-number if negative else number)
    return Operand(text)


def _address(text: str) -> tuple[tuple[str | int, bool, int], ...]:
    terms: list[tuple[str | int, bool, int]] = []
    for term in re.findall(r"[+-]?[^+-]+", text):
        sign, body = -1 if term[0] == "-" else 1, term.lstrip("+-")
        name, _, part = body.partition(".")
        if name in ZERO:
            continue
        terms.append((int(body, 16) if _NUMBER.fullmatch(body) else name, part == "64", sign))
    return tuple(terms)


@functools.cache
def following(name: str, steps: int = 1) -> str:
    """The register after one: the other half of 64 bits."""
    found = _REGISTER.fullmatch(name)
    return f"{found[1]}{int(found[2]) + steps}" if found else name


def width(modifiers: Sequence[str]) -> int:
    """Bytes per thread that an access to memory has."""
    for modifier in modifiers:
        if modifier in ("128", "64"):
            return int(modifier) // 8
        if modifier in ("U16", "S16"):
            return 2
        if modifier in ("U8", "S8"):
            return 1
    return 4


def matrix_flops(instruction: Instruction) -> float:
    """Multiplications and additions of one warp's share of a matrix instruction; 0 for any other.

    HMMA.16816 multiplies 16x8 by 16; four warps share an HGMMA.64x32x16.
    """
    if instruction.name in ("HMMA", "IMMA") and instruction.modifiers[0].isdigit():
        digits = instruction.modifiers[0]
        return 2.0 * int(digits[:2]) * 8 * int(digits[3:])
    if instruction.name in ("HGMMA", "IGMMA"):
        m, n, k = map(int, instruction.modifiers[0].split("x"))
        return 2.0 * m * n * k / 4
    return 0.0
