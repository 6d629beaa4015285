"""A fused program as a kernel engine: machine code, packed weights, and tables of launches for libcuda alone.

The file is a safetensors container: a tensor for each cubin, named by its sha256, one for each weight as the kernels
read it, and in its metadata the plan, JSON: export/runtime/engines/kernel_plan.py has its schema.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from export.base.batch import Batch
from export.base.normalisation import Normalisation
from export.base.precision import Precision
from export.fusion.program import FusedProgram
from export.lowering.arena import Arena, Buffer, plan_arena
from export.lowering.kernel_calls import Calls, KernelCall, kernel_calls, storage_of
from export.lowering.kernel_code import Code, code_name, compilers, least_driver
from export.lowering.kernel_cover import Cover, batch_sizes, cover
from export.runtime.engines.kernel_file import FORMAT, VERSION, file_name
from export.runtime.engines.kernel_plan import ALIGNMENT
from kernels.compile import runtime_parameters
from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target
from kernels.launch import Workspace, launch_arguments
from kernels.plan import plan

_COUNTERS = "counters_ptr"
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Step:
    """One launch.

    Attributes:
        call: which it is part of.
        code: the sha256 of its machine code.
        arguments: as the plan has them.
        tensors: parameter -> the tensor that it points to, on the meta device.
    """

    call: KernelCall
    launch: KernelLaunch
    code: str
    arguments: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Schedule:
    """What one batch size launches.

    Attributes:
        calls: what was asked for.
        steps: in order.
        places: storage of a tensor -> its offset in the arena.
        lives: the same -> the first and the last step that touches it; -1 is before all.
        arena: its size and what it was planned from; the first bytes are the counters that all sizes share.
    """

    calls: Calls
    steps: tuple[Step, ...]
    places: Mapping[int, int]
    lives: Mapping[int, Sequence[int]]
    arena: Arena


@dataclass(frozen=True)
class KernelEngine:
    """A file and how it came about.

    Attributes:
        target: what it runs on.
        content: the file.
        plan: as in the file.
        codes: by sha256 of the machine code.
        schedules: by batch size.
        weights: offset in the weights' allocation -> the bytes there.
        predicted: batch size -> seconds, of some sizes.
        seconds: what making it took.
    """

    target: Target
    precision: Precision
    content: bytes = field(repr=False)
    plan: Mapping[str, Any] = field(repr=False)
    codes: Mapping[str, Code] = field(repr=False)
    schedules: Mapping[int, Schedule] = field(repr=False)
    weights: Mapping[int, bytes] = field(repr=False)
    predicted: Mapping[int, float]
    seconds: float

    @property
    def name(self) -> str:
        """What it is called in a bundle."""
        return file_name(self.target.name)

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        smallest, largest = (self.schedules[size] for size in (min(self.schedules), max(self.schedules)))
        return {
            "target": self.target.name,
            "driver": self.plan["driver"],
            "compilers": dict(self.plan["compilers"]),
            "batches": sorted(self.schedules),
            "kernels": len(self.codes),
            "launches": len(largest.steps),
            "weights_bytes": sum(map(len, self.weights.values())),
            "code_bytes": sum(len(code.cubin) for code in self.codes.values()),
            "arena": {
                str(len(next(iter(one.calls.inputs.values())))): {
                    "bytes": one.arena.size,
                    "live": one.arena.live,
                    "without_reuse": one.arena.all,
                }
                for one in (smallest, largest)
            },
            "predicted_us": {str(size): round(1e6 * value, 2) for size, value in self.predicted.items()},
            "seconds": round(self.seconds, 2),
        }


def lower_kernels(
    program: FusedProgram,
    precision: Precision,
    target: Target,
    batch: Batch,
    normalisation: Normalisation | None = None,
) -> KernelEngine:
    """Compile a program for a target and lay it out for every batch size; with a normalisation it takes bytes.

    Raises:
        ExportError: it has an operator that no kernel computes, a problem that no configuration runs, or a kernel that
            does not compile; names them.
    """
    started = time.perf_counter()
    graph_module = program.at(precision)
    calls = {size: kernel_calls(program, graph_module, precision, size, normalisation) for size in batch_sizes(batch)}
    covered = cover({size: [c.problem for c in found.calls] for size, found in calls.items()}, batch, target)
    weights = _Weights()
    launched = {size: _launches(found, size, covered, target) for size, found in calls.items()}
    zeroed = max(
        (
            t.untyped_storage().nbytes()
            for steps in launched.values()
            for _, _, a in steps
            if (t := a.get(_COUNTERS)) is not None
        ),
        default=0,
    )
    codes = {code.sha256: code for code in covered.codes.values()}
    schedules = {
        size: _scheduled(found, launched[size], covered.codes, weights, zeroed, target) for size, found in calls.items()
    }
    facts = _facts(target, precision, codes, weights, zeroed, schedules)
    text = json.dumps(facts, separators=(",", ":"))
    metadata = {"format": FORMAT, "version": VERSION, "plan": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    cubins = {
        f"cubin.{sha256}": torch.frombuffer(bytearray(code.cubin), dtype=torch.uint8) for sha256, code in codes.items()
    }
    content = _container({**weights.tensors, **cubins}, metadata)
    return KernelEngine(
        target=target,
        precision=precision,
        content=content,
        plan=facts,
        codes=codes,
        schedules=schedules,
        weights=weights.contents,
        predicted=covered.predicted,
        seconds=time.perf_counter() - started,
    )


def _facts(
    target: Target,
    precision: Precision,
    codes: Mapping[str, Code],
    weights: _Weights,
    zeroed: int,
    schedules: Mapping[int, Schedule],
) -> dict[str, Any]:
    """The plan, as export/runtime/engines/kernel_plan.py reads it."""
    numbers = {sha256: index for index, sha256 in enumerate(codes)}
    calls = next(iter(schedules.values())).calls
    return {
        "target": target.name,
        "precision": precision.name,
        "driver": least_driver(target),
        "compilers": compilers(target),
        "inputs": [_interface(name, tensor) for name, tensor in calls.inputs.items()],
        "outputs": [_interface(name, tensor) for name, tensor in calls.outputs.items()],
        "weights": weights.entries,
        "kernels": [_kernel(code, target) for code in codes.values()],
        "batches": {
            str(size): {
                "arena": schedule.arena.size,
                "zeroed": [0, zeroed],
                "inputs": {name: schedule.places[storage_of(x)] for name, x in schedule.calls.inputs.items()},
                "outputs": {name: schedule.places[storage_of(y)] for name, y in schedule.calls.outputs.items()},
                "launches": [
                    {
                        "kernel": numbers[step.code],
                        "grid": [*step.launch.grid, 1, 1][:3],
                        "arguments": [*step.arguments],
                    }
                    for step in schedule.steps
                ],
            }
            for size, schedule in sorted(schedules.items())
        },
    }


def _container(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same for the same content: the library's own writer leaves the order to chance."""
    header: dict[str, Any] = {"__metadata__": metadata}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # so that all are aligned
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        offsets = [end, end := end + len(parts[-1])]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def _interface(name: str, tensor: Tensor) -> dict[str, Any]:
    layout = "" if tensor.dim() != 4 else "NHWC" if tensor.dtype == torch.uint8 else "NCHW"
    return {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": [*tensor.shape[1:]],
        "layout": layout,
    }


