"""The benchmark: nothing wrong is timed, what is timed is one run, and the numbers follow from the times."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock, call

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import Batch, ExportError, fuse
from export.base.machine import describe_machine
from export.base.precision import PRECISIONS
from export.benchmark import compare, export_step, timing
from export.benchmark.candidates import PROVIDERS, Candidate, Subject, cpu_candidates, cuda_candidates
from export.benchmark.compare import Row, compare_candidates, compare_on, describe
from export.benchmark.roofline import Ceilings, floor_seconds
from export.benchmark.runners import ModuleRunner
from export.benchmark.timing import Clock, cpu_turn, cuda_turn, measure
from export.benchmark.workload import Work
from export.fusion.passes import LEVELS
from export.sample_inputs import crops, photographs
from export.terminal.benchmark_tables import print_comparison, print_floors, print_tool
from resnet.initialise import initialise
from resnet.models import create_model
from tests.scripts.loading import load_script, refusal, run_here

pytestmark = pytest.mark.usefixtures("captured_once")

QUICK = Clock(cpu_turn, rounds=2, seconds=1e-6)
FP32 = PRECISIONS["fp32"]
FACTOR = FP32.network_factor


IMAGES = crops(photographs(), 8, 3, (32, 32))
INPUTS = [IMAGES[:4], IMAGES[4:]]


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = initialise(create_model("resnet8"), IMAGES).eval()
    return Subject.of(model, {"c3": fuse(model, IMAGES, Batch(1, 4, 8))}, PRECISIONS["fp32"], IMAGES)


class Counting(nn.Module):
    """The model, its results changed by `change`, counting its runs."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor, int], Tensor] = lambda y, run: y) -> None:
        super().__init__()
        self.model, self.change, self.runs = model, change, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.change(self.model(x), self.runs)


def candidate(name: str, module: nn.Module) -> Candidate:
    return Candidate(name, lambda n: ModuleRunner(module, torch.zeros(n, 3, 32, 32), ("output",)), FACTOR)


def remembered(which: Callable[[int], int]) -> Callable[[Tensor, int], Tensor]:
    """Answers with the result of another run: `which` gives its number, from 1 on."""
    answers: list[Tensor] = []

    def change(y: Tensor, run: int) -> Tensor:
        answers.append(y.clone())
        return answers[which(run) - 1]

    return change


WRONG: dict[str, Callable[[Tensor, int], Any]] = {
    "one NaN": lambda y, run: y.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(torch.nan)),
    "two classes swapped": lambda y, run: y[:, [1, 0, *range(2, 10)]],
    "float16 called float32": lambda y, run: y.half().float(),
    "a class too few": lambda y, run: y[:, :9],
    "the result of the run before": remembered(lambda run: max(1, run - 1)),
    "an output too many": lambda y, run: (y, y),
    "dies": lambda y, run: Batch(2, 1, 1),  # an ExportError, as of an engine's process
}


@pytest.mark.parametrize("defect", WRONG)
def test_what_is_wrong_is_not_timed(defect: str, subject: Subject) -> None:
    right, wrong = Counting(subject.model), Counting(subject.model, WRONG[defect])
    rows = compare_candidates([candidate("eager", right), candidate("wrong", wrong)], subject, 4, INPUTS, QUICK)
    assert rows[0] and rows[0].seconds and not rows[0].reason
    assert rows[0].check is not None and rows[0].check.error > 0  # against float64, not against itself
    assert not rows[1] and not rows[1].seconds and rows[1].reason
    assert right.runs > 2 >= wrong.runs  # 8 images in batches of 4, and never again
    records = describe(rows, 4, {})
    assert [record["status"] for record in records] == ["measured", "failed"]
    assert "median_ms" not in records[1]
    json.dumps(records, allow_nan=False)


def test_what_goes_wrong_while_timed_loses_its_times(subject: Subject) -> None:
    """Also where the first two answers are replayed, which pass a check that repeats the first one."""
    changes = {
        "tired": lambda y, run: y * (1 if run <= 2 else 1.01),
        "replays": remembered(lambda run: run if run <= 2 else 1 + (run - 1) % 2),
    }
    candidates = [candidate(name, Counting(subject.model, change)) for name, change in changes.items()]
    for row in compare_candidates(candidates, subject, 4, INPUTS, QUICK):
        assert not row and not row.seconds and row.reason.startswith("after timing: ")


