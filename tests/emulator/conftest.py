"""One compiler for a session, and what was executed for the summary at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from kernels.configs.config import Config
from kernels.configs.targets import Target
from kernels.operators.registry import Arguments
from kernels.problems import Problem
from tests.emulator.block import UnknownInstruction
from tests.emulator.compiling import Compiler
from tests.emulator.running import Emulation, emulate

Run = Callable[[Problem, Config, Target, Arguments[Tensor]], Emulation]


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def run(compiler: Compiler, record_property: Callable[[str, Any], None]) -> Run:
    """`emulate`, counted; a kernel with an instruction that the emulator does not know is a skip that names it."""

    def run(problem: Problem, config: Config, target: Target, inputs: Arguments[Tensor]) -> Emulation:
        try:
            found = emulate(problem, config, target, inputs, compiler)
        except UnknownInstruction as unknown:
            record_property("not emulated", f"{target.name} {problem.key} {config}: {unknown}")
            pytest.skip(f"{unknown}: not known to the emulator")
        for code, blocks, _ in found.ran:
            record_property("emulated", (code, blocks))
        return found

    return run
