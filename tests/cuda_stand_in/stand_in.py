"""A GPU for a process that loads libcuda.so.1: driver.c, and a thread here that executes its launches.

Each launch runs in the PTX emulator on the memory that both processes have mapped: a cubin is known by its bytes, and
what runs is the PTX that it was assembled from.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.children import run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_PAGE = 4096
_ILLEGAL_ADDRESS, _LAUNCH_FAILED = 700, 719
_ITEM_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}  # of CUtensorMapDataType
_SMALL_TENSOR_BIT = 1 << 21


def emulator() -> Any:
    """The parts of the PTX emulator that are used here; a skip that says so where there is none."""
    try:
        block, boxes, launch, memory, program = (
            importlib.import_module(f"kernels.emulator.{name}")
            for name in ("block", "boxes", "launch", "memory", "program")
        )
    except ModuleNotFoundError as error:
        pytest.skip(f"needs the PTX emulator, {error.name}")
    return SimpleNamespace(
        Memory=memory.Memory, BASE=memory._BASE, parse=program.parse, execute=launch.execute,
        TensorMap=boxes.TensorMap, UnknownInstruction=block.UnknownInstruction,
    )  # fmt: skip


def compile_tiny(folder: Path, *targets: str) -> None:
    """tiny.py in a process of its own: the interpreter of Triton, once on, cannot be switched off again."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = run([sys.executable, "-m", "tests.cuda_stand_in.tiny", folder, *targets], env=environment, cwd=ROOT)
    assert not done.returncode, done.stderr


@dataclass(frozen=True)
class Code:
    """What a cubin runs: its bytes, architecture, and the PTX that it was assembled from."""

    cubin: bytes
    architecture: int
    ptx: str

    @classmethod
    def all_in(cls, folder: Path) -> list[Code]:
        """Those that lie in a folder as `sm_87.<name>.cubin` and `sm_87.<name>.ptx`."""
        return [
            cls(
                path.read_bytes(),
                int(path.name.split(".")[0].removeprefix("sm_")),
                path.with_suffix(".ptx").read_text(),
            )
            for path in sorted(folder.glob("*.cubin"))
        ]


@functools.cache
def _parsed(ptx: str) -> Any:
    return emulator().parse(ptx)


