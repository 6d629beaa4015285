"""Machine code of launches, compiled ahead of time in processes of their own and kept in the user's private cache."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from export.base.errors import ExportError, first_line
from export.base.private_cache import Records
from export.base.process import Child
from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target

# Of the compiling processes: no interpreter; and no lines of source in the machine code, which are half of its size.
_ENVIRONMENT = {"TRITON_INTERPRET": None, "TRITON_DISABLE_LINE_INFO": "1"}


@dataclass(frozen=True)
class Code:
    """One compiled kernel.

    Attributes:
        symbol: of its function.
        warps, shared: of a block; bytes of dynamic shared memory.
        parameters: of the function, in order, without the two pointers to scratch memory that end them: `pointer`,
            `i32`, or `descriptor:R` of a tensor of R axes.
        boxes: of each descriptor, in order: the sides of a block, and its swizzle as the driver numbers it.
        cubin, ptx: the machine code, and what it was assembled from.
        floors: predicted seconds of launches, by `launch_key`.
    """

    symbol: str
    warps: int
    shared: int
    parameters: tuple[str, ...]
    boxes: tuple[tuple[tuple[int, ...], int], ...]
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)
    floors: Mapping[str, float] = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.cubin).hexdigest()


@dataclass(frozen=True)
class CodeRequest:
    """A launch to compile, and launches of the same code to predict."""

    launch: KernelLaunch
    predicted: tuple[KernelLaunch, ...] = ()


def launch_key(launch: KernelLaunch) -> str:
    """What tells the times of launches of the same code apart."""
    facts = (launch.grid, *launch.scalars.items(), launch.tiles, launch.problem.key)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def code_name(launch: KernelLaunch, target: Target) -> str:
    """Names the machine code of a launch: those of the same name run the same."""
    from kernels.compile import code_key  # imports Triton, which a network of ONNX alone need not have

    return hashlib.sha256(repr((_sources(), target.name, code_key(launch))).encode()).hexdigest()[:32]


@functools.cache
def compilers(target: Target) -> dict[str, str]:
    """Name -> version of what makes machine code for a target."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    return {"triton": triton.__version__, "ptxas": str(get_ptxas(target.capability).version)}


def least_driver(target: Target) -> int:
    """What cuDriverGetVersion has to say at least: any of the assembler's major version loads its machine code."""
    return 1000 * int(compilers(target)["ptxas"].split(".")[0])


def compile_codes(requests: Mapping[str, CodeRequest], target: Target) -> dict[str, Code]:
    """The machine code of each request by its `code_name`, from the cache or compiled on all cores.

    Raises:
        ExportError: Triton does not compile one, or it asks for what a launch does not give; names it.
    """
    records = Records("kernels")
    found = {name: _read(records, name) for name in requests}
    missing = {
        name: request
        for name, request in requests.items()
        if (code := found[name]) is None or any(launch_key(launch) not in code.floors for launch in request.predicted)
    }
    codes = {name: code for name, code in found.items() if code is not None and name not in missing}
    return codes | _compiled(missing, target, records) if missing else codes


def _compiled(requests: Mapping[str, CodeRequest], target: Target, records: Records) -> dict[str, Code]:
    """By processes of their own, each kept as soon as it is there."""
    idle: SimpleQueue[Child] = SimpleQueue()

    def compiled(name: str) -> Code:
        child = idle.get()
        try:
            code: Code = child.run(f"{__name__}:compile_code", requests[name], target)
        finally:
            idle.put(child)
        _write(records, name, code)
        return code

    workers = min(os.cpu_count() or 1, len(requests))
    # Where one is left by an error or by Ctrl-C the processes end first, and with them what the threads wait for.
    with ThreadPoolExecutor(workers) as threads, ExitStack() as processes:
        for _ in range(workers):
            idle.put(processes.enter_context(Child("compiling", variables=_ENVIRONMENT)))
        futures = {name: threads.submit(compiled, name) for name in requests}
        codes = {}
        for name, future in futures.items():
            try:
                codes[name] = future.result()
            except ExportError as error:
                raise ExportError(f"{requests[name].launch.kernel} for {target.name}: {error}") from error
        return codes


