"""Ahead-of-time compilation of the kernels, on a machine without a GPU, and what can be read off the machine code.

The signature and constants come from plan.py, so that what is inspected here is what launch.py runs there.
"""

import functools
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

from kernels.configs.config import Config, KernelLaunch
from kernels.configs.heuristic import starting_configs
from kernels.configs.selection import select_config
from kernels.configs.targets import Target
from kernels.configs.tuning import neighbours
from kernels.plan import kernel_of, plan
from kernels.prediction.floor import Floor, predicted_floor
from kernels.prediction.sass import parse
from kernels.problems import ConvProblem, Problem
from kernels.workers import workers

_TRITON_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}
_INSTALLED = tuple(int(part) for part in triton.__version__.split(".")[:2])
# A convolution that every target and every kind of load takes.
_PROBE = ConvProblem(8, 128, 14, 14, 128, (1, 1), relu=True)
# One SASS instruction: address comment, optional predicate, then the opcode with its dotted modifiers.
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_WIDTH_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel compiled for one target, and what its machine code shows.

    Attributes:
        launch, target: what it was compiled for.
        registers: per thread.
        stack_bytes: per thread; not 0 means that registers spill.
        spill_loads, spill_stores: instructions that read and write the stack.
        shared_bytes: shared memory per block.
        tensor_core_ops: instructions by mnemonic (HMMA, HGMMA, IMMA, ...).
        global_loads: instructions from global memory to registers, by bytes per thread.
        async_copies: instructions from global to shared memory (cp.async), by bytes per thread.
        box_loads: TMA loads.
        cubin: the machine code.
        multiplies: whether it has matrix products, for which there are tensor cores.
        sass: the machine code as text, with the compiler's scheduling.
        ptx: what it was assembled from.
        metadata: what the compiler decided: symbol, warps, scratch memory, the boxes of tensor descriptors.
    """

    launch: KernelLaunch
    target: Target
    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    tensor_core_ops: Mapping[str, int]
    global_loads: Mapping[int, int]
    async_copies: Mapping[int, int]
    box_loads: int
    cubin: bytes = field(repr=False)
    multiplies: bool = True
    sass: str = field(default="", repr=False)
    ptx: str = field(default="", repr=False)
    metadata: Any = field(default=None, repr=False)

    def floor(self, launch: KernelLaunch | None = None) -> Floor:
        """The predicted floor of its launch, or of another that runs the same code.

        Raises:
            ValueError: the machine code cannot be followed.
        """
        launch = launch or self.launch
        arguments = kernel_arguments(launch)
        return predicted_floor(
            launch, self.target, parse(self.sass), self.ptx, arguments, self.registers, self.shared_bytes
        )

    @property
    def widest_load(self) -> int:
        """Bytes per thread of the widest load from global memory."""
        return max([*self.global_loads, *self.async_copies], default=0)

    def to_json(self) -> dict[str, Any]:
        """Everything but the machine code, in types that JSON has."""
        return {
            "target": self.target.name,
            "kernel": self.launch.kernel.split(".")[1],
            "problem": self.launch.problem.key,
            "config": self.launch.config.to_json(),
            "registers": self.registers,
            "stack_bytes": self.stack_bytes,
            "shared_bytes": self.shared_bytes,
            "shared_bound": self.launch.config.shared_memory(self.launch.problem) + self.target.barrier_bytes,
            "shared_limit": self.target.shared_memory,
            "tensor_core_ops": dict(self.tensor_core_ops),
            "global_loads": {str(width): count for width, count in self.global_loads.items()},
            "async_copies": {str(width): count for width, count in self.async_copies.items()},
            "box_loads": self.box_loads,
            "faults": self.faults,
        }

    @property
    def faults(self) -> list[str]:
        """What keeps this from being good code for its problem; empty if nothing does."""
        found = []
        if self.stack_bytes or self.spill_loads or self.spill_stores:
            found.append(
                f"spills: {self.stack_bytes} bytes of stack, {self.spill_stores} stores, {self.spill_loads} loads"
            )
        if self.shared_bytes > self.target.shared_memory:
            found.append(f"{self.shared_bytes} bytes of shared memory, limit {self.target.shared_memory}")
        if self.multiplies and self.launch.problem.dtype != torch.float32:
            mma = self.target.matrix_instruction(_rows(self.launch))
            if not self.tensor_core_ops.get(mma):
                found.append(f"no {mma}, tensor-core instructions are {dict(self.tensor_core_ops)}")
        if self.launch.uses_boxes and not self.box_loads:
            found.append("no TMA load, expected one for each box")
        expected, windows = _narrowest_copy(self.launch), "VECTOR" in self.launch.scalars
        narrow = min(self.async_copies, default=0) < expected or (self.widest_load < 16 and not windows)
        if (self.launch.problem.loads_are_vectors or windows) and not self.launch.uses_boxes and narrow:
            found.append(
                f"loads {dict(self.global_loads)} and copies {dict(self.async_copies)} (bytes: count),"
                f" expected copies of {expected} bytes and more"
            )
        return found


def _rows(launch: KernelLaunch) -> int:
    """Rows of the tile that the tensor cores accumulate: pixels; over boxes, and with windows, filters."""
    s = launch.scalars
    return s["BLOCK_N"] if "VECTOR" in s else s.get("BLOCK_M") or s.get("BLOCK_Q") or s["BLOCK_N"]


def _narrowest_copy(launch: KernelLaunch) -> int:
    """Bytes per thread that every async copy should have: 16, or less if a tile is too small for 16 each.

    0 where nothing is copied asynchronously: a single slice of K, with nothing to overlap, goes through registers.
    """
    s = launch.scalars
    if "VECTOR" in s:
        return int(s["VECTOR"] * launch.problem.dtype.itemsize)
    if "K_BLOCKS" not in s or max(s["K_BLOCKS"], s.get("K_BLOCKS_S", 0)) == 1:
        return 0
    sides = [s[name] for name in ("BLOCK_M", "BLOCK_Q", "BLOCK_N", "BLOCK_MID") if name in s]
    tile_bytes = min(sides) * s["BLOCK_K"] * launch.problem.dtype.itemsize
    return int(min(16, tile_bytes // (32 * int(launch.options["num_warps"]))))


def compile_kernel(launch: KernelLaunch, target: Target) -> CompiledKernel:
    """Compile the kernel of `launch` for `target`; needs no GPU.

    Pointers are taken to be 16-byte aligned, as torch allocates them.

    Raises:
        RuntimeError: Triton's interpreter is on, so there is nothing to compile.
    """
    compiled = triton.compile(
        ASTSource(kernel_of(launch), *kernel_signature(launch)),
        target=GPUTarget("cuda", target.capability, 32),
        options=dict(launch.options),
    )
    registers, stack_bytes, sass = _disassemble(compiled.asm["cubin"])
    opcodes = [opcode.split(".") for opcode in _OPCODE.findall(sass)]
    mnemonics = Counter(opcode[0] for opcode in opcodes)
    return CompiledKernel(
        launch=launch,
        target=target,
        registers=registers,
        stack_bytes=stack_bytes,
        spill_loads=mnemonics["LDL"],
        spill_stores=mnemonics["STL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core_ops={name: count for name, count in sorted(mnemonics.items()) if name.endswith("MMA")},
        global_loads=_widths(opcodes, "LDG"),
        async_copies=_widths(opcodes, "LDGSTS"),
        box_loads=mnemonics["UTMALDG"],
        cubin=compiled.asm["cubin"],
        multiplies="tt.dot" in compiled.asm["ttir"],
        sass=sass,
        ptx=compiled.asm["ptx"],
        metadata=compiled.metadata,
    )


def compile_problems(
    problems: Mapping[Target, Sequence[Problem]],
    progress: Callable[[str], None] = lambda step: None,
    floors: bool = False,
) -> list[dict[str, Any]]:
    """Compile every kernel that the problems of each target launch, once each, on all cores.

    Args:
        problems: by target; the configurations are `select_config`'s.
        progress: called with a line for each kernel that is done.
        floors: predict them too.

    Returns:
        `CompiledKernel.to_json()` of each kernel in order, with "problems": the keys of all that run its code, and
        "floors": `Floor.to_json()` of each.

    Raises:
        RuntimeError: Triton's interpreter is on, so there is nothing to compile.
    """
    sharing: dict[tuple[Any, ...], list[_Place]] = {}
    for target, wanted in problems.items():
        for problem in dict.fromkeys(wanted):
            for index, launch in enumerate(plan(problem, select_config(problem, target), target)):
                sharing.setdefault((target, *code_key(launch)), []).append((problem, index, target))
    found = []
    with workers() as pool:
        for kernel in pool.map(functools.partial(_compile_one, floors=floors), sharing.values()):
            found.append(kernel)
            progress(f"{len(found)} of {len(sharing)}: {kernel['target']} {kernel['kernel']}")
    return found


_Place = tuple[Problem, int, Target]  # a launch: the index-th of a problem's


def _compile_one(places: Sequence[_Place], floors: bool) -> dict[str, Any]:
    """What is found in the code that these launches share."""
    launches = [plan(problem, select_config(problem, target), target)[index] for problem, index, target in places]
    kernel = compile_kernel(launches[0], places[0][2])
    found = {**kernel.to_json(), "problems": [launch.problem.key for launch in launches]}
    found["wholes"] = [problem.key for problem, _, _ in places]  # of which they are a part, or all
    if floors:
        found["floors"] = [kernel.floor(launch).to_json() for launch in launches]
    return found


def unserved_reason(target: Target) -> str | None:
    """Why the installed Triton has no good code for a target; None if it has. Tried in a process, which it may end."""
    version = f"Triton {triton.__version__}"
    with workers(1) as pool:
        try:
            faults = pool.submit(_compile_one, [(_PROBE, 0, target)], floors=False).result()["faults"]
        except BrokenProcessPool:
            return f"{version} ends the process that compiles for it"
        except Exception as error:  # whatever its compiler raises
            return f"{version}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"{version}: {'; '.join(faults)}" if faults else None


def version_reason(target: Target) -> str | None:
    """Why the installed Triton is not one that compiles for a target, known without trying; None if it is."""
    if target.oldest_triton <= _INSTALLED:
        return None
    oldest = ".".join(map(str, target.oldest_triton))
    return f"{target.name}: Triton {triton.__version__} does not compile for it, expected {oldest} or newer"


def alternatives(problem: Problem, target: Target) -> list[tuple[Config, float]]:
    """(configuration, predicted seconds of its launches) of `select_config`'s, then of what the tuner tries around it.

    Those that do not compile to good code are left out.

    Raises:
        ValueError: `select_config`'s does not.
    """
    chosen = select_config(problem, target)
    starts = starting_configs(problem, target, [select_config(part, target) for part in problem.parts])
    configs = [*dict.fromkeys((chosen, *starts, *neighbours(problem, chosen, target)))]
    with workers() as pool:
        floors = list(pool.map(functools.partial(_floor_of, problem, target), configs))
    if floors[0] is None:
        raise ValueError(f"{chosen} does not compile to good code for {problem} on {target.name}")
    return [(config, floor) for config, floor in zip(configs, floors, strict=True) if floor is not None]


def _floor_of(problem: Problem, target: Target, config: Config) -> float | None:
    seconds = 0.0
    for launch in plan(problem, config, target):
        try:
            kernel = compile_kernel(launch, target)
        except (CompilationError, PTXASError):
            return None
        if kernel.faults:
            return None
        seconds += kernel.floor().seconds
    return seconds


def kernel_signature(
    launch: KernelLaunch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """(types, constants, attributes) of the kernel's parameters as Triton's JIT derives them from the launch.

    They are what its cache goes by: a launch finds there what was compiled ahead.

    Raises:
        RuntimeError: Triton's interpreter is on, so there is nothing to compile.
    """
    if not isinstance(kernel_of(launch), JITFunction):
        raise RuntimeError("the kernels were imported with TRITON_INTERPRET set, expected it unset to compile them")
    return _signature(launch)


def _signature(
    launch: KernelLaunch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """`kernel_signature`, also under Triton's interpreter."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for number, parameter in enumerate(inspect.signature(kernel_of(launch).fn).parameters.values()):
        name = parameter.name
        operand = launch.operands.get(name)
        if operand is not None and operand.block is not None:
            types[name] = f"tensordesc<{_TRITON_DTYPES[operand.dtype]}{[*operand.block]}>"
        elif operand is not None:
            types[name] = f"*{_TRITON_DTYPES[operand.dtype]}"
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif name in launch.operands:
            types[name], constants[name] = "constexpr", None
        elif parameter.annotation is tl.constexpr:
            types[name], constants[name] = "constexpr", launch.scalars[name]
        else:
            types[name] = "i32"
        # Triton names what is constant as having no attributes, 3.6 only where it is a word.
        if types[name] == "constexpr" and (_INSTALLED > (3, 6) or isinstance(constants[name], str)):
            attributes[(number,)] = []
    return types, constants, attributes


