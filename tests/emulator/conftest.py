"""One compiler for a session, and what was executed for the summary at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor

from kernels.configs.config import KernelLaunch
from kernels.configs.targets import Target
from kernels.operators.registry import Arguments
from tests.emulator.block import UnknownInstruction
from tests.emulator.compiling import Compiler
from tests.emulator.running import Emulation, emulate

Run = Callable[[Sequence[KernelLaunch], Target, Arguments[Tensor]], Emulation]


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def run(compiler: Compiler, record_property: Callable[[str, Any], None]) -> Run:
    """`emulate`, counted; a kernel with an instruction that the emulator does not know is a skip that names it."""

    def run(launches: Sequence[KernelLaunch], target: Target, inputs: Arguments[Tensor]) -> Emulation:
        try:
            found = emulate(launches, target, inputs, compiler)
        except UnknownInstruction as unknown:
            record_property("not emulated", (target.name, repr(launches)))
            pytest.skip(f"the emulator does not know {unknown}")
        for launch in found.ran:
            record_property("emulated", (target.name, launch.code, launch.blocks))
        return found

    return run
