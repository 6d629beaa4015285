"""Both runtimes of kernel engines on a GPU that is a stand-in: the same bits, and what is wrong with a plan is seen.

Each launch is executed in the PTX emulator, which reports what a GPU would not: reads of what nobody wrote, races.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import Batch, ExportConfig, export_bundle
from export.runtime.engines.kernel_file import file_name
from tests.children import run
from tests.cuda_stand_in.building import AARCH64, HOST, RUNTIME, Machine, build_driver, needed
from tests.cuda_stand_in.files import (
    CLASSES,
    HIDDEN,
    PIXELS,
    broken_files,
    images,
    packed,
    reference,
    unpacked,
    weights,
)
from tests.cuda_stand_in.stand_in import ROOT, Code, compile_tiny
from tests.export.digits import rewrite
from tests.kernels.runtime.running import Cpp, Place

TARGETS = ("sm_87", "sm_90")  # of pointers, and of tensor maps and programmatic launches
COUNTS = (3, 1, 2, 20, 5, 1)  # of images in each run: with a table of their own, and without


class Tiny(Place):
    """With the network of tiny.py, compiled."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tiny = folder / "tiny"
        self.tiny.mkdir()
        compile_tiny(self.tiny, *TARGETS)
        self.code = Code.all_in(self.tiny)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("stand-in"))


@pytest.mark.parametrize("target", TARGETS)
def test_the_python_runtime_computes_the_network(place: Tiny, target: str) -> None:
    """Every count of images, one batch size after another, as the kernels' own rounding explains; nothing is left."""
    with place.device(target) as device:
        found, wrong = place.python(device, place.tiny / f"{target}.kernels", *COUNTS)
    assert (wrong, device.defects, device.left) == ("", [], 0)
    np.testing.assert_allclose(found, reference(images(sum(COUNTS))), rtol=0, atol=2e-6)
    assert device.launches == 2 * (len(COUNTS) + 4)


@pytest.mark.parametrize("target", TARGETS)
def test_the_cpp_runtime_gives_the_same_bits(place: Tiny, cpp: Cpp, target: str) -> None:
    engine = place.tiny / f"{target}.kernels"
    with place.device(target) as device:
        expected, _ = place.python(device, engine, *COUNTS)
        found, wrong = cpp.run(device, engine, *COUNTS)
    assert (wrong, device.defects, device.left) == ("", [], 0)
    assert len(found) == sum(COUNTS) and found.tobytes() == expected.tobytes()


