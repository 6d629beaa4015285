"""Ahead-of-time compilation of the kernels, on a machine without a GPU, and what can be read off the machine code.

The signature and constants come from launch.py, so that what is inspected here is what the launcher runs there.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels.config import ConvConfig, ConvProblem, Target, k_blocks, unsupported_reason
from kernels.implicit_gemm import _conv2d_bias_act_kernel
from kernels.launch import kernel_arguments, launch_options

_TRITON_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# One SASS instruction: address comment, optional predicate, then the opcode with its dotted modifiers.
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_WIDTH_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel compiled for one target, and what its machine code shows.

    Attributes:
        problem, config, target: what it was compiled for.
        registers: per thread.
        stack_bytes: per thread; not 0 means that registers spill.
        spill_loads, spill_stores: instructions that read and write the stack.
        shared_bytes: shared memory per block.
        tensor_core_ops: instructions by mnemonic (HMMA, HGMMA, IMMA, ...).
        global_loads: instructions from global memory to registers, by bytes per thread.
        async_copies: instructions from global to shared memory (cp.async), by bytes per thread.
        cubin: the machine code.
    """

    problem: ConvProblem
    config: ConvConfig
    target: Target
    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    tensor_core_ops: Mapping[str, int]
    global_loads: Mapping[int, int]
    async_copies: Mapping[int, int]
    cubin: bytes = field(repr=False)

    @property
    def widest_load(self) -> int:
        """Bytes per thread of the widest load from global memory."""
        return max([*self.global_loads, *self.async_copies], default=0)

    @property
    def narrowest_copy_expected(self) -> int:
        """Bytes per thread that every async copy should have: 16, or less if a slice is too small for 16 each.

        0 when K is a single slice: with nothing to overlap it is loaded through registers.
        """
        if k_blocks(self.problem, self.config) == 1:
            return 0
        slice_elements = min(self.config.block_m, self.config.block_n) * self.config.block_k
        return min(16, slice_elements * self.problem.dtype.itemsize // (32 * self.config.num_warps))

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
        wants_tensor_cores = self.problem.dtype != torch.float32 or self.config.input_precision != "ieee"
        mma = "HGMMA" if self.target.has_wgmma else "HMMA"
        if wants_tensor_cores and not self.tensor_core_ops.get(mma):
            found.append(f"no {mma}, tensor-core instructions are {dict(self.tensor_core_ops)}")
        narrowest = min(self.async_copies, default=0)
        if self.problem.loads_are_vectors and (self.widest_load < 16 or narrowest < self.narrowest_copy_expected):
            found.append(
                f"loads {dict(self.global_loads)} and copies {dict(self.async_copies)} (bytes: count),"
                f" expected copies of {self.narrowest_copy_expected} bytes and more"
            )
        return found


def compile_kernel(problem: ConvProblem, config: ConvConfig, target: Target) -> CompiledKernel:
    """Compile the kernel with which the launcher would run `problem` under `config` on `target`; needs no GPU.

    Pointers are taken to be 16-byte aligned, as torch allocates them.

    Raises:
        ValueError: `config` cannot run `problem` on `target`.
        RuntimeError: Triton's interpreter is on, so there is nothing to compile.
    """
    if not isinstance(_conv2d_bias_act_kernel, JITFunction):
        raise RuntimeError("the kernels were imported with TRITON_INTERPRET set, expected it unset to compile them")
    reason = unsupported_reason(problem, config, target)
    if reason is not None:
        raise ValueError(f"{config} cannot run {problem}: {reason}")
    compiled = triton.compile(
        ASTSource(_conv2d_bias_act_kernel, *kernel_signature(problem, config)),
        target=GPUTarget("cuda", target.capability, 32),
        options=launch_options(config),
    )
    registers, stack_bytes, opcodes = _disassemble(compiled.asm["cubin"])
    mnemonics = Counter(opcode[0] for opcode in opcodes)
    return CompiledKernel(
        problem=problem,
        config=config,
        target=target,
        registers=registers,
        stack_bytes=stack_bytes,
        spill_loads=mnemonics["LDL"],
        spill_stores=mnemonics["STL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core_ops={name: count for name, count in sorted(mnemonics.items()) if name.endswith("MMA")},
        global_loads=_widths(opcodes, "LDG"),
        async_copies=_widths(opcodes, "LDGSTS"),
        cubin=compiled.asm["cubin"],
    )


def kernel_signature(
    problem: ConvProblem, config: ConvConfig
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """(types, constants, attributes) of the kernel's parameters as Triton's JIT derives them from the launch."""
    arguments = kernel_arguments(problem, config)
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in _conv2d_bias_act_kernel.params:
        name = parameter.name
        if name == "residual_ptr" and not problem.has_residual:
            types[name], constants[name] = "constexpr", None
        elif name.endswith("_ptr"):
            types[name] = f"*{_TRITON_DTYPES[problem.dtype]}"
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr:
            types[name], constants[name] = "constexpr", arguments[name]
        else:
            types[name] = "i32"
    return types, constants, attributes


def _disassemble(cubin: bytes) -> tuple[int, int, list[list[str]]]:
    """Registers and stack bytes per thread, and every instruction's opcode split at its dots."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)])
        sass = _run([triton.knobs.nvidia.nvdisasm.path, "-c", str(path)])
    counted = _USAGE.search(usage)
    opcodes = [opcode.split(".") for opcode in _OPCODE.findall(sass)]
    if counted is None or not opcodes:
        raise RuntimeError(f"expected register usage and instructions from cuobjdump and nvdisasm, got {usage!r}")
    return int(counted[1]), int(counted[2]), opcodes


def _widths(opcodes: list[list[str]], mnemonic: str) -> dict[int, int]:
    widths = Counter(
        next((_WIDTH_BYTES[modifier] for modifier in opcode if modifier in _WIDTH_BYTES), 4)
        for opcode in opcodes
        if opcode[0] == mnemonic
    )
    return dict(sorted(widths.items()))


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
