"""tune.py without a GPU: what it times, that nothing wrong is timed, and times beside predicted floors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from torch import Tensor

from export.benchmark.timing import WARM_UP, graph_seconds
from kernels.configs.targets import TARGETS
from kernels.operators.mean_linear import HeadProblem
from kernels.operators.registry import Arguments
from kernels.problems import Problem
from tests.kernels.cases import SMALL
from tests.kernels.launching import quick_config
from tests.scripts.loading import load_script, refusal, run_here

TUNE = load_script("tune")
HEAD = HeadProblem(3, 70, 2, 2, 33)
USES: dict[tuple[str, int], list[Problem]] = {("small", 3): [SMALL.with_batch(3), HEAD, HEAD], ("other", 3): [HEAD]}
SECONDS = [1e-6 * microseconds for microseconds in (1, 2, 3, 4, 5)]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where it runs as if on an H200, whose kernels the interpreter runs; their times are SECONDS."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU make gpu runs it")

    def seconds(launches: Sequence[Callable[[], Tensor]], replays: int) -> list[float]:
        assert len(launches) == TUNE.LAUNCHES and torch.equal(launches[0](), launches[-1]())
        return SECONDS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=0))
    replacements = {
        "DEVICE": "cpu",
        "target_here": lambda: TARGETS["sm_90"],
        "problems_of": lambda args: USES,
        "select_config": lambda problem, target: quick_config(problem),
        "graph_seconds": seconds,
    }
    for name, value in replacements.items():
        monkeypatch.setattr(TUNE, name, value)
    return tmp_path


def floors_file(path: Path, target: str = "sm_90") -> Path:
    """As compile_kernels.py writes it: of a head that is two kernels."""
    floors = [{"floor_us": 1.5, "bound_by": "l2"}, {"floor_us": 0.5, "bound_by": "dram"}]
    kernels = [{"target": target, "wholes": [HEAD.key], "floors": [floor]} for floor in floors]
    kernels.append({"target": "sm_87", "wholes": [HEAD.key], "floors": [{"floor_us": 9, "bound_by": "issue"}]})
    path.write_text(json.dumps({"kernels": kernels}))
    return path


def test_what_runs_is_timed_beside_its_predicted_floor(folder: Path) -> None:
    process = run_here("tune", "--as-is", "--floors", floors_file(folder / "floors"), "--output", folder / "times")
    assert process.returncode == 0, process.stderr
    record = json.loads((folder / "times").read_text())
    small, head = record["rows"]
    assert small["problem"] == SMALL.with_batch(3).key and "floor_us" not in small
    assert (head["p20_us"], head["median_us"], head["p80_us"]) == pytest.approx((1.8, 3.0, 4.2))
    assert (head["floor_us"], head["bound_by"], head["over_floor"]) == (2.0, "l2 + dram", pytest.approx(1.5))
    assert [entry["kernels_us"] for entry in record["networks"]] == pytest.approx([9.0, 3.0])
    assert [entry.get("floor_us") for entry in record["networks"]] == [None, 2.0]
    assert "their floors on H200 2.0 us" in process.stdout
    assert process.stdout.splitlines()[-1] == "2 problems: none wrong or not to be run"


def test_what_is_wrong_is_not_timed_and_what_was_found_before_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = iter([[], ["max z is 9"]])
    monkeypatch.setattr(TUNE, "p1_failures", lambda *_: next(judged))
    process = run_here("tune", "--as-is", "--output", folder / "times")
    assert process.returncode == 1 and "max z is 9" in process.stdout
    assert [row["status"] for row in json.loads((folder / "times").read_text())["rows"]] == ["measured", "failed"]
    monkeypatch.setattr(TUNE, "p1_failures", Mock(side_effect=[[], KeyboardInterrupt]))
    assert run_here("tune", "--as-is", "--output", folder / "times").returncode == 130
    assert [row["status"] for row in json.loads((folder / "times").read_text())["rows"]] == ["measured"]


def test_files_without_floors_are_refused(folder: Path) -> None:
    (folder / "other").write_text("[]")
    for path, said in (
        (folder / "other", "expected a file that compile_kernels.py wrote"),
        (
            floors_file(folder / "floors", "sm_80"),
            "expected a file of python scripts/compile_kernels.py --targets sm_90",
        ),
        (folder / "none", "which is no file"),
    ):
        assert said in refusal(run_here("tune", "--as-is", "--floors", path))
    assert "expected --as-is" in refusal(run_here("tune", "--output", folder / "times"))


def test_inputs_in_rotation_do_not_fit_into_l2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SMALL.with_batch(5)
    size = 2 * sum(torch.Size(shape).numel() for shape in problem.shapes.values())
    for l2_bytes, sets in ((0, 1), (size // 2, 2), (10 * size, 21)):
        properties = SimpleNamespace(L2_cache_size=l2_bytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        found: list[Arguments[Tensor]] = TUNE.rotated(problem)
        assert len(found) == sets
        assert len({tensor.data_ptr() for inputs in found for tensor in inputs.tensors().values()}) == 4 * sets
    for inputs in (found[0], found[-1]):
        inputs.check((torch.float16,))
        assert {name: tuple(tensor.shape) for name, tensor in inputs.tensors().items()} == problem.shapes
        x = inputs.tensors()["x"]
        assert torch.equal(x[:2], x[2:4]) and torch.equal(x[0], x[4]) and not torch.equal(x[0], x[1])


def test_a_graph_of_all_launches_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch has run once before it is recorded, and the first replays do not count."""
    cuda = Mock(**{"CUDAGraph.return_value.replay": Mock()})
    for name in ("graph", "stream"):
        getattr(cuda, name).return_value.__enter__ = getattr(cuda, f"enter_{name}")
        getattr(cuda, name).return_value.__exit__ = Mock(return_value=None)
    clock = iter(range(1000))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            cuda.record()
            self.time = next(clock) ** 2

        def elapsed_time(self, end: Any) -> float:
            assert cuda.mock_calls[-1] == call.synchronize()
            return float(end.time - self.time)

    cuda.Event = Event
    for name in ("CUDAGraph", "graph", "stream", "Stream", "current_stream", "Event", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    seconds = graph_seconds([cuda.first, cuda.second], replays=2)
    assert seconds == pytest.approx([(2 * WARM_UP + 1) / 2e3, (2 * WARM_UP + 3) / 2e3])
    names = [
        name for name, *_ in cuda.mock_calls if name.split(".")[-1] in ("first", "second", "enter_graph", "replay")
    ]
    replays = ["CUDAGraph().replay"] * (WARM_UP + 2)
    assert names == ["first", "second", "enter_graph", "first", "second", *replays]