def test_the_cpp_runtime_on_aarch64_gives_the_same_bits(place: Tiny, tmp_path: Path) -> None:
    """The library of a Jetson's machine, run by an emulator of its instructions."""
    cpp, engine = Cpp(tmp_path, AARCH64), place.tiny / "sm_87.kernels"
    with place.device("sm_87") as device:
        expected, _ = place.python(device, engine, 3, 2)
        found, wrong = cpp.run(device, engine, 3, 2)
        ways = cpp(device, "ways", engine, tmp_path / "images.f32")
    assert (wrong, ways.stderr, device.defects, device.left) == ("", "", [], 0)
    assert found.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def bundle(place: Tiny) -> Path:
    """An exported bundle of the network, with its kernel engine for sm_87 and one for another GPU."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)).eval()
    w0, b0, w1, b1 = (torch.from_numpy(values).float() for values in weights().values())
    layers.load_state_dict({"1.weight": w0.T, "1.bias": b0, "3.weight": w1.T, "3.bias": b1})
    config = ExportConfig(precision="fp16", batch=Batch(1, 3, 20), engine="none")
    given = torch.from_numpy(images(6))
    export_bundle(layers, given[:1], place.folder / "plain", config, images=given)

    def add(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        for target in TARGETS:
            files[file_name(target)] = (place.tiny / f"{target}.kernels").read_bytes()

    return rewrite(place.folder / "plain", place.folder / "bundle", add)


def test_verify_runs_an_engine_like_any_artefact(place: Tiny, bundle: Path) -> None:
    """Equal to the eager model by the golden inputs; one for another GPU says so; and what is wrong is not equal."""
    command: list[str | Path] = [sys.executable, ROOT / "scripts" / "verify.py"]
    with place.device("sm_87") as device:
        done = run([*command, bundle], env=device.environment | {"COLUMNS": "250"})
    assert (done.returncode, device.defects, device.left) == (0, [], 0), done.stdout + done.stderr
    (equal,) = [line for line in done.stdout.splitlines() if "kernels sm_87" in line]
    assert "equal" in equal
    assert "it is for sm_90, this GPU is sm_87" in done.stdout

    def swap(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        plan, tensors = unpacked(files[file_name("sm_87")])
        for table in plan["batches"].values():
            arguments = table["launches"][1]["arguments"]
            arguments[1], arguments[2] = {"weight": 0}, arguments[1]
        files[file_name("sm_87")] = packed(plan, tensors)

    wrong = rewrite(bundle, place.folder / "wrong", swap)
    with place.device("sm_87") as device:
        done = run([*command, wrong], env=device.environment)
    assert done.returncode == 1, done.stdout + done.stderr


def test_memory_streams_and_threads_of_the_cpp_runtime(place: Tiny, cpp: Cpp) -> None:
    with place.device("sm_90") as device:
        images(2).tofile(cpp.folder / "two.f32")
        done = cpp(device, "ways", place.tiny / "sm_90.kernels", cpp.folder / "two.f32")
    assert (done.returncode, done.stderr, device.defects, device.left) == (0, "", [], 0)


# What a plan can say that is sound and wrong, by its batch of 3: only running it shows.
def _argument(launch: int, index: int, value: Any) -> Callable[[Any], object]:
    return lambda table: table["launches"][launch]["arguments"].__setitem__(index, value)


def _moved(launch: int, index: int, to: int) -> Callable[[Any], object]:
    def move(table: Any) -> None:
        arguments = table["launches"][launch]["arguments"]
        arguments.insert(to, arguments.pop(index))

    return move


def _box(index: int, **changes: Any) -> Callable[[Any], object]:
    return lambda table: table["launches"][0]["arguments"][index]["descriptor"].update(changes)


PLANTED: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "input from a wrong offset": ("sm_87", _argument(0, 0, {"arena": 512}), "nobody wrote"),
    "hidden values to a wrong offset": ("sm_87", _argument(0, 3, {"arena": 1536}), "nobody wrote"),
    "weights swapped": ("sm_87", _argument(1, 1, {"weight": 0}), ""),
    "arguments swapped": ("sm_87", _moved(1, 3, 0), "nobody wrote"),
    "a null pointer": ("sm_87", _argument(1, 2, {"null": True}), "out of bounds"),
    "launches in another order": ("sm_87", lambda table: table["launches"].reverse(), "nobody wrote"),
    "a launch missing": ("sm_87", lambda table: table["launches"].pop(0), "nobody wrote"),
    "a grid too small": ("sm_87", lambda table: table["launches"][1].update(grid=[2, 2, 1]), ""),
    "a grid too large": ("sm_87", lambda table: table["launches"][1].update(grid=[3, 3, 1]), ""),
    "another count of images": ("sm_87", _argument(1, 6, {"value": 2}), ""),
    "counters not cleared": ("sm_87", lambda table: table.update(zeroed=[0, 0]), "nobody wrote"),
    "a box of another size": ("sm_90", _box(0, box=[8, 32]), "mbarrier"),
    "another swizzle": ("sm_90", _box(1, swizzle=0), ""),
    "a descriptor of fewer rows": ("sm_90", _box(0, shape=[2, 64]), ""),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_in_a_plan_is_refused(place: Tiny, name: str) -> None:
    """By the emulator, by a driver's error, or by the values."""
    target, edit, words = PLANTED[name]
    plan, tensors = unpacked((place.tiny / f"{target}.kernels").read_bytes())
    edit(plan["batches"]["3"])
    engine = place.folder / "planted.kernels"
    engine.write_bytes(packed(plan, tensors))
    with place.device(target) as device:
        found, wrong = place.python(device, engine, 3)
    expected = reference(images(3))
    equal = found.shape == expected.shape and np.allclose(found, expected, rtol=0, atol=1e-3)
    assert not equal or wrong or device.defects
    assert words in " ".join(device.defects), (device.defects, wrong)
    if device.defects:
        assert "CUDA_ERROR_" in wrong and "export it again" in wrong


