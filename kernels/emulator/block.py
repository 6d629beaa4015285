"""One block of a launch: its registers, and its control flow, all threads at once.

Threads that part at a branch are run lowest instruction first, which is where they meet again. Instructions register
themselves with a pattern of the opcodes that they implement to the last modifier; any other is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Optional

import numpy as np

from kernels.emulator.memory import Memory
from kernels.emulator.program import Address, Instruction, Operand, Program
from kernels.emulator.report import Report, Stopped
from kernels.emulator.shared import SharedMemory
from kernels.emulator.traffic import Traffic
from kernels.emulator.values import UNDEFINED, UNSIGNED, Array, decode, encode, width

if TYPE_CHECKING:
    from kernels.emulator.boxes import Barrier, BoxLoad
    from kernels.emulator.tensor_cores import Wgmma

# Of an instruction: the block, the instruction, and which threads run it (None: all).
Handler = Callable[["Block", Instruction, Optional[Array]], None]  # noqa: UP045  a value
_HANDLERS: list[tuple[re.Pattern[str], Handler]] = []
_CONTROL = re.compile(r"bra(\.uni)?|ret|exit|bar\.sync|barrier\.sync(\.aligned)?")
_MOST_STEPS = 200_000  # of a block; the longest here take some 50,000


class UnknownInstruction(Exception):
    """The emulator does not know an instruction of a kernel, which it therefore does not run."""


def instruction(pattern: str) -> Callable[[Handler], Handler]:
    """Makes a function the implementation of the opcodes that match `pattern` wholly."""

    def register(function: Handler) -> Handler:
        _HANDLERS.append((re.compile(pattern), function))
        return function

    return register


@cache
def handler_of(op: str) -> Handler | None:
    """What runs an opcode; None is control flow, which `Block.run` does. Raises UnknownInstruction."""
    if _CONTROL.fullmatch(op):
        return None
    for pattern, handler in _HANDLERS:
        if pattern.fullmatch(op):
            return handler
    raise UnknownInstruction(op)


class Block:
    """Block number `index` of a grid, at `position`."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        parameters: Array,
        grid: tuple[int, ...],
        index: int,
        shared_bytes: int,
        report: Report,
        dependent: bool,
        traffic: Traffic | None,
    ) -> None:
        self.program, self.memory, self.parameters, self.index = program, memory, parameters, index
        self.report, self.traffic, self.threads = report, traffic, program.threads
        self.shared = SharedMemory(shared_bytes, self.defect)
        x, y, _ = grid
        position = (index % x, index // x % y, index // (x * y))
        every = np.arange(self.threads)
        self.warp, self.lane = every // 32, every % 32
        self.registers: dict[str, Array] = {
            "%tid.x": every.astype(np.uint32),
            "%laneid": self.lane.astype(np.uint32),
            **{f"%ctaid.{axis}": self._all(at) for axis, at in zip("xyz", position, strict=True)},
            **{f"%nctaid.{axis}": self._all(size) for axis, size in zip("xyz", grid, strict=True)},
            **{name: self._all(offset) for name, (offset, _) in program.parameters.items()},
            **{f"%tid.{axis}": self._all(0) for axis in "yz"},
            "global_smem": self._all(0),
        }
        self._constants: dict[tuple[str, int], Array] = {}
        self.waited = not dependent  # for the kernel before, under programmatic dependent launch
        self.released = not dependent  # the next kernel
        self.copies: list[tuple[Array, Array, Array]] = []  # under way: cells, warps, data
        self.copy_groups: list[list[tuple[Array, Array, Array]]] = []
        self.barriers: dict[int, Barrier] = {}
        self.box_loads: list[BoxLoad] = []
        self.wgmmas: list[Wgmma] = []  # not committed
        self.wgmma_groups: list[list[Wgmma]] = []
        self.fenced: dict[int, Array] = {}  # what registers held at the last wgmma.fence, by identity
        self.current = program.code[0]

    def _all(self, value: int) -> Array:
        return np.full(self.threads, value, np.uint32)

    def defect(self, kind: str, detail: str = "") -> None:
        self.report.add(kind, f"{self.current.op} at {self.current.source}", self.index, detail)

    def require_all(self, mask: Array | None) -> None:
        if mask is not None:
            self.defect("warp-wide instruction with lanes missing")

    # Registers.

    def bits(self, operand: Operand, size: int) -> Array:
        """[threads] unsigned of `size` bytes: a register, of which the low bytes, or a constant."""
        assert isinstance(operand, str)
        value = self.registers.get(operand)
        if value is None:
            value = self._constant(operand, size) if operand[0] != "%" else self._undefined(operand)
        return value if value.itemsize == size else value.astype(UNSIGNED[size])

    def get(self, operand: Operand, kind: str) -> Array:
        """An operand as numbers of a type."""
        return decode(self.bits(operand, width(kind)), kind)

    def _constant(self, text: str, size: int) -> Array:
        if (text, size) not in self._constants:
            name, _, offset = text.partition("+")
            if name == "global_smem":
                value = int(offset)
            else:
                value = int(text[2:], 16) if text.startswith("0f") else int(text.rstrip("U"), 0)
            self._constants[text, size] = np.full(self.threads, value & (2 ** (8 * size) - 1), UNSIGNED[size])
        return self._constants[text, size]

    def _undefined(self, name: str) -> Array:
        self.defect("note: register nobody wrote", name)
        return np.full(self.threads, UNDEFINED, np.uint64)

    def _held(self, name: str) -> Array:
        if name not in self.registers:
            self.defect("fatal: predicate or address nobody wrote", name)
            raise Stopped
        return self.registers[name]

    def predicate(self, operand: Operand) -> Array:
        assert isinstance(operand, str)
        name = operand.lstrip("!")
        value = np.full(self.threads, int(name) != 0) if name.lstrip("-").isdigit() else self._held(name)
        return ~value if operand[0] == "!" else value

    def put(self, operand: Operand, value: Array, mask: Array | None) -> None:
        """Set a register, to unsigned bits or a predicate, in the threads of the mask."""
        assert isinstance(operand, str)
        if operand == "_":
            return
        if value.dtype != bool:
            size = self.program.registers[operand.rstrip("0123456789")] // 8
            value = value if value.itemsize == size else value.astype(UNSIGNED[size])
        if mask is not None:
            before = self.registers.get(operand)
            if before is None:
                before = np.array(False if value.dtype == bool else UNDEFINED & (2 ** (8 * value.itemsize) - 1))
            value = np.where(mask, value, before).astype(value.dtype)
        self.registers[operand] = value

    def set(self, operand: Operand, value: Array, kind: str, mask: Array | None) -> None:
        """Set a register to numbers of a type."""
        self.put(operand, encode(value, kind), mask)

    def addresses(self, operand: Operand) -> Array:
        """[threads] int64."""
        assert isinstance(operand, Address)
        base = self._held(operand.base).astype(np.int64)
        return base + operand.offset if operand.offset else base

    def selected(self, mask: Array | None) -> Array:
        """The threads of a mask by number."""
        return np.arange(self.threads) if mask is None else np.nonzero(mask)[0]

    # Global memory.

    def load(self, address: Array, size: int, warps: Array) -> Array:
        """Offsets into memory of loads of `size` bytes by warps [n] at addresses [n]."""
        return self._access(address, size, warps, False)

    def store(self, address: Array, size: int, warps: Array) -> Array:
        """Offsets into memory of stores."""
        return self._access(address, size, warps, True)

    def _access(self, address: Array, size: int, warps: Array, writing: bool) -> Array:
        offset, cells, defects = self.memory.offsets(address, size, writing)
        for kind, detail in defects:
            self.defect(kind, detail)
            if kind.startswith("fatal"):
                raise Stopped
        verb, epoch = "write" if writing else "read", self.shared.epoch
        if not self.waited:
            self.defect("global access before griddepcontrol.wait")
        if not writing and not (written := self.memory.written[cells].all(1)).all():
            self.defect("read of global memory nobody wrote", self.memory.name(int(offset[~written][0])))
        if not self.memory.is_ordered(cells, warps, self.index, epoch):
            self.defect(f"race: {verb} of what another block wrote, not ordered", self.memory.name(int(offset[0])))
        if self.memory.other_warp_wrote(cells, warps, self.index, epoch):
            self.defect(f"race: {verb} after write in global memory, no barrier between")
        if writing:
            self.memory.note_write(cells, warps, self.index, epoch)
        return offset

    # Control flow.

    def run(self) -> Iterator[None]:
        """Runs to the end; yields where other blocks may have their turn: at barriers and before atomics."""
        everyone = np.ones(self.threads, bool)
        live, pc, apart = everyone, 0, None  # apart: of each thread its next instruction, once they differ
        for _ in range(_MOST_STEPS):
            active = live
            if apart is not None:
                pc = int(apart[live].min())
                active = live & (apart == pc)
            if pc == len(self.program.code):
                self.defect("a block that runs beyond its end")
                raise Stopped
            self.current = i = self.program.code[pc]
            mask = active
            if i.guard is not None:
                negated, name = i.guard
                mask = active & (self.predicate(name) ^ negated)
            handler, name = handler_of(i.op), i.parts[0]
            if handler is not None:
                if name == "atom":
                    yield
                if mask is everyone or mask.all():
                    handler(self, i, None)
                elif mask.any():
                    handler(self, i, mask)
            elif name in ("ret", "exit"):
                live = live & ~mask
                if not live.any():
                    break
            elif name != "bra":
                if i.args != ("0",):
                    raise UnknownInstruction(f"{i.op} of some threads")
                if mask is not everyone:
                    self.defect("barrier that not all threads reach")
                self.shared.epoch += 1
                yield
            if apart is None and name != "bra":
                pc += 1
                continue
            following = np.where(mask, i.target, pc + 1) if name == "bra" else np.full(self.threads, pc + 1)
            apart = following if apart is None else np.where(active, following, apart)
            ahead = apart[live]
            if (ahead == ahead[0]).all():
                pc, apart = int(ahead[0]), None
        else:
            self.defect("a block that does not end")
            raise Stopped
        for under_way, what in (
            (any(cells.size for group in (*self.copy_groups, self.copies) for cells, _, _ in group), "async copies"),
            (any((*self.wgmma_groups, self.wgmmas)), "wgmmas"),
            (self.box_loads, "TMA loads"),
        ):
            if under_way:
                self.defect(f"{what} never waited for")
        for happened, what in ((self.waited, "waits for the previous kernel"), (self.released, "releases the next")):
            if not happened:
                self.defect(f"a block that never {what}")