def compile_code(request: CodeRequest, target: Target) -> Code:
    """In a process of its own: the code, with the floors of all that are to be predicted.

    Raises:
        ExportError: Triton does not compile it, or it asks for what a launch does not give.
    """
    from kernels.compile import compile_kernel, kernel_signature

    try:
        kernel = compile_kernel(request.launch, target)
    except Exception as error:  # whatever its compiler raises
        raise ExportError(f"{type(error).__name__}: {first_line(error)}") from error
    types = kernel_signature(request.launch)[0]
    decided = kernel.metadata
    if decided.global_scratch_size or decided.profile_scratch_size or decided.num_ctas != 1:
        raise ExportError("its code asks for scratch memory or a cluster, expected neither")
    if kernel.shared_bytes > target.shared_memory:
        raise ExportError(f"its code needs {kernel.shared_bytes} bytes of shared memory, limit {target.shared_memory}")
    operands, parameters = request.launch.operands, []
    for name in (name for name, kind in types.items() if kind != "constexpr"):
        operand = operands.get(name)
        block = operand.block if operand is not None else None
        parameters.append("i32" if operand is None else "pointer" if block is None else f"descriptor:{len(block)}")
    boxes = [(tuple(map(int, box["block_size"])), int(box["swizzle"])) for box in decided.tensordesc_meta or ()]
    if len(boxes) != sum(kind.startswith("descriptor") for kind in parameters):
        raise ExportError(f"its code has {len(boxes)} descriptors, expected one for each tensor that it loads in boxes")
    return Code(
        symbol=decided.name,
        warps=decided.num_warps,
        shared=kernel.shared_bytes,
        parameters=tuple(parameters),
        boxes=tuple(boxes),
        cubin=kernel.cubin,
        ptx=kernel.ptx,
        floors={launch_key(launch): kernel.floor(launch).seconds for launch in request.predicted},
    )


@functools.cache
def _sources() -> str:
    """Of all that machine code and its floors depend on beside the launch: the kernels' source, compiler and boards."""
    import triton

    import kernels.jit

    root = Path(kernels.jit.__path__[0]).parent
    digest = hashlib.sha256(triton.__version__.encode())
    parts = ("jit/*.py", "prediction/*.py", "configs/targets.py", "compile.py")
    for path in sorted(path for part in parts for path in root.glob(part)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(records: Records, name: str) -> Code | None:
    """What `_write` kept under a name; None where there is nothing, or nothing sound."""
    record = records.read(name)
    try:
        code = Code(
            symbol=str(record["symbol"]),
            warps=int(record["warps"]),
            shared=int(record["shared"]),
            parameters=tuple(map(str, record["parameters"])),
            boxes=tuple((tuple(map(int, sides)), int(swizzle)) for sides, swizzle in record["boxes"]),
            cubin=base64.b64decode(record["cubin"]),
            ptx=zlib.decompress(base64.b64decode(record["ptx"])).decode(),
            floors={str(key): float(seconds) for key, seconds in record["floors"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error):
        return None
    return code if code.sha256 == record.get("sha256") else None


def _write(records: Records, name: str, code: Code) -> None:
    """Keep a code under a name."""
    record = {
        "symbol": code.symbol,
        "warps": code.warps,
        "shared": code.shared,
        "parameters": code.parameters,
        "boxes": code.boxes,
        "sha256": code.sha256,
        "cubin": base64.b64encode(code.cubin).decode(),
        "ptx": base64.b64encode(zlib.compress(code.ptx.encode(), 1)).decode(),
        "floors": dict(code.floors),
    }
    records.write(name, record)
