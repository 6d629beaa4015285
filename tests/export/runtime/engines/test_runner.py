"""The runner and its process, with a device that is a stand-in: results, times, refusals and crashes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export import ExportError
from export.base.precision import PRECISIONS
from export.benchmark.timing import Clock, cuda_turn, measure
from export.runtime.engines.engine import FLAVOURS, Engine, Flavour
from export.runtime.engines.runner import TensorRTRunner
from export.runtime.runner import Interface
from tests.export.runtime.engines import fake_tensorrt
from tests.export.runtime.engines.fake_tensorrt import FLAVOUR, images, plan


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.runtime.engines.runner._DEVICE_ENGINE", f"{fake_tensorrt.__name__}:device_engine")


def runner_of(content: bytes, flavour: Flavour = FLAVOUR) -> TensorRTRunner:
    return TensorRTRunner(Engine(flavour, content, "10.3.0", PRECISIONS["fp16"], 3, 1.0), Interface.of(["output"]))


def alive(runner: TensorRTRunner) -> bool:
    return runner._child._process.poll() is None


def test_an_engine_runs_and_is_timed_in_its_own_process() -> None:
    runner = runner_of(plan())
    assert (runner.name, runner.runtime, runner.file) == ("tensorrt", "tensorrt 10.3.0", "model.trt.engine")
    with runner:
        assert runner.infer({"input": images(2)})["output"].shape == (2, 3)
        refusal = r"takes inputs of shape \(1, 3, 4, 4\) to \(8, 3, 4, 4\), got \(9, 3, 4"
        with pytest.raises(ExportError, match=refusal):
            runner.infer({"input": images(9)})
        inputs = [torch.from_numpy(images(4)).half() for _ in range(2)]
        seconds = measure({"tensorrt": runner}, inputs, Clock(cuda_turn, rounds=2, seconds=0.004))
        assert seconds["tensorrt"] == [1e-3] * 4 and alive(runner)
        found = runner.infer({"input": images(4)})
        np.testing.assert_allclose(found["output"], images(4).sum(axis=(2, 3)), rtol=1e-6)
    assert not alive(runner) and runner._child._process.returncode == 0


def test_an_engine_that_does_not_load_leaves_no_process() -> None:
    runner = runner_of(b"no plan")
    with pytest.raises(ExportError, match="the engine does not load on this device: bad magic"), runner:
        raise AssertionError("entered")
    assert not alive(runner)


def test_a_crash_is_one_line() -> None:
    expected = r"^running the tensorrt engine was ended by SIGABRT: export with a smaller ExportConfig.batch$"
    with runner_of(plan(behaviour="crash")) as runner, pytest.raises(ExportError, match=expected):
        runner.infer({"input": images(2)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_real_engine_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    runner = runner_of(b"plan", FLAVOURS["tensorrt-rtx"])
    with pytest.raises(ExportError, match=r"^the GPU refuses: cudaError\w+$"), runner:
        raise AssertionError("entered")
