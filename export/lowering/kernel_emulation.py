"""A kernel engine in the emulator: executed whole, from its plan, or some blocks of each launch on real activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.base.batch import Arrays, Inputs
from export.lowering.kernel_calls import storage_of
from export.lowering.kernel_engine import KernelEngine, Schedule, Step
from kernels.between.elementwise import ElementwiseProblem
from kernels.between.pooling import PoolProblem
from kernels.configs.config import KernelLaunch
from kernels.emulator.block import UnknownInstruction
from kernels.emulator.boxes import TensorMap
from kernels.emulator.launch import execute
from kernels.emulator.memory import Memory
from kernels.emulator.program import Program, parse
from kernels.operators.registry import OPERATORS, Arguments
from kernels.oracle import Deviation, oracle
from kernels.rounding import ZERO_BELOW_SIGMA

_POISON = 0xFF  # NaN in every type
_WRITTEN = ("y_ptr", "partials_ptr", "counters_ptr")
_SAMPLED = 3  # tiles of a launch


@dataclass(frozen=True)
class LaunchCheck:
    """Some blocks of one launch, executed.

    Attributes:
        step: the launch.
        blocks, grid: how many were executed, and how many there are.
        unknown: the instruction for want of which none was; else empty.
        deviation: of the values that they wrote; None where they are not all finite, or none was written.
        failures: what is wrong whatever the values are, a line each.
    """

    step: Step
    blocks: int
    grid: int
    deviation: Deviation | None
    failures: tuple[str, ...]
    unknown: str = ""


class EmulatedArena:
    """The memory of one batch size of an engine, and its launches in the emulator."""

    def __init__(self, engine: KernelEngine, schedule: Schedule) -> None:
        self.schedule, self._weights, self._codes = schedule, engine.weights, engine.codes
        size = schedule.arena.size
        self._bytes, self._written = np.full(size, _POISON, np.uint8), np.zeros(size, bool)
        self._programs: dict[str, Program] = {}
        shared = [step.tensors["counters_ptr"] for step in schedule.steps if "counters_ptr" in step.tensors]
        zeroed = max((tensor.untyped_storage().nbytes() for tensor in shared), default=0)
        self._bytes[:zeroed], self._written[:zeroed] = 0, True

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """Put a value into the storage of a tensor of the schedule, and say that it is written."""
        start = self.schedule.places[storage_of(tensor)]
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._bytes[start : start + content.size], self._written[start : start + content.size] = content, True

    def clear(self, tensor: Tensor) -> None:
        """Forget what the storage of a tensor holds."""
        start = self.schedule.places[storage_of(tensor)]
        part = slice(start, start + tensor.untyped_storage().nbytes())
        self._bytes[part], self._written[part] = _POISON, False

    def read(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The storage of a tensor as a vector of its type, and which elements were written."""
        start, size = self.schedule.places[storage_of(tensor)], tensor.untyped_storage().nbytes()
        part = slice(start, start + size)
        content = torch.from_numpy(self._bytes[part].copy()).view(tensor.dtype)
        return content, torch.from_numpy(self._written[part].reshape(-1, tensor.itemsize).all(1))

    def launch(self, step: Step, blocks: Sequence[int] | None = None) -> list[str]:
        """Execute a launch, or some of its blocks; what is formally wrong with it, a line each."""
        code, launch = self._codes[step.code], step.launch
        program = self._programs.setdefault(step.code, parse(code.ptx))
        device = _Device(self, step)
        report = execute(
            program,
            device.memory,
            device.parameters(program, step),
            launch.grid,
            code.shared,
            blocks=blocks,
            in_turns=bool(launch.tiles),
            dependent=bool(launch.options.get("launch_pdl")),
        )
        device.copy_back()
        return report.hazards

    def content(self, space: str, offset: int, size: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Bytes at a place of the plan, and which are written; None is all."""
        if space == "weight":
            return np.frombuffer(self._weights[offset], np.uint8), None
        part = slice(offset, offset + size)
        return self._bytes[part], self._written[part]


class _Device:
    """What one launch can reach, each tensor on its own with guards around it."""

    def __init__(self, arena: EmulatedArena, step: Step) -> None:
        self._arena = arena
        places: dict[tuple[str, int], tuple[str, int]] = {}
        for name, argument in zip(_pointers(step), _placed(step), strict=True):
            ((space, offset),) = argument.items()
            places.setdefault((space, offset), (name, step.tensors[name].untyped_storage().nbytes()))
        contents = {place: arena.content(*place, size) for place, (_, size) in places.items()}
        self.memory = Memory(Memory.room([content.size for content, _ in contents.values()]))
        self._addresses, self._back = {}, []
        for place, (content, written) in contents.items():
            name, writable = places[place][0], places[place][0] in _WRITTEN
            address = self._addresses[place] = self.memory.allocate(name, content, writable, written is None)
            if written is not None:
                _, cells, _ = self.memory.offsets(np.arange(address, address + content.size, 2), 2, writable)
                self.memory.written[cells[:, 0]] = written[::2]
            if writable:
                self._back.append((address, content, written))

    def parameters(self, program: Program, step: Step) -> NDArray[Any]:
        values: list[bytes | int] = []
        for argument in step.arguments:
            ((kind, value),) = argument.items()
            if kind == "value":
                values.append(int(value))
            elif kind == "descriptor":
                itemsize = getattr(torch, value["dtype"]).itemsize
                shape, strides, box = (tuple(value[key]) for key in ("shape", "strides", "box"))
                described = TensorMap(self._address(value["base"]), itemsize, shape, strides, box, value["swizzle"])
                values += [described.pack(), *shape, *strides]
            else:
                values.append(self._address(argument))
        out = np.zeros(program.parameter_bytes, np.uint8)
        for (offset, size), value in zip(program.parameters.values(), [*values, 0, 0], strict=True):
            data = value if isinstance(value, bytes) else value.to_bytes(size, "little", signed=True)
            out[offset : offset + size] = np.frombuffer(data, np.uint8)
        return out

    def _address(self, place: Mapping[str, int]) -> int:
        (found,) = place.items()
        return self._addresses[found]

    def copy_back(self) -> None:
        for address, content, written in self._back:
            content[:], flags = self.memory.read(address, content.size)
            if written is not None:
                written[:] = flags


def _pointers(step: Step) -> list[str]:
    """The parameters that point to memory, in order."""
    return [name for name in _named(step) if name in step.tensors]


def _named(step: Step) -> list[str]:
    from kernels.compile import runtime_parameters

    return runtime_parameters(step.launch)


def _placed(step: Step) -> list[Mapping[str, int]]:
    """Where they point to, by the plan."""
    arguments = [argument.get("descriptor", {}).get("base", argument) for argument in step.arguments]
    return [argument for argument in arguments if "value" not in argument]


def run_whole(engine: KernelEngine, size: int, inputs: Inputs) -> tuple[Arrays, list[str], dict[str, Tensor]]:
    """Every block of every launch of a batch size, from the plan.

    Returns:
        The outputs by name, what is formally wrong, and what the nodes of the fused graph hold, by name.
    """
    schedule = engine.schedules[size]
    arena, defects, values = EmulatedArena(engine, schedule), [], dict[str, Tensor]()
    for name, x in schedule.calls.inputs.items():
        arena.fill(x, torch.from_numpy(np.ascontiguousarray(inputs[name])))
    for number, step in enumerate(schedule.steps):
        for name in _WRITTEN[:2]:
            if name in step.tensors and schedule.lives[storage_of(step.tensors[name])][0] == number:
                arena.clear(step.tensors[name])
        defects += [f"{step.call.layer}: {defect}" for defect in arena.launch(step)]
        y = step.tensors["y_ptr"]
        for node, tensor in schedule.calls.values.items():
            if storage_of(tensor) == storage_of(y):
                values[node] = _view(arena.read(tensor)[0], tensor)
        for storage, (_, last) in schedule.lives.items():
            if last == number:
                held = next(t for t in step.tensors.values() if storage_of(t) == storage)
                arena.clear(held)
    outputs = {}
    for name, y in schedule.calls.outputs.items():
        content, written = arena.read(y)
        if not bool(written.all()):
            defects.append(f"{name}: {int((~written).sum())} values not written")
        outputs[name] = _view(content, y).numpy()
    return outputs, defects, values


def _view(content: Tensor, like: Tensor) -> Tensor:
    """A vector that is the whole storage of a tensor, as that tensor."""
    return content.as_strided(like.shape, like.stride(), like.storage_offset())


@dataclass
class Activations:
    """What each storage of a schedule holds, computed by the operators' references one launch after the other.

    Attributes:
        held: storage -> its whole content, as a vector of its type.
    """

    schedule: Schedule
    held: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, schedule: Schedule, inputs: Inputs) -> Activations:
        found = cls(schedule)
        for name, x in schedule.calls.inputs.items():
            found.held[storage_of(x)] = torch.from_numpy(np.ascontiguousarray(inputs[name])).to(x.dtype).reshape(-1)
        for storage, value in schedule.calls.weights.items():
            found.held[storage] = value.as_strided((value.numel(),), (1,), 0)
        return found

    def of_step(self, step: Step) -> dict[str, Tensor]:
        """What a launch reads, by the names that its problem has for it."""
        return {
            parameter.removesuffix("_ptr").removesuffix("_desc"): _view(self.held[storage_of(tensor)], tensor)
            for parameter, tensor in step.tensors.items()
            if parameter not in _WRITTEN
        }

    def compute(self, step: Step) -> None:
        """Add what a launch writes."""
        y, launch = step.tensors["y_ptr"], step.launch
        whole = self.held.setdefault(storage_of(y), torch.zeros(_elements(y), dtype=y.dtype))
        problem, tensors = launch.problem, self.of_step(step)
        if isinstance(problem, ElementwiseProblem | PoolProblem):
            result_view(step, whole).copy_(problem.expected(tensors)[0])
        else:
            result_view(step, whole).copy_(_arguments(launch, tensors).reference())


def _elements(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes() // tensor.itemsize)


def result_view(step: Step, whole: Tensor) -> Tensor:
    """What a launch writes, of the whole of its output's storage."""
    problem = step.launch.problem
    if isinstance(problem, ElementwiseProblem):
        return whole.as_strided(problem.sizes, problem.y.strides, problem.y.start)
    return _view(whole, step.tensors["y_ptr"])


def _arguments(launch: KernelLaunch, tensors: Mapping[str, Tensor]) -> Arguments[Tensor]:
    """The arguments of the operator that computes what a launch does."""
    problem = launch.problem
    named = {name: tensors[name] if name in tensors else tensors["residual"] for name in problem.shapes}
    return OPERATORS[problem.operator](**named, **problem.settings)


def _expected(step: Step, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y, sigma, value before the activation) of a launch in float64, in the shape of `result_view`."""
    problem = step.launch.problem
    if isinstance(problem, ElementwiseProblem | PoolProblem):
        return problem.expected(tensors)
    arguments = _arguments(step.launch, tensors)
    pre, sigma = oracle(problem, arguments)
    return arguments.map(Tensor.double).activated(pre), sigma, pre


def sampled_blocks(launch: KernelLaunch) -> list[int]:
    """The first and the last tile of a launch and what lies between, with all blocks that share its sum."""
    blocks, shares = math.prod(launch.grid), int(launch.scalars.get("SHARES", 1))
    splits = int(launch.scalars.get("SPLIT_K", 1))
    tiles = blocks // splits  # of a head, shares of the same rows lie beside each other
    chosen = sorted({round(index * (tiles - 1) / (_SAMPLED - 1)) for index in range(_SAMPLED)})
    return [
        tile // shares * shares * splits + split * shares + tile % shares for tile in chosen for split in range(splits)
    ]


def check_launches(
    engine: KernelEngine, size: int, inputs: Inputs, wanted: frozenset[str] | None = None
) -> list[LaunchCheck]:
    """Some blocks of each launch of a batch size on real activations, held to what rounding explains.

    Each launch reads what the operators' references make of the inputs, so that it is judged by what it does itself.

    Args:
        inputs: name -> [size, ...] float32.
        wanted: the sha256 of the machine code to look at; None is all.
    """
    schedule = engine.schedules[size]
    arena, activations, checks = EmulatedArena(engine, schedule), Activations.of(schedule, inputs), []
    for step in schedule.steps:
        if wanted is None or step.code in wanted:
            checks.append(_check(arena, activations, step))
        activations.compute(step)
    return checks


def _check(arena: EmulatedArena, activations: Activations, step: Step) -> LaunchCheck:
    launch, y = step.launch, step.tensors["y_ptr"]
    for name, tensor in step.tensors.items():
        if name not in _WRITTEN and storage_of(tensor) in arena.schedule.places:
            arena.fill(tensor, activations.held[storage_of(tensor)])
    for name in _WRITTEN[:2]:
        if name in step.tensors:
            arena.clear(step.tensors[name])
    blocks = sampled_blocks(launch)
    try:
        failures = arena.launch(step, blocks)
    except UnknownInstruction as unknown:
        return LaunchCheck(step, 0, math.prod(launch.grid), None, (), str(unknown))
    content, flags = arena.read(y)
    value, written = result_view(step, content).double(), result_view(step, flags)
    y64, sigma, pre = _expected(step, activations.of_step(step))
    found, deviation = value[written], None
    if not bool(written.any()):
        failures.append("nothing was written")
    elif not bool(found.isfinite().all()):
        failures.append(f"{int((~found.isfinite()).sum())} of {found.numel()} values are not finite")
    else:
        y64, sigma, pre = y64[written], sigma[written], pre[written]
        active = pre >= -ZERO_BELOW_SIGMA * sigma if launch.problem.relu else (y64 != 0) | (found != 0)
        deviation = Deviation.of(found, y64, sigma, active)
    return LaunchCheck(step, len(blocks), math.prod(launch.grid), deviation, tuple(failures))
