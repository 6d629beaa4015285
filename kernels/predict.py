"""A floor under the time of a compiled kernel, from its machine code and its launch: predicted, not measured.

    floor = max(work of the busiest multiprocessor, waves * one block on its own, bytes / bandwidth) + launch

The work is that of the fullest of its units: issue slots, integer units, tensor cores, shared memory. A kernel can take
longer, for what is not counted (contention, caches, clocks); none takes less. It ranks configurations and says which
part to change.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target
from kernels.sass import Block, Code, Latencies, Trace

# Instructions of 32 threads that the integer units of a quarter of a multiprocessor take two cycles for.
_INTEGER = ("IADD3", "LOP3", "ISETP", "SEL", "LEA", "SHF", "PRMT", "IMNMX", "VIADD", "VIADDMNMX", "VIMNMX", "SGXT",
            "IABS", "PLOP3", "FMNMX", "FSETP", "FSEL", "HMNMX2", "IADD", "MOV")  # fmt: skip
_SECTOR = 32


@dataclass(frozen=True)
class Floor:
    """What bounds a kernel, in seconds.

    Attributes:
        issue, integer, tensor, shared: the busiest multiprocessor's work, by unit.
        latency: waves of blocks, each as long as one warp of one block takes on its own.
        l2, dram: bytes over bandwidth.
        launch: from the end of the kernel before to this one's start.
        blocks_per_multiprocessor: that fit at the same time.
        waves: blocks over what all multiprocessors hold at the same time.
        instructions: of one warp.
        l2_bytes, dram_bytes: in all.
    """

    issue: float
    integer: float
    tensor: float
    shared: float
    latency: float
    l2: float
    dram: float
    launch: float
    blocks_per_multiprocessor: int
    waves: float
    instructions: int
    l2_bytes: int
    dram_bytes: int

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("issue", "integer", "tensor", "shared", "latency", "l2", "dram")}

    @property
    def seconds(self) -> float:
        return max(self.parts.values()) + self.launch

    @property
    def bound_by(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)

    def to_json(self) -> dict[str, Any]:
        parts = {name: round(1e6 * value, 3) for name, value in self.parts.items()}
        return {
            "floor_us": round(1e6 * self.seconds, 3),
            "bound_by": self.bound_by,
            **{f"{name}_us": value for name, value in parts.items()},
            "launch_us": round(1e6 * self.launch, 3),
            "blocks_per_multiprocessor": self.blocks_per_multiprocessor,
            "waves": round(self.waves, 3),
            "instructions": self.instructions,
            "l2_bytes": self.l2_bytes,
            "dram_bytes": self.dram_bytes,
        }


def predicted_floor(
    launch: KernelLaunch,
    target: Target,
    code: Code,
    ptx: str,
    arguments: Sequence[int | None],
    registers: int,
    shared_bytes: int,
) -> Floor:
    """The floor of one launch.

    Args:
        code: its machine code.
        ptx: from which that was assembled; where the parameters lie is read in it.
        arguments: of the kernel's parameters in order; None is an address.
        registers: per thread.
        shared_bytes: per block.

    Raises:
        ValueError: the machine code cannot be followed.
    """
    constants = constant_bank(launch, target, ptx, arguments)
    grid = (*launch.grid, 1, 1)[:3]
    blocks, warps = math.prod(grid), int(launch.options["num_warps"])
    split = launch.scalars.get("SPLIT_K", 1) if launch.tiles else 1
    first, last = (_trace(code, launch, target, constants, arrival) for arrival in (0, split - 1))
    share = 1 / split  # of the blocks come last and add up what the others left

    def per_block(quantity: Any) -> float:
        return float((1 - share) * quantity(first) + share * quantity(last))

    held = resident_blocks(target, registers, shared_bytes, warps)
    on_busiest = -(-blocks // target.multiprocessors)
    seconds = 1 / target.clock
    quarter = -(-warps * on_busiest // 4)  # warps of one of the four schedulers
    issue = per_block(lambda t: t.instructions) * quarter
    integer = per_block(lambda t: integer_cycles(t, target)) * quarter
    tensor = per_block(lambda t: tensor_cycles(t, target, warps)) * on_busiest
    shared = per_block(lambda t: t.shared_wavefronts) * on_busiest * 128 / target.shared_bytes_per_cycle
    waves = -(-blocks // (held * target.multiprocessors))
    latency = waves * max(first.cycles, last.cycles)
    boxes = per_block(lambda t: box_bytes(t, launch)) * blocks
    moved = per_block(lambda t: _SECTOR * (t.load_sectors + t.store_sectors)) * blocks + boxes
    ideal = launch.problem.activation_bytes + launch.problem.weight_bytes
    # What fits in L2 beside it is still there from the kernel before; weights were last read a whole network ago.
    dram = ideal if ideal > target.l2_bytes // 2 else launch.problem.weight_bytes
    return Floor(
        issue=issue * seconds,
        integer=integer * seconds,
        tensor=tensor * seconds,
        shared=shared * seconds,
        latency=latency * seconds,
        l2=moved / target.l2_bandwidth,
        dram=dram / target.dram_bandwidth,
        launch=target.launch_seconds,
        blocks_per_multiprocessor=held,
        waves=blocks / (held * target.multiprocessors),
        instructions=round(per_block(lambda t: t.instructions)),
        l2_bytes=round(moved),
        dram_bytes=dram,
    )


def _trace(
    code: Code, launch: KernelLaunch, target: Target, constants: Mapping[int, int], arrival: int
) -> Trace:
    """Of the block in the middle of the grid."""
    x, y, z = (*launch.grid, 1, 1)[:3]
    threads = 32 * int(launch.options["num_warps"])
    return Block(code, threads, (x // 2, y // 2, z // 2), constants, arrival, Latencies()).run()


def resident_blocks(target: Target, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that one multiprocessor holds at the same time."""
    # Registers are given out to a warp in units of 256; a block's shared memory carries 1 KiB of the system's.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = target.registers // per_warp // 4 * 4 // warps
    by_shared = target.shared_memory_per_multiprocessor // (-(-shared_bytes // 128) * 128 + 1024)
    return max(1, min(by_registers, by_shared, target.warps // warps, target.blocks))


def integer_cycles(trace: Trace, target: Target) -> int:
    """Cycles that one warp keeps its quarter's integer units busy."""
    count = sum(n for opcode, n in trace.issued.items() if opcode.split(".")[0] in _INTEGER)
    return count * 32 // target.integer_lanes


def tensor_cycles(trace: Trace, target: Target, warps: int) -> float:
    """Cycles that a block keeps the tensor cores of its multiprocessor busy; without any, its FMA units."""
    flops = sum(n * warps * _flops(opcode) for opcode, n in trace.issued.items())
    fma = sum(n * warps * 64 for opcode, n in trace.issued.items() if opcode.startswith("FFMA"))
    return flops / target.tensor_flops_per_cycle + fma / (8 * 32)


def _flops(opcode: str) -> float:
    """Of one warp's matrix instruction: HMMA.16816 multiplies 16x8 by 16, four warps share an HGMMA.64x32x16."""
    name, *modifiers = opcode.split(".")
    if name == "HMMA" and modifiers:
        m, k = int(modifiers[0][:2]), int(modifiers[0][3:])
        return 2.0 * m * 8 * k
    if name == "HGMMA":
        sides = next(word for word in modifiers if "x" in word)
        return 2.0 * math.prod(map(int, sides.split("x"))) / 4
    return 0.0


def box_bytes(trace: Trace, launch: KernelLaunch) -> float:
    """Bytes that TMA loads for one block: boxes by rank, of pixels and of filters."""
    sizes = {
        f"{len(operand.block)}D": math.prod(operand.block) * operand.dtype.itemsize
        for operand in launch.operands.values()
        if operand is not None and operand.block is not None
    }
    return sum(count * sizes.get(rank, 0) for rank, count in trace.box_loads.items())


def constant_bank(launch: KernelLaunch, target: Target, ptx: str, arguments: Sequence[int | None]) -> dict[int, int]:
    """The words that the kernel's constants hold: its parameters, the size of the grid and of the block.

    Addresses are made up, far apart.
    """
    start = 0x160 if target.capability < 90 else 0x210 if target.capability < 100 else 0x380
    sizes = (0x0, 0xC) if target.capability < 100 else (0x360, 0x370)
    bank: dict[int, int] = {}
    for at, values in zip(sizes, ((32 * int(launch.options["num_warps"]), 1, 1), (*launch.grid, 1, 1)), strict=True):
        bank.update({at + 4 * axis: int(value) for axis, value in enumerate(values[:3])})
    header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    offset, slots = start, []
    for line in re.findall(r"\.param ([^,\n]*)", header):
        align = re.search(r"\.align (\d+) \.b8", line)
        size = int(re.search(r"\[(\d+)\]", line)[1]) if align else int(re.search(r"\.[usb](\d+)", line)[1]) // 8
        unit = int(align[1]) if align else size
        offset = -(-offset // unit) * unit
        slots.append((offset, size))
        offset += size
    for index, (at, size) in enumerate(slots):
        value = arguments[index] if index < len(arguments) else 0  # behind them come Triton's own
        if size > 8:  # a tensor map
            continue
        if value is None:
            value = (index + 1) << 36
        bank[at] = value & 0xFFFFFFFF
        if size == 8:
            bank[at + 4] = value >> 32
    return bank
