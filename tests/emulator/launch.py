"""Execution of one launch: every block of the grid or some of them, one after the other or in turns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from tests.emulator import accesses, arithmetic, boxes, tensor_cores
from tests.emulator.block import Block, UnknownInstruction, handler_of
from tests.emulator.memory import Memory
from tests.emulator.program import Program
from tests.emulator.report import Report, Stopped
from tests.emulator.traffic import Traffic
from tests.emulator.values import Array

INSTRUCTIONS = (accesses, arithmetic, boxes, tensor_cores)  # what `instruction` has registered by now
_AT_ONCE = 8  # blocks that take turns


def unknown_instructions(program: Program) -> list[str]:
    """The opcodes that the emulator does not run."""
    found = []
    for op in dict.fromkeys(i.op for i in program.code):
        try:
            handler_of(op)
        except UnknownInstruction:
            found.append(op)
    return found


def execute(
    program: Program,
    memory: Memory,
    parameters: Array,
    grid: Sequence[int],
    shared_bytes: int,
    *,
    blocks: Sequence[int] | None = None,
    in_turns: bool = False,
    dependent: bool = False,
    traffic: Traffic | None = None,
) -> Report:
    """Run a launch on `memory`, whose bytes are then what the kernel leaves.

    Args:
        parameters: the kernel's, as bytes at their offsets; tensor maps as `TensorMap.pack` writes them.
        grid: blocks along each axis.
        shared_bytes: of dynamic shared memory.
        blocks: which, by number; by default all.
        in_turns: several at once, changing at barriers and atomics in an order of chance; else one after the other.
        dependent: under programmatic dependent launch, for which every block has to wait and which it has to allow.
        traffic: where to count requests to memory.

    Raises:
        UnknownInstruction: naming the first that the emulator does not know; nothing has been run.
    """
    if unknown := unknown_instructions(program):
        raise UnknownInstruction(unknown[0] + (f" and {len(unknown) - 1} more" if unknown[1:] else ""))
    report, whole = Report(), (*grid, 1, 1)[:3]
    chosen = [*range(math.prod(grid))] if blocks is None else [*blocks]
    rng = np.random.default_rng(0)
    if in_turns:
        rng.shuffle(chosen)
    running: list[Iterator[None]] = []
    while chosen or running:
        while chosen and len(running) < (_AT_ONCE if in_turns else 1):
            block = Block(program, memory, parameters, whole, chosen.pop(0), shared_bytes, report, dependent, traffic)
            running.append(block.run())
        turn = int(rng.integers(len(running)))
        try:
            with np.errstate(all="ignore"):  # a GPU's arithmetic wraps round, and makes infinities and NaNs in silence
                next(running[turn])
        except (StopIteration, Stopped):
            running.pop(turn)
    return report