def _kernel(code: Code, target: Target) -> dict[str, Any]:
    return {
        "cubin": code.sha256,
        "symbol": code.symbol,
        "warps": code.warps,
        "ctas": 1,
        "shared": code.shared,
        "pdl": target.has_pdl,
        "parameters": [*code.parameters],
    }


class _Weights:
    """Constants at their places in one allocation, equal ones once."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.contents: dict[int, bytes] = {}
        self._offsets: dict[str, int] = {}
        self._known: dict[tuple[int, int], int] = {}
        self._end = 0

    def place(self, value: Tensor) -> int:
        """Where a dense constant lies, in the order in which it lies in memory."""
        key = (value.data_ptr(), value.numel())
        if key not in self._known:
            self._known[key] = self._placed(value)
        return self._known[key]

    def _placed(self, value: Tensor) -> int:
        packed = value.permute(0, 2, 3, 1) if value.dim() == 4 else value
        packed = packed.contiguous()
        content = packed.reshape(-1).view(torch.uint8).numpy().tobytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 not in self._offsets:
            name = f"w{len(self.entries)}"
            entry = {"tensor": name, "offset": self._end, "bytes": len(content), "sha256": sha256}
            self.entries.append(entry)
            self.tensors[name], self.contents[self._end], self._offsets[sha256] = packed, content, self._end
            self._end += -(-len(content) // ALIGNMENT) * ALIGNMENT
        return self._offsets[sha256]


_Launched = tuple[KernelCall, KernelLaunch, dict[str, Any]]


def _launches(calls: Calls, size: int, covered: Cover, target: Target) -> list[_Launched]:
    """Every launch of a batch size, with its tensors on the meta device."""
    found: list[_Launched] = []
    workspace = Workspace("meta")
    for call, config in zip(calls.calls, covered.configs[size], strict=True):
        values = dict(call.tensors)
        for launch in plan(call.problem, config, target):
            found.append((call, launch, launch_arguments(launch, values, workspace)))
    return found


def _scheduled(
    calls: Calls,
    launched: Sequence[_Launched],
    codes: Mapping[str, Code],
    weights: _Weights,
    zeroed: int,
    target: Target,
) -> Schedule:
    lives: dict[int, list[int]] = {storage_of(x): [-1, -1] for x in calls.inputs.values()}
    sizes = {storage_of(x): x.untyped_storage().nbytes() for x in calls.inputs.values()}
    for step, (_, _, arguments) in enumerate(launched):
        for name, value in arguments.items():
            tensor = getattr(value, "base", value)
            if tensor is None or name == _COUNTERS or storage_of(tensor) in calls.weights:
                continue
            sizes[storage_of(tensor)] = tensor.untyped_storage().nbytes()
            lives.setdefault(storage_of(tensor), [step, step])[1] = step
    for y in calls.outputs.values():
        lives[storage_of(y)][1] = len(launched)
    buffers = [Buffer(sizes[storage], *life) for storage, life in lives.items()]
    arena = plan_arena(buffers, start=-(-zeroed // ALIGNMENT) * ALIGNMENT)
    places = dict(zip(lives, arena.offsets, strict=True))

    def place(tensor: Tensor) -> dict[str, int]:
        within, storage = int(tensor.storage_offset()) * tensor.itemsize, storage_of(tensor)
        if storage in calls.weights:
            return {"weight": weights.place(calls.weights[storage]) + within}
        return {"arena": places[storage] + within}

    steps = []
    for call, launch, arguments in launched:
        code = codes[code_name(launch, target)]
        boxes, values = iter(code.boxes), list[dict[str, Any]]()
        for parameter in runtime_parameters(launch):
            value = arguments.get(parameter)
            if parameter not in launch.operands:
                values.append({"value": int(launch.scalars[parameter])})
            elif isinstance(value, TensorDescriptor):
                box, swizzle = next(boxes)
                descriptor = {
                    "base": place(value.base),
                    "dtype": str(value.base.dtype).removeprefix("torch."),
                    "shape": [*map(int, value.shape)],
                    "strides": [*map(int, value.strides)],
                    "box": [*box],
                    "swizzle": swizzle,
                }
                values.append({"descriptor": descriptor})
            else:
                assert value is not None
                values.append({"arena": 0} if parameter == _COUNTERS else place(value))
        tensors: dict[str, Any] = {
            n: getattr(value, "base", value) for n, value in arguments.items() if value is not None
        }
        steps.append(Step(call, launch, code.sha256, tuple(values), tensors))
    return Schedule(calls, tuple(steps), places, lives, arena)