def test_a_fault_of_a_kernel_is_one_line_in_cpp_too(place: Tiny, cpp: Cpp) -> None:
    """And the process ends in order, though the driver refuses everything from then on."""
    _, edit, _ = PLANTED["a null pointer"]
    plan, tensors = unpacked((place.tiny / "sm_87.kernels").read_bytes())
    edit(plan["batches"]["3"])
    engine = place.folder / "planted.kernels"
    engine.write_bytes(packed(plan, tensors))
    with place.device("sm_87") as device:
        _, wrong = cpp.run(device, engine, 3)
    words = "a kernel left its memory; check the bundle with verify.py, export it again"
    assert wrong == f"3: the GPU's driver refuses to finish: CUDA_ERROR_ILLEGAL_ADDRESS: {words}"


@pytest.mark.mutant
def test_a_wait_that_is_missing_in_the_code_is_refused(place: Tiny) -> None:
    """Kernels that may start early and do not wait for the one before: what `pdl` must not say of such code."""
    waiting = place.code
    place.code = [
        Code(code.cubin, code.architecture, code.ptx.replace("griddepcontrol.wait ;", "")) for code in waiting
    ]  # fmt: skip
    try:
        with place.device("sm_90") as device:
            _, wrong = place.python(device, place.tiny / "sm_90.kernels", 1)
        with place.device("sm_90", version=12020) as older:  # whose graphs keep no such edge
            _, right = place.python(older, place.tiny / "sm_90.kernels", 1)
    finally:
        place.code = waiting
    assert "griddepcontrol.wait" in " ".join(device.defects) and "CUDA_ERROR_LAUNCH_FAILED" in wrong
    assert (right, older.defects) == ("", [])


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "another architecture": ("sm_87", "sm_90", {}, "it is for sm_87, this GPU is sm_90: export it for that one"),
    "an older driver": ("sm_87", "sm_87", {"version": 11040}, "a driver for CUDA 12.0 or newer, the one here"),
    "less shared memory": ("sm_87", "sm_87", {"shared": 1024}, "bytes of shared memory per block, this GPU has 1024"),
    "no GPU": ("sm_87", "sm_87", {"fails": 100}, "CUDA_ERROR_NO_DEVICE: no NVIDIA GPU here"),
    "little memory": ("sm_87", "sm_87", {"memory": 20480}, "CUDA_ERROR_OUT_OF_MEMORY: its memory is full"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_device_cannot_run_is_refused_alike(place: Tiny, cpp: Cpp, name: str) -> None:
    """Before a cubin is loaded where the plan says it; in words that say what to do."""
    made_for, target, options, words = REFUSED[name]
    engine = place.tiny / f"{made_for}.kernels"
    with place.device(target, **options) as device:
        for runtime in (place.python, cpp.run):
            _, wrong = runtime(device, engine, 1)
            assert words in wrong and "\n" not in wrong, wrong
            assert device.launches == 0 and device.left in (0, None)


def test_without_a_driver_both_runtimes_say_so(place: Tiny, cpp: Cpp) -> None:
    with place.device("sm_87") as device:
        device.environment["LD_LIBRARY_PATH"] = str(cpp.folder / "nowhere")
        _, python = place.python(device, place.tiny / "sm_87.kernels", 1)
    code = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1])\n" + OPENING
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    done = run([sys.executable, "-c", code, cpp.library, place.tiny / "sm_87.kernels"], env=environment)
    assert "no NVIDIA driver here" in python and "no NVIDIA driver here" in done.stdout


# argv: the library, then files; a line for each: its code and its words.
OPENING = """
class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("text", ctypes.c_char * 252)]
library.ke_open.restype = Status
library.ke_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
for path in sys.argv[2:]:
    engine = ctypes.c_void_p()
    status = library.ke_open(path.encode(), 0, None, ctypes.byref(engine))
    assert not engine
    print(status.code, status.text.decode())
"""


def test_a_file_that_is_not_sound_is_refused_alike(cpp: Cpp) -> None:
    """The table of the Python reader's tests, without any driver: nothing of it is looked for before."""
    broken, paths = broken_files(), []
    for index, (content, _) in enumerate(broken.values()):
        paths.append(cpp.folder / f"{index}.kernels")
        paths[-1].write_bytes(content)
    code = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1])\n" + OPENING
    done = run([sys.executable, "-c", code, cpp.library, *paths])
    assert not done.returncode, done.stderr
    said = dict(zip(broken, done.stdout.splitlines(), strict=True))
    differ = {
        name: (line, words)
        for (name, (_, words)), line in zip(broken.items(), said.values(), strict=True)
        if not line.startswith("1 ") or words.partition(", got")[0] not in line
    }
    assert not differ


