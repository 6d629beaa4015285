"""C and C++ built for the tests, for this machine or for aarch64; a skip says what is missing for that."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.children import run

HERE = Path(__file__).parent
RUNTIME = HERE.parents[1] / "kernels" / "runtime"
_COMMON = ("-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden")


@dataclass(frozen=True)
class Machine:
    """What builds for a machine, there by cmake with more flags, and what a command is run by there."""

    c: str
    cpp: str
    strip: str
    runner: tuple[str, ...] = ()
    cmake: tuple[str, ...] = ()

    def on(self, folder: Path, command: Sequence[str | Path]) -> list[str | Path]:
        """A command whose libraries lie in `folder`; this machine finds them by LD_LIBRARY_PATH."""
        if not self.runner:
            return [*command]
        return [*self.runner, "-E", f"LD_LIBRARY_PATH={folder}", *command]


HOST = Machine("gcc", "g++", "strip")
AARCH64 = Machine(
    "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-strip",
    ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"),
)  # fmt: skip


def needed(command: str) -> str:
    """Where a program is; a skip that names it where it is not."""
    found = shutil.which(command)
    if found is None:
        pytest.skip(f"needs {command}")
    return found


@cache
def _has_json(compiler: str) -> bool:
    return not run(
        [compiler, "-std=c++17", "-fsyntax-only", "-include", "nlohmann/json.hpp", "-x", "c++", "/dev/null"]
    ).returncode


def build_driver(folder: Path, machine: Machine = HOST) -> Path:
    """driver.c as libcuda.so.1 in a folder, which is returned."""
    _build([needed(machine.c), "-O1", "-g", *_COMMON, "-shared", "-Wl,-soname,libcuda.so.1",
            "-o", folder / "libcuda.so.1", HERE / "driver.c", "-lpthread"])  # fmt: skip
    return folder


def build_runtime(folder: Path, machine: Machine = HOST) -> Path:
    """The C++ runtime as a shared library in a folder; its path."""
    compiler, library = needed(machine.cpp), folder / "libkernel_engine.so"
    if not _has_json(compiler):
        pytest.skip("needs the header of nlohmann-json (Debian: nlohmann-json3-dev)")
    _build([compiler, "-std=c++17", "-O1", *_COMMON, "-shared", "-Wl,-soname,libkernel_engine.so",
            "-o", library, RUNTIME / "kernel_engine.cpp", "-ldl", "-lpthread"])  # fmt: skip
    return library


def build_program(source: Path, runtime: Path, machine: Machine = HOST) -> Path:
    """A program that uses the runtime, beside it; its path."""
    program = runtime.parent / source.stem
    _build([needed(machine.cpp), "-std=c++17", "-O2", *_COMMON, "-I", RUNTIME, "-o", program, source, runtime,
            "-lpthread"])  # fmt: skip
    return program


def _build(command: Sequence[str | Path]) -> None:
    done = run(command)
    assert not done.returncode, done.stderr[-3000:]