class StandIn:
    """One device and those who use it.

    Attributes:
        environment: with which a process finds it.
        defects: what the emulator saw, a line each.
        launches: how many were executed.
        left: things not given back when the device was last released; None while it is in use.
    """

    def __init__(
        self,
        folder: Path,
        driver: Path,
        codes: Sequence[Code],
        target: str = "sm_87",
        *,
        version: int = 13010,
        shared: int | None = None,
        memory: int = 32 << 20,
        fails: int = 0,
        empty: bool = False,
    ) -> None:
        """Nothing listens yet.

        Args:
            folder: an empty one.
            driver: of the library.
            codes: the cubins it knows.
            version: of the driver: 13010 is 13.1.
            shared: bytes of shared memory that a block may have.
            memory: bytes of the device.
            fails: what cuInit returns.
            empty: launches do nothing.
        """
        self.environment = {**os.environ, "CUDA_STAND_IN": str(folder), "LD_LIBRARY_PATH": str(driver)}
        self.environment["PYTHONPATH"] = str(ROOT)
        self.defects: list[str] = []
        self.launches, self._end = 0, 0
        self.left: int | None = None
        self._folder, self._version, self._empty, self._size = folder, version, empty, memory
        number = int(target.removeprefix("sm_"))
        shared = shared or (227 if number in (90, 100, 110) else 163 if number in (80, 87) else 99) << 10
        facts = {"driver": version, "capability": number, "shared": shared, "memory": memory, "fails": fails}
        (folder / "device").write_text("".join(f"{key} {value}\n" for key, value in facts.items()))
        with (folder / "memory").open("wb") as file:
            file.truncate(memory)
        lines, self._programs = [], {}
        for index, code in enumerate(codes):
            program, name = _parsed(code.ptx), f"{index}.cubin"
            (folder / name).write_bytes(code.cubin)
            places = " ".join(f"{offset}:{size}" for offset, size in program.parameters.values())
            count = len(program.parameters)
            lines.append(f"{name} {code.architecture} {program.name} 0 {program.threads} {count} {places}\n")
            self._programs[name, program.name] = program
        (folder / "functions").write_text("".join(lines))

    def __enter__(self) -> StandIn:
        self._parts = emulator()
        # One guard page of the emulator's own lies before the first allocation.
        self._memory = self._parts.Memory(self._size - _PAGE)
        self._memory.data = np.memmap(self._folder / "memory", np.uint8, "r+")
        kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
        self._memory.views = {width: self._memory.data.view(kind) for width, kind in kinds.items()}
        self._lock, self._socket = threading.Lock(), socket.socket(socket.AF_UNIX)
        if not self._empty:
            self._socket.bind(str(self._folder / "socket"))
            self._socket.listen()
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while len(sizes := stream.read(8)) == 8:
                length, payload = struct.unpack("<II", sizes)
                words, data = stream.read(length).decode().split(), stream.read(payload)
                with self._lock:
                    answer = self._answer(words, data)
                connection.sendall(struct.pack("<i", answer))

    def _answer(self, words: list[str], data: bytes) -> int:
        kind, *rest = words
        if kind == "launch":
            try:
                return self._launch(rest[0], rest[1], [*map(int, rest[2:])], data)
            except Exception as error:  # of a thread that nobody watches
                self.defects.append(f"{rest[1]}: {type(error).__name__}: {error}")
                return _LAUNCH_FAILED
        address, size = map(int, rest)
        start = address - self._parts.BASE
        cells = slice(start // 2, -(-(start + size) // 2))
        if kind == "released":
            self.left = size
        elif kind == "allocated":
            self.left = None
            self._memory.access[cells], self._memory.written[cells] = 2, False
            self._end = max(self._end, start + size + 1)
            self._memory._names.append((start, start + size, f"allocation of {size}"))
        elif kind == "freed":
            self._memory.access[cells] = 0
        else:
            self._memory.written[cells] = kind == "written"
        return 0

    def _launch(self, file: str, symbol: str, numbers: list[int], data: bytes) -> int:
        program, memory = self._programs[file, symbol], self._memory
        *grid, shared, dependent = numbers
        memory.writer[: self._end // 2] = 0
        memory.atomics.clear()
        memory.known.clear()
        parameters = np.frombuffer(data, np.uint8).copy()
        for offset, size in program.parameters.values():
            if size == 128:
                described = self._tensor_map(data[offset : offset + size])
                parameters[offset : offset + size] = np.frombuffer(described.pack().ljust(128, b"\0"), np.uint8)
        turns = any(instruction.parts[0] == "atom" for instruction in program.code)
        options = {"in_turns": turns, "dependent": bool(dependent)}
        report = self._parts.execute(program, memory, parameters, grid, shared, **options)
        self.launches += 1
        self.defects += [f"{symbol}: {hazard}" for hazard in report.hazards]
        if not report.hazards:
            return 0
        return _ILLEGAL_ADDRESS if any("out of bounds" in hazard for hazard in report.hazards) else _LAUNCH_FAILED

    def _tensor_map(self, data: bytes) -> Any:
        """What driver.c encoded, as the emulator reads it."""
        magic, flags, address, facts, *strides = struct.unpack("<8s8Q", data[:72])
        shape, box = struct.unpack("<5I", data[72:92]), struct.unpack("<5H", data[92:102])
        rank, item = facts >> 8 & 0xFF, _ITEM_BYTES[facts & 0xFF]
        last = sum((n - 1) * stride for n, stride in zip(shape[:rank], (item, *strides), strict=False))
        small = self._version <= 13010 and last + 1 < 128 << 10
        if magic != b"STAND-IN" or flags != (0 if small else _SMALL_TENSOR_BIT):
            raise ValueError("a tensor map that is not as Triton's driver leaves it")
        inner = [1, *(stride // item for stride in strides[: rank - 1])]
        return self._parts.TensorMap(
            address, item, shape[:rank][::-1], tuple(inner[::-1]), box[:rank][::-1], facts >> 16 & 0xFF
        )
