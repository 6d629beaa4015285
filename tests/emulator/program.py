"""PTX as Triton emits it, parsed: a kernel's parameters with their offsets, its instructions with their operands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SIZES = {"u64": 8, "u32": 4, "f32": 4, "b8": 1, "u8": 1, "u16": 2}
_PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.(\w+)[^,)\[]*?(\w+)(?:\[(\d+)\])?\s*[,)]")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$")
_LABEL = re.compile(r"(\$?\w+):(?!:)\s*")


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, or of a TMA load `[base, {coordinates}]`."""

    base: str
    offset: int
    coordinates: tuple[str, ...] = ()


Operand = str | tuple[str, ...] | Address


def vector(operand: Operand) -> tuple[str, ...]:
    """The registers of a vector, or the one there is."""
    assert isinstance(operand, str | tuple)
    return (operand,) if isinstance(operand, str) else operand


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op, parts: the opcode, and split at its dots.
        args: its operands: registers and constants as they are written, vectors as tuples.
        guard: (whether it is negated, predicate register).
        source: where in the Triton kernel it comes from.
        target: of a branch, the index of an instruction.
    """

    op: str
    parts: tuple[str, ...]
    args: tuple[Operand, ...]
    guard: tuple[bool, str] | None
    source: str
    target: int


@dataclass(frozen=True)
class Program:
    """A kernel: its parameters as (offset, bytes), its registers' widths in bits by prefix (0: predicates)."""

    name: str
    threads: int
    parameters: Mapping[str, tuple[int, int]]
    registers: Mapping[str, int]
    code: tuple[Instruction, ...]

    @property
    def parameter_bytes(self) -> int:
        return max(offset + size for offset, size in self.parameters.values())


def parse(text: str) -> Program:
    """Raises ValueError for what is no kernel of a fixed number of threads, or no statement."""
    entry = re.search(r"\.entry (\w+)\((.*?\))\s*\.reqntid (\d+).*?\n\{(.*?)\n\$L__func_end", text, re.DOTALL)
    if entry is None:
        raise ValueError("expected PTX with one .entry and its .reqntid")
    name, header, threads, body = entry.groups()
    registers = re.findall(r"\.reg \.(pred|b\d+)\s+([%\w]+?)(?:<\d+>)?;", body)
    widths = {prefix: 0 if kind == "pred" else int(kind[1:]) for kind, prefix in registers}
    return Program(name, int(threads), _parameters(header), widths, _code(body))


def _parameters(header: str) -> dict[str, tuple[int, int]]:
    parameters, offset = {}, 0
    for align, kind, name, count in _PARAMETER.findall(header):
        size = _SIZES[kind] * int(count or 1)
        unit = int(align or _SIZES[kind])
        offset = -(-offset // unit) * unit
        parameters[name] = (offset, size)
        offset += size
    return parameters


def _code(body: str) -> tuple[Instruction, ...]:
    found: list[tuple[str, str, int]] = []  # statement, source, the innermost scope it lies in
    labels: dict[tuple[int, str], int] = {}
    source, scopes, opened = "", [0], 0
    for raw in body.splitlines():
        line, _, comment = (part.strip() for part in raw.partition("//"))
        if line.startswith(".loc"):
            source = comment
        elif line == "{":
            opened += 1
            scopes.append(opened)
        elif line == "}":
            scopes.pop()
        for statement in (part.strip() for part in line.strip("{}" if line in "{}" else "").split(";")):
            while label := _LABEL.match(statement):
                labels[0 if label[1].startswith("$") else scopes[-1], label[1]] = len(found)
                statement = statement[label.end() :]
            if statement and not statement.startswith("."):
                found.append((statement, source, scopes[-1]))
    return tuple(_instruction(*one, labels) for one in found)


def _instruction(statement: str, source: str, scope: int, labels: Mapping[tuple[int, str], int]) -> Instruction:
    match = _STATEMENT.match(statement)
    if match is None:
        raise ValueError(f"expected a statement of PTX, got {statement!r}")
    negated, predicate, op, operands = match.groups()
    args = tuple(_operand(text) for text in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if text.strip())
    target = -1
    if op.startswith("bra"):
        target = labels[0 if operands.startswith("$") else scope, operands]
    guard = (negated == "!", predicate) if predicate else None
    return Instruction(op, tuple(op.split(".")), args, guard, source, target)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{}").split(","))
    if not text.startswith("["):
        return text
    base, _, coordinates = text.strip("[] ").partition(",")
    base, _, offset = base.partition("+")
    return Address(base.strip(), int(offset or 0), tuple(x.strip() for x in coordinates.strip(" {}").split(",") if x))
