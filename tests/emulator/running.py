"""Runs a problem's launches in the emulator, on the arguments that kernels/launch.py passes to a GPU."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target
from kernels.launch import Workspace, launch_arguments
from kernels.operators.registry import Arguments
from tests.emulator.boxes import TensorMap
from tests.emulator.compiling import Compiled, Compiler
from tests.emulator.launch import execute
from tests.emulator.memory import Memory
from tests.emulator.program import Program, parse
from tests.emulator.traffic import Traffic
from tests.emulator.values import Array

_POISON = 0xFF  # NaN in every type: what memory holds that nobody has written


@dataclass(frozen=True)
class Ran:
    """One launch: a name that is its code's alone, and the blocks executed and in its grid."""

    code: str
    blocks: int
    grid: int


@dataclass
class Emulation:
    """What running a problem showed.

    Attributes:
        y, written: the result, and which of its values the blocks that ran wrote.
        defects: of all launches, a line each; empty if nothing is wrong.
        ran: each launch.
    """

    y: Tensor
    written: Tensor
    defects: list[str] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)


def emulate(
    launches: Sequence[KernelLaunch],
    target: Target,
    inputs: Arguments[Tensor],
    compiler: Compiler,
    *,
    edit: Callable[[str], str] = str,
    blocks: Callable[[KernelLaunch], Sequence[int] | None] = lambda launch: None,
    traffic: Traffic | None = None,
) -> Emulation:
    """Run the launches of one problem on CPU tensors as a GPU of `target` would.

    Args:
        edit: changes the PTX before it runs.
        blocks: which ones of a launch to run; None is all.
        traffic: where to count requests to memory.

    Raises:
        UnknownInstruction: naming what the emulator does not know.
    """
    problem = launches[-1].problem
    layout = torch.channels_last if len(problem.out_shape) == 4 else torch.contiguous_format
    y = torch.empty(problem.out_shape, dtype=problem.dtype, memory_format=layout)
    values, workspace = {**inputs.operands(), "y": y}, Workspace("cpu")
    found = Emulation(y, torch.empty(0))
    for launch in launches:
        compiled, chosen = compiler(launch, target), blocks(launch)
        given = {tensor.data_ptr() for name, tensor in values.items() if name != launch.output}
        tensors = launch_arguments(launch, values, workspace)
        device, program = _Device(tensors, given), parse(edit(compiled.ptx))
        report = execute(
            program, device.memory, device.parameters(program, compiled, {**tensors, **launch.scalars}), launch.grid,
            compiled.shared, blocks=chosen, in_turns=bool(launch.tiles), traffic=traffic,
            dependent=bool(launch.options.get("launch_pdl")),
        )  # fmt: skip
        found.defects += report.hazards
        code, grid = f"{launch.kernel} {zlib.crc32(compiled.ptx.encode()):08x}", math.prod(launch.grid)
        found.ran.append(Ran(code, grid if chosen is None else len(chosen), grid))
        found.written = device.copy_back(values[launch.output])
        counters = tensors.get("counters_ptr")
        if chosen is None and not found.written.all():
            found.defects.append(f"output not written everywhere: {int((~found.written).sum())} values")
        if chosen is None and counters is not None and counters.any():
            found.defects.append("counters not back at 0")
    return found


def _flat(tensor: Tensor) -> Array:
    """The bytes of a dense tensor as they lie in memory."""
    flat: Array = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return flat


class _Device:
    """The tensors of a launch, copied into the emulator's memory; those that are not `given` may be written."""

    def __init__(self, arguments: Mapping[str, Any], given: set[int]) -> None:
        tensors = {name: getattr(value, "base", value) for name, value in arguments.items()}
        self._tensors = {t.data_ptr(): (name, t) for name, t in tensors.items() if isinstance(t, Tensor)}
        self._scratch = {pointer: t for pointer, (_, t) in self._tensors.items() if pointer not in given}
        self.memory = Memory(Memory.room([t.numel() * t.itemsize for _, t in self._tensors.values()]))
        self._addresses = {}
        for pointer, (name, tensor) in self._tensors.items():
            scratch, zeros = pointer in self._scratch, name == "counters_ptr"
            if scratch and not zeros:
                _flat(tensor)[:] = _POISON
            self._addresses[pointer] = self.memory.allocate(name, _flat(tensor), scratch, not scratch or zeros)

    def parameters(self, program: Program, compiled: Compiled, arguments: Mapping[str, Any]) -> Array:
        """The parameters' bytes as Triton's launcher fills them in; two null pointers to scratch memory end them."""
        values: list[bytes | int] = []
        boxes = iter(compiled.boxes)
        for name, kind in compiled.types.items():
            if kind == "constexpr":
                continue
            value = arguments[name]
            if isinstance(value, TensorDescriptor):
                decided = next(boxes, {})
                described = TensorMap(
                    self._addresses[value.base.data_ptr()], value.base.itemsize, (*value.shape,), (*value.strides,),
                    (*decided.get("block_size", value.block_shape),), decided.get("swizzle", 0),
                )  # fmt: skip
                values += [described.pack(), *value.shape, *value.strides]
            else:
                values.append(self._addresses[value.data_ptr()] if isinstance(value, Tensor) else int(value))
        out = np.zeros(program.parameter_bytes, np.uint8)
        for (offset, size), value in zip(program.parameters.values(), [*values, 0, 0], strict=True):
            data = value if isinstance(value, bytes) else value.to_bytes(size, "little", signed=True)
            out[offset : offset + size] = np.frombuffer(data, np.uint8)
        return out

    def copy_back(self, y: Tensor) -> Tensor:
        """Which elements of `y`, in its shape, were written; scratch memory gets what the kernel left."""
        for pointer, tensor in self._scratch.items():
            content, written = self.memory.read(self._addresses[pointer], tensor.numel() * tensor.itemsize)
            _flat(tensor)[:] = content
            if pointer == y.data_ptr():
                first_bytes = torch.from_numpy(written[:: tensor.itemsize].copy())
                found = first_bytes.as_strided(y.shape, y.stride())
        return found