def test_who_cannot_run_and_who_breaks_down(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mock(side_effect=ExportError("not installed"))
    fail = Mock(side_effect=RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1"))
    monkeypatch.setattr(torch, "compile", compile_nothing := Mock(return_value=fail))
    runner = MagicMock(**{"infer.side_effect": RuntimeError("no kernel\nlong explanation")})
    runner.__enter__.return_value = runner
    compiled = [c for c in cpu_candidates(subject, 1) if c.name == "torch.compile"]
    broken = Candidate("b", lambda batch: runner, 2.0)
    candidates = [candidate("eager", subject.model), Candidate("a", missing, 2.0), broken, *compiled]
    rows = compare_candidates(candidates, subject, 4, INPUTS, QUICK)
    assert [bool(row) for row in rows] == [True, True, False, True]
    runner.__exit__.assert_called_once()
    assert compile_nothing.call_args.kwargs["dynamic"] is False
    reasons = ["", "not installed", "RuntimeError: no kernel", "No working C++ compiler found"]
    assert [row.reason for row in rows] == reasons
    statuses = ["measured", "not measured", "failed", "not measured"]
    assert [record["status"] for record in describe(rows, 4, {})] == statuses


def test_runners_take_turns_and_another_begins_each_round() -> None:
    turns: list[tuple[str, int, list[int]]] = []

    def turn(runner: Any, inputs: Iterator[Any], count: int) -> list[float]:
        turns.append((runner.name, count, [next(inputs) for _ in range(count)]))
        return [0.1 if runner.name == "fast" else 2.0] * count

    runners: dict[str, Any] = {name: SimpleNamespace(name=name) for name in ("fast", "slow")}
    sets: list[Any] = [1, 2, 3]
    seconds = measure(runners, sets, Clock(turn, rounds=3, seconds=1.0))
    assert {name: len(values) for name, values in seconds.items()} == {"fast": 12, "slow": 3}  # 1 s; once a round
    fast, slow = ("fast", 4), ("slow", 1)
    assert [(name, count) for name, count, _ in turns[2:]] == [fast, slow, slow, fast, fast, slow]
    assert [x for name, _, loaded in turns if name == "fast" for x in loaded] == [*sets * 5]


def test_a_turn_on_the_cpu_times_one_run_and_not_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Mock(**{"perf_counter.side_effect": [1.0, 2.0, 4.0, 8.0]})
    monkeypatch.setattr(timing, "time", runner)
    letters: Any = itertools.cycle("abc")  # as good as tensors
    assert cpu_turn(runner, letters, 2) == [1.0, 4.0]
    once = [call.perf_counter(), call.step(), call.perf_counter()]
    assert runner.mock_calls[1:] == [call.load("a"), call.step(), call.load("b"), *once, call.load("c"), *once]


def test_a_turn_on_a_gpu_times_one_run_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Mock(**{"event.side_effect": [1.0, 2.0, 4.0, 8.0]})

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.milliseconds = runner.event()

        def elapsed_time(self, end: Event) -> float:
            assert runner.mock_calls[-1] == call.synchronize()
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", runner.synchronize)
    letters: Any = itertools.cycle("ab")
    assert cuda_turn(runner, letters, 2) == [1e-3, 4e-3]
    once = [call.step(), call.event(), call.step(), call.event()]
    assert runner.mock_calls == [call.load("a"), *once, call.load("b"), *once, call.synchronize()]


def test_the_numbers_of_a_row() -> None:
    rows = [
        Row("eager", "a", tuple(np.linspace(0.01, 0.03, 11))),
        Row("torch.compile max-autotune", "i", (0.01,)),
        Row("ours c3", "c3", (0.005, 0.004, 0.006)),
        Row("tensorrt", "", reason="not installed"),
    ]
    eager, compiled, ours, absent = describe(rows, 8, {"a": 0.002, "c3": 0.001})
    assert eager["median_ms"] == pytest.approx(20) and eager["images_per_second"] == pytest.approx(400)
    assert (eager["p20_ms"], eager["p80_ms"]) == pytest.approx((14, 26))
    assert (eager["times_eager"], eager["times_compiled"]) == pytest.approx((1.0, 0.5))
    assert (compiled["times_eager"], compiled["times_compiled"]) == pytest.approx((2.0, 1.0))
    assert "floor_ms" not in compiled
    assert (ours["times_eager"], ours["times_compiled"]) == pytest.approx((4.0, 2.0))
    assert (ours["floor_ms"], ours["over_floor"], ours["runs"]) == pytest.approx((1.0, 5.0, 3))
    assert absent == {"provider": "tensorrt", "batch": 8, "status": "not measured", "reason": "not installed"}
    without = describe([Row("eager", "a", failed=True, reason="wrong"), *rows[1:]], 8, {})
    assert without[2]["times_eager"] is None and without[2]["times_compiled"] == pytest.approx(2.0)


def test_the_floor_is_the_slower_of_arithmetic_and_memory_kernel_by_kernel() -> None:
    works = [Work("arithmetic", "conv", 100, 10, 10), Work("memory", "conv", 10, 50, 30)]
    assert floor_seconds(works, Ceilings(flops=10, bandwidth=4)) == pytest.approx(100 / 10 + 80 / 4)


# kernels launched, and MB of fp16 activations per image at 224 x 224: counted by hand from the architecture
RESNET18 = {"a": (68, 34.6), "b": (23, 12.4), "c1": (21, 9.2), "c2": (18, 8.5), "c3": (18, 8.5)}


def test_floors(capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = json.loads(run_here("benchmark", "--model", "resnet18", "--floors", "--json").stdout)["results"]
    rows = {row["level"]: row for row in result["rows"]}
    assert result["precision"] == "fp16" and list(rows) == ["a", "i", "b", "c1", "c2", "c3"]
    for level, (kernels, megabytes) in RESNET18.items():
        assert rows[level]["kernels"] == kernels, level
        assert rows[level]["activation_bytes"] / 1e6 == pytest.approx(megabytes, abs=0.05), level
        assert rows[level]["flops"] / 1e9 == pytest.approx(3.63, abs=0.005)
        assert rows[level]["weight_bytes"] / 1e6 == pytest.approx(23.4, abs=0.05)
    assert rows["b"]["kernels"] < rows["i"]["kernels"] < rows["a"]["kernels"]
    last = print_floors({"results": [result]})
    assert last.startswith("resnet18 moves 4.1 times fewer") and last.endswith("benchmark.py --model resnet18")
    assert "34.6" in capsys.readouterr().out


def test_providers_are_asked_for_by_the_beginning_of_their_names(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = cpu_candidates(subject, 1)
    assert all(c.name.startswith(PROVIDERS) for c in candidates)
    assert compare._among(candidates, ()) == candidates
    found = [c.name for c in compare._among(candidates, ("torch.compile", "onnxruntime"))]
    assert found == ["eager", "torch.compile", "onnxruntime, plain export", "onnxruntime, our file"]
    fused = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(compare, "fused_at", fused)
    for providers, levels in ((("ours c1",), ["b", "c1", "c3"]), ((), [*LEVELS]), (("eager",), ["b", "c3"])):
        with pytest.raises(InterruptedError):
            next(compare_on("cuda", subject.model, IMAGES, Mock(), FP32, [1], lambda step: None, providers))
        assert fused.call_args.args[0] == levels


COMMAND = ["--model", "resnet8", "--device", "cpu", "--batch", "2"]


def test_compare_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler, which takes a minute, and with two turns each."""

    def candidates(subject: Subject, threads: int) -> list[Candidate]:
        return [c for c in cpu_candidates(subject, threads) if c.name != "torch.compile"]

    monkeypatch.setattr(compare, "cpu_candidates", candidates)
    monkeypatch.setattr(compare, "CPU_CLOCK", QUICK)
    monkeypatch.setattr("export.terminal.benchmark_tables.BUSY", float("inf"))
    path = tmp_path / "result.json"
    process = run_here("benchmark", *COMMAND, "--output", path)
    out, err = process.stdout, process.stderr
    record = json.loads(path.read_text())
    (result,) = record["results"]
    assert process.returncode == 0 and record["passed"]
    assert record["command"] == f"python scripts/benchmark.py {' '.join(COMMAND)} --output {path}"
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["cpu"]
    assert (result["precision"], result["batch"], result["threads"]) == ("fp32", 2, torch.get_num_threads())
    names = ["eager", "eager channels_last", "onnxruntime, plain export", "onnxruntime, our file"]
    openvino = ["openvino, our file", "openvino, our int8 model.cpu.onnx", "openvino, our int8 model.onnx"]
    expected = [*names, openvino[0], "onnxruntime, our int8 file", *openvino[1:]]
    assert [row["provider"] for row in result["rows"]] == expected
    absent = set() if importlib.util.find_spec("openvino") else set(openvino)
    assert {row["provider"] for row in result["rows"] if "openvino is not installed" in row["reason"]} == absent
    for row in result["rows"]:
        if row["provider"] in absent:
            continue
        assert row["status"] == "measured" and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        limit = 1.5 if "int8" in row["provider"] else FACTOR
        assert 0 < row["error_ratio"] <= row["error_limit"] == limit
        assert row["provider"] in out
    assert (
        "threads for torch, ONNX Runtime and OpenVINO alike" in out
        and f"time {len(expected) - len(absent)} providers" in err
    )
    last = "next: python scripts/export.py --model resnet8 --precision fp32"
    assert out.splitlines()[-2:] == [f"{path} written", last]


RESULT = {"model": "resnet20", "device": "cpu", "precision": "fp32", "batch": 1, "threads": 1}
EAGER = {"provider": "eager", "status": "measured", "reason": "", "median_ms": 2.0, "times_eager": 1.0, "p20_ms": 1.0}


def test_a_wrong_provider_is_exit_1_and_named_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"provider": "hasty", "status": "failed", "reason": "error is 9 times"}
    results = [RESULT | {"rows": [EAGER | {"p80_ms": 1.1}, wrong]}]
    monkeypatch.setattr(load_script("benchmark"), "compare", lambda *_: results)
    process = run_here("benchmark", *COMMAND, "--output", tmp_path / "result.json")
    assert process.returncode == 1 and json.loads((tmp_path / "result.json").read_text())["passed"] is False
    *_, last = process.stdout.splitlines()
    assert "hasty: failed: error is" in process.stdout
    assert last.startswith("FAILED") and last.endswith("hasty; do not deploy that")


def test_what_was_measured_before_it_is_interrupted_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(*_: Any) -> Iterator[dict[str, Any]]:
        yield RESULT | {"rows": [EAGER]}
        raise KeyboardInterrupt

    monkeypatch.setattr(load_script("benchmark"), "compare", results)
    assert run_here("benchmark", *COMMAND, "--output", tmp_path / "result.json").returncode == 130
    assert json.loads((tmp_path / "result.json").read_text())["results"] == [RESULT | {"rows": [EAGER]}]


def test_a_busy_machine_is_told_so() -> None:
    for high, expected in ((1.2, "next: "), (1.9, "the machine was busy: eager's times spread by 1.9 times")):
        record = {"machine": describe_machine(None), "results": [RESULT | {"rows": [EAGER | {"p80_ms": high}]}]}
        assert print_comparison(record).startswith(expected)


def test_export_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Mock()
    monkeypatch.setattr(load_script("benchmark"), "seeded_model", lambda name: None)
    monkeypatch.setattr(export_step, "output_names", lambda graph_module: ("output",))
    for name in ("plain_onnx", "fuse", "lower_onnx"):
        monkeypatch.setattr(export_step, name, getattr(steps, name))
    out = run_here("benchmark", "--model", "resnet8", "--export-step").stdout
    file = ["lower_onnx", "lower_onnx().serialize"]
    once = ["plain_onnx", *file * 2, "fuse", *file]
    assert [name for name, *_ in steps.mock_calls] == ["fuse", *once * (1 + export_step.ROUNDS)]
    for label in ("torch.onnx.export", "ONNX step, fp32", "capture, fuse and ONNX step, fp16", "median s", "1.00"):
        assert label in out
    assert out.splitlines()[-1] == "next: python scripts/export.py --model resnet8"


def checkout(folder: Path, body: str) -> Path:
    """One whose export does what `body` says."""
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts/export.py").write_text(f"import subprocess, sys, time\n{body}\n")
    return folder


BUSY = "while time.process_time() < {}: pass"


def test_two_checkouts_are_compared_with_all_that_they_start(tmp_path: Path) -> None:
    child = f"subprocess.run([sys.executable, '-c', 'import time\\nx = b\"x\" * 10**8\\n{BUSY.format(0.4)}'])"
    one = checkout(tmp_path / "one", f"open('ran', 'a').write(' '.join(sys.argv[1:4]))\n{BUSY.format(0.2)}")
    two = checkout(tmp_path / "two", f"import scripts.said\n{child}")
    (two / "scripts/said.py").write_text("open('ran', 'a').write('again')")  # it imports its own modules
    out = run_here("benchmark", "--model", "resnet8", "--tool", str(one), str(two), "--json")
    (result,) = json.loads(out.stdout)["results"]
    assert (one / "ran").read_text() == "--model resnet8 --fp16" * 3 and (two / "ran").read_text() == "again" * 3
    first, second = result["rows"]
    assert 0.2 <= first["cpu_s"] < 0.4 <= second["cpu_s"] and second["peak_mb"] > first["peak_mb"] + 80
    assert result["ratios"] == {figure: second[figure] / first[figure] for figure in ("cpu_s", "wall_s", "peak_mb")}
    assert print_tool({"machine": describe_machine(None), "results": [result]}).startswith("the second in units of")


def test_8_bits_are_calibrated_on_the_same_pictures_and_nothing_is_cached(tmp_path: Path) -> None:
    look = (
        "import hashlib, os, pathlib\n"
        "folder, cache = pathlib.Path(sys.argv[sys.argv.index('--calibration') + 1]), os.environ['XDG_CACHE_HOME']\n"
        "found = sorted(folder.glob('*.jpg'))\n"
        "digest = hashlib.sha256(b''.join(map(pathlib.Path.read_bytes, found))).hexdigest()\n"
        "open('ran', 'a').write(f'{len(found)} {digest} {os.path.exists(cache)}\\n')\n"
        "os.mkdir(cache)"
    )
    one, two = (checkout(tmp_path / name, look) for name in ("one", "two"))
    out = run_here("benchmark", "--model", "resnet8", "--precision", "int8", "--tool", str(one), str(two))
    ran = [line for folder in (one, two) for line in (folder / "ran").read_text().splitlines()]
    assert len(ran) == 6 and len(set(ran)) == 1 and ran[0].startswith("120 ") and ran[0].endswith(" False")
    assert "export --model resnet8 --int8 --engine none --calibration 120 pictures: median of 3" in out.stdout


def test_a_checkout_that_fails_or_is_none_is_refused(tmp_path: Path) -> None:
    broken = checkout(tmp_path / "broken", "sys.exit('no such flag')")
    for path, said in ((broken, f"the export in {broken} fails: no such flag"), (tmp_path, "expected a checkout with")):
        failed = run_here("benchmark", "--model", "resnet8", "--tool", str(path), str(path))
        assert failed.returncode == 2 and said in failed.stderr


def test_a_quick_export_is_compared_with_a_bare_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, ran = tmp_path / "export.py", tmp_path / "ran"
    say = f"import sys, time\nopen({str(ran)!r}, 'a').write(' '.join(sys.argv[1:-2]) + '; ')\n"
    script.write_text(say + BUSY.format(0.3))
    monkeypatch.setattr(load_script("benchmark"), "SCRIPT", script)
    monkeypatch.setattr(load_script("benchmark"), "BARE", say)
    out = run_here("benchmark", "--model", "resnet8", "--quick")
    assert ran.read_text() == "resnet8; --quick --fp16 --model resnet8 --engine none; " * 3
    assert "torch.onnx.export" in out.stdout and out.stdout.splitlines()[-1].startswith("the second in units of")
    assert "--quick does not take --precision" in refusal(run_here("benchmark", "--quick", "--precision", "fp16"))


@pytest.mark.gpu
def test_every_level_on_a_gpu(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    """Without the compiler, which takes minutes."""
    model, images, precision = calibrated["resnet50"], pictures["resnet50"], PRECISIONS["fp16"]
    programs = {level: fuse(model, images, Batch(1, 4, 8), level) for level in LEVELS}
    subject = Subject.of(model, programs, precision, images)
    candidates = [c for c in cuda_candidates(subject) if not c.name.startswith("torch.compile")]
    rows = compare_candidates(candidates, subject, 4, [images[:4].cuda()], Clock(cuda_turn, 2, 0.01))
    assert all(rows), [row.reason for row in rows]
    optional = ("tensorrt", *(() if find_spec("cuda") else ("kernel engine",)))
    assert all(row.seconds for row in rows if not row.name.startswith(optional)), [row.reason for row in rows]
