"""A floor under the time of a compiled kernel, from its machine code and its launch: predicted, not measured.

    floor = max(work of the busiest multiprocessor, waves * one block on its own, bytes / bandwidth) + launch

The work is that of the fullest of its units: issue slots, integer units, multipliers, tensor cores, shared memory. A
kernel may take longer, for what is not counted (contention, misses, clocks below the boost); it ranks configurations
and says which part to change.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target
from kernels.prediction.block import Block, Trace
from kernels.prediction.sass import Code

# Of a multiprocessor's quarter; the rates are in the programming guide's table of arithmetic instructions.
_INTEGER = ("IADD3", "IADD", "VIADD", "LOP3", "ISETP", "SEL", "LEA", "SHF", "PRMT", "IMNMX", "VIMNMX", "VIADDMNMX",
            "SGXT", "IABS", "FMNMX", "FSETP", "FSEL", "HMNMX2")  # fmt: skip
_FLOAT = ("FFMA", "FADD", "FMUL")
# The share of sm_90's rate that the instructions of its predecessors reach there: Luo et al., "Benchmarking and
# Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024.
_HMMA_ON_HOPPER = 0.63
_SECTOR = 32
# `.param .u64 .ptr .global .align 1 name`, `.param .u32 name` or `.param .align 64 .b8 name[128]`.
_PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.[usb](\d+) [^,\n[]*(?:\[(\d+)\])?")
_PARTS = ("issue", "arithmetic", "tensor", "shared", "latency", "l2", "dram")


@dataclass(frozen=True)
class Floor:
    """What bounds a kernel, in seconds.

    Attributes:
        issue, arithmetic, tensor, shared: the busiest multiprocessor's work, by unit.
        latency: waves of blocks, each as long as one warp of one block takes on its own.
        l2, dram: bytes over bandwidth.
        launch: from the end of the kernel before to this one's start.
        blocks_per_multiprocessor: that fit at the same time.
        waves: blocks over what all multiprocessors hold at the same time.
        instructions: of one warp.
        matrix_flops, l2_bytes, dram_bytes: in all.
        loop_instructions, loop_flops: in all, in the loops that multiply.
    """

    issue: float
    arithmetic: float
    tensor: float
    shared: float
    latency: float
    l2: float
    dram: float
    launch: float
    blocks_per_multiprocessor: int
    waves: float
    instructions: int
    matrix_flops: int
    l2_bytes: int
    dram_bytes: int
    loop_instructions: int
    loop_flops: int

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def seconds(self) -> float:
        return max(self.parts.values()) + self.launch

    @property
    def bound_by(self) -> str:
        return max(_PARTS, key=self.parts.__getitem__)

    def to_json(self) -> dict[str, Any]:
        """Times in microseconds."""
        return {
            "floor_us": round(1e6 * self.seconds, 3),
            "bound_by": self.bound_by,
            **{f"{name}_us": round(1e6 * value, 3) for name, value in self.parts.items()},
            "launch_us": round(1e6 * self.launch, 3),
            "blocks_per_multiprocessor": self.blocks_per_multiprocessor,
            "waves": round(self.waves, 3),
            "instructions": self.instructions,
            "matrix_flops": self.matrix_flops,
            "l2_bytes": self.l2_bytes,
            "dram_bytes": self.dram_bytes,
            "loop_instructions": self.loop_instructions,
            "loop_flops": self.loop_flops,
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
    blocks, warps = math.prod(launch.grid), int(launch.options["num_warps"])
    constants = constant_bank(launch, target, ptx, arguments)
    # Of the programs that share a tile, the last to arrive adds up what the others left.
    split = launch.scalars.get("SPLIT_K", 1) if launch.tiles else 1
    first, last = (_trace(code, launch, target, constants, arrival) for arrival in (0, split - 1))

    def per_block(quantity: Callable[[Trace], float]) -> float:
        return ((split - 1) * quantity(first) + quantity(last)) / split

    held = resident_blocks(target, registers, shared_bytes, warps)
    on_busiest = -(-blocks // target.multiprocessors)
    warps_on_quarter = -(-warps * on_busiest // 4)
    boxes = per_block(lambda trace: _box_bytes(trace, launch))
    l2_bytes = blocks * (per_block(lambda t: _SECTOR * (t.load_sectors + t.store_sectors)) + boxes)
    # Activations may still lie in L2, as far as they fit; weights were last read a whole network ago.
    problem = launch.problem
    dram_bytes = problem.weight_bytes + max(0, problem.activation_bytes - target.l2_bytes)
    return Floor(
        issue=per_block(lambda t: t.instructions) * warps_on_quarter / target.clock,
        arithmetic=per_block(lambda t: _arithmetic_cycles(t, target)) * warps_on_quarter / target.clock,
        tensor=per_block(lambda t: t.matrix_cycles) * warps_on_quarter / target.clock,
        shared=per_block(lambda t: t.shared_wavefronts) * on_busiest / target.clock,
        latency=-(-blocks // (held * target.multiprocessors)) * max(first.cycles, last.cycles) / target.clock,
        l2=l2_bytes / target.l2_bandwidth,
        dram=dram_bytes / target.dram_bandwidth,
        launch=target.launch_seconds,
        blocks_per_multiprocessor=held,
        waves=blocks / (held * target.multiprocessors),
        instructions=round(per_block(lambda t: t.instructions)),
        matrix_flops=round(blocks * warps * per_block(lambda t: t.matrix_flops)),
        l2_bytes=round(l2_bytes),
        dram_bytes=dram_bytes,
        loop_instructions=round(blocks * warps * per_block(lambda t: t.loop_instructions)),
        loop_flops=round(blocks * warps * per_block(lambda t: t.loop_flops)),
    )


def resident_blocks(target: Target, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that one multiprocessor holds at the same time."""
    # Registers are given to a warp in units of 256, warps to the four quarters; a block's shared memory carries 1 KiB
    # of the system's.
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = target.registers // per_warp // 4 * 4 // warps
    by_shared = target.shared_memory_per_multiprocessor // (-(-shared_bytes // 128) * 128 + 1024)
    return max(1, min(by_registers, by_shared, target.warps // warps, target.blocks))


def tensor_flops_per_cycle(mnemonic: str, target: Target) -> float:
    """Of the tensor core of one warp, a quarter of a multiprocessor's."""
    share = _HMMA_ON_HOPPER if mnemonic == "HMMA" and target.has_wgmma else 1
    return share * target.tensor_flops_per_cycle / 4


def _trace(code: Code, launch: KernelLaunch, target: Target, constants: Mapping[int, int], arrival: int) -> Trace:
    """Of the block in the middle of the grid."""
    x, y, z = (*launch.grid, 1, 1)[:3]
    threads = 32 * int(launch.options["num_warps"])
    middle = (x // 2, y // 2, z // 2)
    block = Block(code, threads, middle, constants, arrival, lambda name: tensor_flops_per_cycle(name, target))
    try:
        return block.run()
    except ValueError as error:
        what = f"{launch.kernel} of {launch.problem.key} as {launch.config} for {target.name}"
        raise ValueError(f"{what}: {error}") from error


def _arithmetic_cycles(trace: Trace, target: Target) -> float:
    """Cycles that one warp keeps its quarter's integer units busy, or its multipliers, whichever is longer."""
    integer = multiplier = 0.0
    for opcode, count in trace.issued.items():
        name = opcode.split(".")[0]
        if name in _INTEGER:
            integer += count * 32 / target.integer_lanes
        elif name == "IMAD":
            multiplier += count * 32 / target.integer_lanes
        elif name in _FLOAT:
            multiplier += count * 32 / target.float_lanes
    return max(integer, multiplier)


def _box_bytes(trace: Trace, launch: KernelLaunch) -> float:
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
    at = start
    for index, (align, bits, length) in enumerate(_PARAMETER.findall(header)):
        size = int(bits) // 8 * int(length or 1)
        at = -(-at // int(align or size)) * int(align or size)
        value = arguments[index] if index < len(arguments) else 0  # behind them come Triton's own
        if size <= 8:  # not a tensor map
            value = (index + 1) << 36 if value is None else value
            bank.update({at + 4 * half: value >> 32 * half & 0xFFFFFFFF for half in range(size // 4)})
        at += size
    return bank