def runtime_parameters(launch: KernelLaunch) -> list[str]:
    """The parameters of the machine code by name, in order."""
    return [name for name, kind in _signature(launch)[0].items() if kind != "constexpr"]


def kernel_arguments(launch: KernelLaunch) -> list[int | None]:
    """The value of each parameter of the machine code, in order; None is an address that is not known before."""
    types, _, _ = kernel_signature(launch)
    found: list[int | None] = []
    for name in (name for name, kind in types.items() if kind != "constexpr"):
        operand = launch.operands.get(name)
        if operand is not None and operand.block is not None:
            found += [None, *[1] * (2 * len(operand.block))]  # the tensor map, then its shape and strides
        else:
            found.append(None if operand is not None else int(launch.scalars[name]))
    return found


def code_key(launch: KernelLaunch) -> tuple[Any, ...]:
    """What the machine code of a launch depends on: launches with equal keys run the same code."""
    types, constants, _ = _signature(launch)
    return (launch.kernel, *types.items(), *constants.items(), *launch.options.items())


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers and stack bytes per thread, and the instructions with the bits that encode them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)])
        sass = _run([triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", str(path)])
    counted = _USAGE.search(usage)
    if counted is None or not _OPCODE.search(sass):
        raise RuntimeError(f"expected register usage and instructions from cuobjdump and nvdisasm, got {usage!r}")
    return int(counted[1]), int(counted[2]), sass


def _widths(opcodes: list[list[str]], mnemonic: str) -> dict[int, int]:
    widths = Counter(
        next((_WIDTH_BYTES[modifier] for modifier in opcode if modifier in _WIDTH_BYTES), 4)
        for opcode in opcodes
        if opcode[0] == mnemonic
    )
    return dict(sorted(widths.items()))


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
