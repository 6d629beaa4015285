"""`make gpu` without a GPU: the order and time of its steps, what is kept of one that dies, and the page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from export.base.errors import ExportError
from export.benchmark import device
from export.terminal.gpu_page import gpu_page
from kernels.launch import target_of
from kernels.operators.registry import OPERATORS
from tests.kernels.cases import CASES
from tests.scripts.loading import ROOT, load_script, refusal, run_here

GPU = load_script("gpu")
MACHINE = {"gpu": "NVIDIA H200", "cpu": "a CPU", "cpus": 16, "torch": "2.11.0", "target": "sm_90",
           "multiprocessors": 132, "driver": "580, 1980 MHz"}  # fmt: skip
ORDER = ["smoke", "exact integers", "kernels", "networks", "memory", "floors", "resnet50", "resnet18", "times",
         "tensorrt", "compiled resnet50", "compiled resnet18"]  # fmt: skip


def step(name: str, code: str, read: Callable[[str], Any] = GPU.read_tests, **more: Any) -> Any:
    return GPU.Step(name, f"what {name} does", 10, (sys.executable, "-c", code), read, **more)


PASSES = "print('tests/a.py::test_b PASSED  [100%]')"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run steps within some seconds; returns the record, as it lies on the disk."""
    monkeypatch.setattr(GPU, "ROOT", tmp_path)
    monkeypatch.setattr(GPU, "FOLDER", tmp_path)

    def run(*steps: Any, seconds: float = 60.0) -> dict[str, Any]:
        record = {"machine": MACHINE, "date": "2026-11-29", "command": "make gpu", "limit_s": seconds, "passed": False}
        GPU.run_steps(steps, {**record, "steps": []}, tmp_path / "r.json", time.monotonic() + seconds)
        found: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
        return found

    return run