@pytest.mark.parametrize("machine", [HOST, AARCH64], ids=["here", "aarch64"])
def test_a_program_finds_the_runtime_by_cmake(machine: Machine, place: Tiny, tmp_path: Path) -> None:
    """find_package of what was installed, the example, and how large the library is; as the guide says it."""
    cmake, strip = needed("cmake"), needed(machine.strip)
    for program in (machine.cpp, *machine.runner[:1]):
        needed(program)
    prefix, user = tmp_path / "prefix", tmp_path / "user"
    user.mkdir()
    (user / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(user CXX)\nfind_package(kernel_engine 1 REQUIRED)\n"
        f"add_executable(classify {RUNTIME / 'example' / 'classify.cpp'})\n"
        "target_link_libraries(classify kernel_engine::kernel_engine)\n"
    )
    commands: list[list[str | Path]] = [
        [cmake, "-S", RUNTIME, "-B", tmp_path / "build", f"-DCMAKE_INSTALL_PREFIX={prefix}", *machine.cmake],
        [cmake, "--build", tmp_path / "build", "--target", "install"],
        [cmake, "-S", user, "-B", user / "build", f"-DCMAKE_PREFIX_PATH={prefix}", *machine.cmake],
        [cmake, "--build", user / "build"],
    ]
    for command in commands:
        done = run(command)
        assert not done.returncode, done.stdout + done.stderr
    (library,) = [path for path in prefix.rglob("libkernel_engine.so*") if not path.is_symlink()]
    done = run([strip, "-o", tmp_path / "stripped.so", library])
    assert not done.returncode and (tmp_path / "stripped.so").stat().st_size <= 500_000
    images(1).tofile(tmp_path / "image.f32")
    with place.device("sm_87") as device:
        example = [user / "build" / "classify", place.tiny / "sm_87.kernels", tmp_path / "image.f32"]
        if machine.runner:
            shutil.copy(library, tmp_path / "libkernel_engine.so.1")
            build_driver(tmp_path, machine)
            device.environment["LD_LIBRARY_PATH"] = ""
        done = run(machine.on(tmp_path, example), env=device.environment)
    best = int(reference(images(1)).argmax())
    assert done.stdout == f"class {best}, score {reference(images(1))[0, best]:.6g}\n", done.stderr


def test_the_host_is_busy_for_microseconds(place: Tiny, cpp: Cpp, record_property: Callable[[str, Any], None]) -> None:
    """With kernels and a driver that do next to nothing, by the processor's clock: the rest is the runtime's own."""
    with place.device("sm_87", empty=True) as device:
        device.environment["LD_LIBRARY_PATH"] = str(place.driver)
        done = cpp(device, "time", place.tiny / "sm_87.kernels", "10000")
    assert not done.returncode, done.stderr
    record_property("host", done.stdout.strip())
    measured = dict(zip(*[iter(done.stdout.split())] * 2, strict=True))
    assert float(measured["call"]) < 10 and float(measured["worked"]) < 1


def test_the_guide_is_right(cpp: Cpp) -> None:
    """Its code compiles, and the functions that it counts are there."""
    guide = (ROOT / "docs" / "kernel-engine.md").read_text()
    (block,) = re.findall(r"^```cpp\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    source = cpp.folder / "guide.cpp"
    source.write_text(block)
    done = run([needed("g++"), "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-I", RUNTIME, source])
    assert not done.returncode, done.stderr
    header = (RUNTIME / "kernel_engine.h").read_text()
    functions = set(re.findall(r"^(?:\w+ )+\*?(ke_\w+)\(", header, re.MULTILINE))
    assert f"a C interface of {len(functions)} functions" in guide, functions
    symbols = run([needed("nm"), "-D", "--defined-only", cpp.library]).stdout
    assert {line.split()[2] for line in symbols.splitlines() if line.split()[2].startswith("ke_")} == functions
