"""Both runtimes of kernel engines, each in a process of its own that finds a stand-in for the driver."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.children import run
from tests.cuda_stand_in.building import Machine, build_driver, build_program, build_runtime, needed
from tests.cuda_stand_in.files import CLASSES, images
from tests.cuda_stand_in.stand_in import ROOT, Code, StandIn, emulator
from tests.export.digits import without_torch

Values = NDArray[Any]
EXERCISE = Path(__file__).with_name("exercise.cpp")

# What runs in a process that finds the stand-in: argv: engine, images, output, shape of an image, counts.
PYTHON = """
import sys
import numpy as np
from export import ExportError
from export.runtime.engines.kernel_engine import KernelEngine
try:
    with open(sys.argv[1], "rb") as file:
        engine = KernelEngine(file.read(), ("input",), ("output",))
    shape = tuple(map(int, sys.argv[4].split("x")))
    given, found = np.fromfile(sys.argv[2], np.float32).reshape(-1, *shape), []
    for count in map(int, sys.argv[5:]):
        found.append(engine.infer({"input": given[:count]})["output"])
        given = given[count:]
    np.concatenate(found).tofile(sys.argv[3])
    assert len(engine.time({"input": np.zeros((1, *shape), np.float32)}, 2)) == 2
    engine.close()
except ExportError as error:
    sys.exit(f"1: {error}")
"""


class Place:
    """What is built once: the stand-in's library, the machine code it knows, and the folder for the rest."""

    def __init__(self, folder: Path) -> None:
        emulator()
        self.folder = folder
        (folder / "driver").mkdir()
        self.driver = build_driver(folder / "driver")
        self.hidden = without_torch(folder / "hidden")["PYTHONPATH"]
        self.code: list[Code] = []

    def device(self, target: str, **options: Any) -> StandIn:
        place = tempfile.mkdtemp(prefix="device-", dir=self.folder)
        device = StandIn(Path(place), self.driver, self.code, target, **options)
        device.environment["PYTHONPATH"] = os.pathsep.join((self.hidden, str(ROOT)))  # neither PyTorch nor Triton
        return device

    def python(self, device: StandIn, engine: Path, *counts: int, given: Values | None = None) -> tuple[Values, str]:
        """(outputs of all runs, what went wrong) by the Python runtime, on `given` or on images of tiny.py's."""
        shape = "x".join(map(str, images(1).shape[1:] if given is None else given.shape[1:]))
        arguments: list[str | Path] = [engine, *_files(self.folder, counts, given), shape, *map(str, counts)]
        done = run([sys.executable, "-c", PYTHON, *arguments], env=device.environment)
        return _finished(done, self.folder)


def _files(folder: Path, counts: tuple[int, ...], given: Values | None) -> tuple[Path, Path]:
    (images(sum(counts)) if given is None else given).tofile(folder / "images.f32")
    (folder / "outputs.f32").unlink(missing_ok=True)
    return folder / "images.f32", folder / "outputs.f32"


def _finished(done: Any, folder: Path) -> tuple[Values, str]:
    path = folder / "outputs.f32"
    found = np.fromfile(path, np.float32) if path.exists() else np.empty(0, np.float32)
    return found.reshape(-1, CLASSES), "" if not done.returncode else done.stderr.strip() or str(done.returncode)


class Cpp:
    """The C++ runtime, and the program that exercises it, for a machine."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder, self.machine = folder, machine
        for command in machine.runner[:1]:
            needed(command)
        self.library = build_runtime(folder, machine)
        self.program = build_program(EXERCISE, self.library, machine)
        self.driver = build_driver(folder, machine)

    def __call__(self, device: StandIn, what: str, *arguments: str | Path) -> Any:
        environment = {**device.environment, "LD_LIBRARY_PATH": "" if self.machine.runner else str(self.folder)}
        return run(self.machine.on(self.folder, [self.program, what, *arguments]), env=environment)

    def run(self, device: StandIn, engine: Path, *counts: int, given: Values | None = None) -> tuple[Values, str]:
        """As `Place.python`, by the C++ runtime."""
        files = _files(self.folder, counts, given)
        return _finished(self(device, "run", engine, *files, *map(str, counts)), self.folder)