def test_the_steps_in_order_and_the_tests_they_run() -> None:
    """Every test is there, and marked for a GPU."""
    steps = GPU.steps_of("sm_90", Path("folder"))
    assert [step.name for step in steps] == ORDER
    assert {CASES[name].operator for name in GPU.SMOKE} == OPERATORS.keys()
    pytests = {step.name: [*step.command] for step in steps if step.read is GPU.read_tests}
    paths = [part for command in pytests.values() for part in command if part.startswith("tests/")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for path in paths:
        assert any(line.startswith(path) for line in listed), path
    (times,) = (step for step in steps if step.name == "times")
    assert str(times.floors) in steps[ORDER.index("floors")].command
    needless = [step.name for step in steps if not step.needed]
    assert needless == ["floors", "tensorrt", "compiled resnet50", "compiled resnet18"]


def test_time_that_a_step_leaves_is_the_others() -> None:
    assert GPU.share([60, 30, 10], 200) == 120
    assert GPU.share([30, 10], 199) == pytest.approx(149.25)
    assert GPU.share([10], 7) == 7


HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("child", "w").write(str(child.pid))
print("tests/a.py::test_b PASSED  [ 50%]", flush=True)
print("tests/a.py::test_hangs ", end="", flush=True)
time.sleep(600)
"""
SEES = """
import json
*before, own = json.load(open("r.json"))["steps"]
assert own["status"] == "begun" and [entry["status"] for entry in before] == ["passed", "failed", "failed"], before
assert "test_bad" in open("r.md").read()
"""


def test_what_a_step_found_is_kept_whatever_the_next_does(run: Callable[..., Any], tmp_path: Path) -> None:
    started = time.monotonic()
    fails = "print('tests/a.py::test_bad FAILED [ 50%]\\ntests/a.py::test_b[x y] PASSED [100%]'); exit(1)"
    record = run(
        step("passes", PASSES),
        step("fails", fails),
        step("dies", f"{PASSES}; import os, sys; sys.stdout.flush(); os.kill(os.getpid(), 11)"),
        step("sees", SEES + PASSES),
        step("hangs", HANGS),
        step("is not here", "", absent="no such tool"),
        step("says what cannot be read", "", lambda said: GPU.Reading(json.loads(said))),
        step("ends at once", "", lambda said: GPU.Reading({})),
        step("goes on", PASSES),
        seconds=20.0,
    )
    assert time.monotonic() - started < 20
    found = {entry["step"]: (entry["status"], entry["reason"]) for entry in record["steps"]}
    assert found["passes"] == found["sees"] == found["ends at once"] == found["goes on"] == ("passed", "")
    assert found["fails"] == ("failed", "1 of 2 failed, the first tests/a.py::test_bad")
    assert record["steps"][1]["said"][0] == "tests/a.py::test_bad FAILED [ 50%]" and "said" not in record["steps"][0]
    assert found["dies"] == ("failed", "SIGSEGV: tests/a.py::test_b PASSED  [100%]")
    status, reason = found["hangs"]
    assert status == "out of time" and reason.endswith(" s: tests/a.py::test_hangs")
    assert record["steps"][4]["tests"]["passed"] == 1
    reason = "what it left cannot be read: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"
    assert found["says what cannot be read"] == ("failed", reason)
    assert found["is not here"] == ("absent", "no such tool")
    assert record["passed"] is False
    with pytest.raises(ProcessLookupError):  # what it had started is gone too
        for _ in range(100):
            os.kill(int((tmp_path / "child").read_text()), 0)
            time.sleep(0.05)


def test_a_step_without_time_is_not_begun(run: Callable[..., Any]) -> None:
    record = run(step("first", "", needed=False, absent="no"), step("late", PASSES), seconds=0.5)
    assert (record["steps"][1]["status"], record["steps"][1]["reason"]) == ("out of time", "none was left")
    assert record["passed"] is False and "command" in record["steps"][1]


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Also where whoever started the tests had them ignore it, as a shell does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_whoever_stops_it_keeps_the_record_and_leaves_no_step_running(run: Callable[..., Any], tmp_path: Path) -> None:
    stops = "import os, time; open('child', 'w').write(str(os.getpid())); os.kill(os.getppid(), 2); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        run(step("passes", PASSES), step("stops", stops))
    statuses = [entry["status"] for entry in json.loads((tmp_path / "r.json").read_text())["steps"]]
    assert statuses == ["passed", "begun"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


TESTS = """
import pytest
@pytest.mark.parametrize("case", ["a b", "c"])
def test_right(case): pass
def test_wrong(): assert 0
def test_left(): pytest.skip("not here")
@pytest.fixture
def broken(): raise ValueError
def test_of_it(broken): pass
"""


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "shared"])
def test_outcomes_of_tests_are_read_as_this_pytest_writes_them(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(TESTS)
    flags = [flag for flag in GPU.pytest() if flag not in ("-m", "gpu")]
    command = [flags[0], "-m", *flags[1:], *options, "tests/test_x.py"]
    environment = {**os.environ, "COLUMNS": "250"}
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment).stdout
    found = GPU.read_tests(said)
    failed = ["tests/test_x.py::test_of_it: ValueError", "tests/test_x.py::test_wrong: assert 0"]
    assert found.facts["tests"] | {"failed": sorted(found.facts["tests"]["failed"])} == {
        "passed": 2, "skipped": 1, "failed": failed,
    }  # fmt: skip
    assert found.wrong.startswith("2 of 5 failed, the first tests/test_x.py::test_")


def test_tests_that_were_all_skipped_prove_nothing() -> None:
    for said in ("tests/a.py::test_b SKIPPED (no GPU) [100%]", ""):
        assert GPU.read_tests(said).lacking == "no test has passed"


BAR = "========= "
CHECKED = {
    "sound": (f"{BAR}COMPUTE-SANITIZER\n{{}}\n{BAR}ERROR SUMMARY: 0 errors", "", ""),
    "beyond": (
        f"{BAR}COMPUTE-SANITIZER\n{BAR}Invalid __global__ read of size 16 bytes\n{{}}\n{BAR}ERROR SUMMARY: 2 errors",
        "2 errors, the first: Invalid __global__ read of size 16 bytes",
        "",
    ),
    "unable": (f"{BAR}COMPUTE-SANITIZER\n{BAR}Error: Device not supported.\n", "", "Error: Device not supported."),
}


@pytest.mark.parametrize("case", CHECKED)
def test_what_the_memory_checker_says(case: str) -> None:
    said, wrong, absent = CHECKED[case]
    found = GPU.read_checker(said.format("tests/a.py::test_b PASSED [100%]"))
    assert (found.wrong, found.absent) == (wrong, absent)


def test_a_checker_that_has_checked_nothing_has_not_passed(run: Callable[..., Any]) -> None:
    (entry,) = run(step("memory", PASSES, GPU.read_checker))["steps"]
    assert (entry["status"], entry["reason"]) == ("failed", "the checker has not said what it found")


def test_what_scripts_write_is_read_also_in_part(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert GPU.read_rows(path).lacking == GPU.read_floors(path).lacking == "it has written nothing"
    rows = [{"provider": "eager", "status": "measured"}, {"provider": "ours c3", "status": "failed"}]
    path.write_text(json.dumps({"results": [{"rows": rows}]}))
    assert GPU.read_rows(path).wrong == "wrong or not to be run: ours c3"
    path.write_text(json.dumps({"rows": [{"problem": "stem", "status": "measured"}]}))
    assert GPU.read_rows(path).wrong == ""
    kernels = [{"problem": "head", "faults": []}, {"problem": "stem", "faults": ["spills"]}]
    path.write_text(json.dumps({"kernels": kernels}))
    assert GPU.read_floors(path) == GPU.Reading(
        {"kernels": 2, "faulty": ["stem: spills"]}, "1 of 2 kernels are at fault, the first stem: spills"
    )


def test_floors_are_handed_on_where_they_were_written(run: Callable[..., Any], tmp_path: Path) -> None:
    says = f"import sys; print(sys.argv[1:]); {PASSES}"
    for written in (False, True):
        run(step("times", says, floors=tmp_path / "floors.json"))
        assert ("--floors" in (tmp_path / "times.log").read_text()) is written
        (tmp_path / "floors.json").touch()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if there were a GPU; where the logs lie."""
    monkeypatch.setattr(GPU, "run_in_child", lambda *_: MACHINE)
    monkeypatch.setattr(GPU, "FOLDER", GPU.ROOT / "build" / tmp_path.name)
    return tmp_path


ENDS = {
    "passed": (PASSES, 0, "every kernel and network computes what it should on NVIDIA H200"),
    "failed": ("exit(1)", 1, "FAILED; do not deploy on this GPU"),
    "out of time": (f"{PASSES}; import time; time.sleep(60)", 1, "NO VERDICT on what did not finish; next: "),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_last_line_and_the_exit_code(case: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, exit_code, last = ENDS[case]
    steps = [step("it", code), step("more", "exit(1)", needed=False)]
    monkeypatch.setattr(GPU, "steps_of", lambda target, folder: steps)
    process = run_here("gpu", "--limit", 3, "--output", machine)
    assert process.returncode == exit_code and process.stdout.splitlines()[-1].startswith(last)
    (path,) = machine.glob("nvidia-h200-*.json")
    record = json.loads(path.read_text())
    assert record["passed"] is (exit_code == 0) and record["steps"][0]["status"] == case
    assert path.with_suffix(".md").is_file() and f"{path} and " in process.stdout


def test_an_earlier_result_of_the_day_stays(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = GPU.new_file(tmp_path, "NVIDIA GeForce RTX 4090", "2026-11-29")
        path.touch()
        names.append(path.stem.removeprefix("nvidia-geforce-rtx-4090-2026-11-29"))
    assert names == ["", "-2", "-3"]


def test_what_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(GPU, "installed", lambda name: name not in ("pytest", "triton"))
        said = refusal(run_here("gpu", "--output", tmp_path))
        assert f"not installed for {sys.executable}: triton, pytest; with another Python: make gpu PYTHON=" in said
    assert "--limit: expected seconds of at least 1, got 0" in refusal(run_here("gpu", "--limit", 0))
    assert "--output: expected a folder that exists" in refusal(run_here("gpu", "--output", tmp_path / "none"))
    with monkeypatch.context() as patch:
        patch.setattr(GPU, "ROOT", tmp_path)
        assert "has no tests/: expected a checkout" in refusal(run_here("gpu", "--output", tmp_path))
    if not torch.cuda.is_available():
        assert refusal(run_here("gpu", "--output", tmp_path)).startswith(
            f"no NVIDIA GPU here: torch {torch.__version__}"
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_the_gpu_is_described_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(major: int) -> SimpleNamespace:
        sizes = {"multi_processor_count": 108, "L2_cache_size": 40 << 20, "total_memory": 80 << 30}
        return SimpleNamespace(name="NVIDIA A100", major=major, minor=0, **sizes)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major in (8, 7):
        target_of.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, major=major: properties(major))
        if major == 8:
            found = device.describe_gpu()
            assert (found["gpu"], found["target"], found["l2_bytes"]) == ("NVIDIA A100", "sm_80", 40 << 20)
            json.dumps(found)
        else:
            with pytest.raises(ExportError, match="is sm_70, expected sm_80 or newer"):
                device.describe_gpu()
    target_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("the driver is too old\nmore", stacklevel=1))
    with pytest.raises(ExportError, match=r"no NVIDIA GPU here: torch .* \(the driver is too old\)$"):
        device.describe_gpu()


ROW = {"provider": "ours c3", "status": "measured", "reason": "", "median_ms": 0.2, "p20_ms": 0.19, "p80_ms": 0.21,
       "images_per_second": 5000.0, "times_eager": 8.0, "times_compiled": None}  # fmt: skip
TIME = {"status": "measured", "reason": "", "median_us": 4.0, "p20_us": 3.0, "p80_us": 5.0, "floor_us": 2.0}
FOUND = {
    "rows": [
        {**TIME, "problem": "near", "over_floor": 2.0, "bound_by": "l2"},
        {**TIME, "problem": "far", "over_floor": 3.0, "bound_by": "dram"},
        {"problem": "broken|pipe", "status": "failed", "reason": "max z is 9"},
    ],
    "floors_of": "H200",
    "networks": [{"model": "resnet50", "batch": 1, "kernels_us": 150.0, "floor_us": 100.0}],
}
STEPS: list[dict[str, Any]] = [
    {"step": "smoke", "what": "w", "status": "passed", "reason": "", "seconds": 9.4,
     "tests": {"passed": 5, "failed": [], "skipped": 0}},
    {"step": "memory", "what": "w", "status": "absent", "reason": "no tool"},
    {"step": "resnet50", "what": "w", "status": "passed", "reason": "", "seconds": 50.0,
     "found": {"results": [{"model": "resnet50", "batch": 1, "rows": [ROW, {"provider": "eager", "status": "failed",
                                                                            "reason": "it broke"}]}]}},
    {"step": "floors", "what": "w", "status": "passed", "reason": "", "seconds": 9.0, "kernels": 44, "faulty": []},
    {"step": "times", "what": "w", "status": "begun", "reason": "", "found": FOUND},
]  # fmt: skip


def test_the_page_shows_what_is_there_so_far() -> None:
    record = {"machine": MACHINE, "date": "2026-11-29", "command": "make gpu", "limit_s": 420, "passed": False}
    for count in range(len(STEPS) + 1):
        page = gpu_page({**record, "steps": STEPS[:count]}, "it.json")
    for line in (
        "# NVIDIA H200, 2026-11-29",
        "| smoke | w | passed | 9 | 5 tests passed, 0 failed |",
        "| memory | w | absent |  | no tool |",
        "| resnet50 | resnet50 | 1 | ours c3 | 0.200 | 0.190 | 0.210 | 5,000 | 8.00 |  |  |  |  |",
        "| resnet50 | resnet50 | 1 | eager: failed, it broke |  |  |  |  |  |  |  |  |  |",
        "| floors | w | passed | 9 | 44 kernels |",
        "| broken/pipe |  |  |  |  |  |  | max z is 9 |",
        "| resnet50 | 1 | 150.0 | 100.0 | 200.0 |",
    ):
        assert line in page.splitlines(), line
    assert "Floors are predicted, of H200" in page and page.index("| far |") < page.index("| near |")
