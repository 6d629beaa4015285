"""Machine code of launches, compiled ahead of time in processes of their own and kept in the user's private cache."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.base.errors import ExportError, first_line
from export.base.private_cache import private_folder
from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target
from kernels.workers import workers

_LOG = logging.getLogger(__name__)
# Of the children: no interpreter; and no lines of source in the machine code, which are half of its size.
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
    folder = _folder()
    found = {name: _read(folder, name) for name in requests}
    missing = {
        name: request
        for name, request in requests.items()
        if (code := found[name]) is None or any(launch_key(launch) not in code.floors for launch in request.predicted)
    }
    codes = {name: code for name, code in found.items() if code is not None and name not in missing}
    if missing:
        with _environment(), workers(len(missing)) as pool:
            futures = {name: pool.submit(_compile, request, target) for name, request in missing.items()}
            for name, future in futures.items():
                what = f"{missing[name].launch.kernel} for {target.name}"
                try:
                    codes[name] = future.result()
                except BrokenProcessPool as error:
                    raise ExportError(f"Triton ends the process that compiles {what}") from error
                except Exception as error:  # whatever its compiler raises
                    raise ExportError(f"{what} does not compile: {first_line(error)}") from error
                _write(folder, name, codes[name])
    return codes


def _compile(request: CodeRequest, target: Target) -> Code:
    """In a child: the code, with the floors of all that are to be predicted."""
    from kernels.compile import compile_kernel, kernel_signature

    kernel, types = compile_kernel(request.launch, target), kernel_signature(request.launch)[0]
    decided = kernel.metadata
    if decided.global_scratch_size or decided.profile_scratch_size or decided.num_ctas != 1:
        raise ValueError("it asks for scratch memory or a cluster, expected neither")
    if kernel.shared_bytes > target.shared_memory:
        raise ValueError(f"it needs {kernel.shared_bytes} bytes of shared memory, limit {target.shared_memory}")
    operands, parameters = request.launch.operands, []
    for name in (name for name, kind in types.items() if kind != "constexpr"):
        operand = operands.get(name)
        block = operand.block if operand is not None else None
        parameters.append("i32" if operand is None else "pointer" if block is None else f"descriptor:{len(block)}")
    boxes = [(tuple(map(int, box["block_size"])), int(box["swizzle"])) for box in decided.tensordesc_meta or ()]
    if len(boxes) != sum(kind.startswith("descriptor") for kind in parameters):
        raise ValueError(f"it has {len(boxes)} descriptors, expected one for each tensor that it loads in boxes")
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


@contextmanager
def _environment() -> Iterator[None]:
    """What children inherit that are started meanwhile."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(_ENVIRONMENT)
    try:
        yield
    finally:
        put(before)


@functools.cache
def _sources() -> str:
    """Of all that machine code depends on beside the launch: the kernels' source and the compiler."""
    import triton

    import kernels.jit

    folder = Path(kernels.jit.__path__[0])
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted([*folder.glob("*.py"), *(folder.parent / "prediction").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _folder() -> Path | None:
    """The private folder of machine code, None where there cannot be one."""
    try:
        return private_folder("kernels")
    except ExportError as error:
        _LOG.warning("%s: compiled kernels not cached", error)
    except (OSError, RuntimeError) as error:
        _LOG.debug("compiled kernels not cached: %s", error)
    return None


def _read(folder: Path | None, name: str) -> Code | None:
    """What `_write` kept under a name; None where there is nothing, or nothing sound."""
    if folder is None:
        return None
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error):
        return None
    return code if code.sha256 == record.get("sha256") else None


def _write(folder: Path | None, name: str, code: Code) -> None:
    """Keep a code under a name. A cache that cannot be written is not worth an error."""
    if folder is None:
        return
    record: dict[str, Any] = {
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
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as stream:
            try:
                json.dump(record, stream)
                stream.flush()
                os.replace(stream.name, folder / f"{name}.json")
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        _LOG.debug("compiled kernel not cached: %s", error)
