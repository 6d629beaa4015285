"""PTX of launches, compiled in a process of its own: Triton's interpreter, once on, cannot be switched off again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from kernels.compile import kernel_signature
from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target
from kernels.plan import kernel_of


@dataclass(frozen=True)
class Compiled:
    """A kernel as the assembler gets it.

    Attributes:
        ptx: the text.
        shared: bytes of dynamic shared memory.
        types: of the kernel's parameters by name, in order, as Triton writes them: `*fp16`, `i32`, `constexpr`, ...
        boxes: what the compiler decided of each tensor descriptor, in order.
    """

    ptx: str
    shared: int
    types: Mapping[str, str]
    boxes: tuple[Mapping[str, Any], ...]


class Compiler:
    """Compiles in one child without the interpreter, each launch once; no cache of Triton's is read or written."""

    def __init__(self) -> None:
        self._made: dict[str, Compiled] = {}
        self.restart()

    def restart(self) -> None:
        """With a new child, if the compiler has ended the last one."""
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))

    def __call__(self, launch: KernelLaunch, target: Target) -> Compiled:
        key = repr((launch.kernel, launch.operands, launch.scalars, launch.options, target))
        if key not in self._made:
            with _without_interpreter():  # the child is started at the first call, and inherits it
                self._made[key] = self._pool.submit(compile_to_ptx, launch, target).result()
        return self._made[key]

    def close(self) -> None:
        self._pool.shutdown()


@contextmanager
def _without_interpreter() -> Iterator[None]:
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def compile_to_ptx(launch: KernelLaunch, target: Target) -> Compiled:
    """All stages of Triton's compiler but the assembler's."""
    gpu = GPUTarget("cuda", target.capability, 32)
    backend, context = make_backend(gpu), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    types, constants, attributes = kernel_signature(launch)
    source, options = ASTSource(kernel_of(launch), types, constants, attributes), backend.parse_options(launch.options)
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, options, source.language)
    metadata: dict[str, Any] = {"target": gpu, **options.__dict__}
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(gpu, options, functions, backend.get_module_map(), context)
    for name, stage in stages.items():
        if name != "cubin":
            module = stage(module, metadata)
    if metadata["global_scratch_size"] or metadata["profile_scratch_size"]:
        raise ValueError(f"{launch.kernel} asks for scratch memory, expected none")
    boxes = tuple(dict(box or {}) for box in metadata.get("tensordesc_meta") or ())
    return Compiled(module, metadata["shared"], types, boxes)
