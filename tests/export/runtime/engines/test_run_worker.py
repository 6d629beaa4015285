"""An engine on a device that is a stand-in on numpy: profile limits, poison, graphs, memory, and every failure."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from cuda.bindings import runtime as real_cuda

from export import ExportError
from export.runtime.engines.options import EngineConfig
from export.runtime.engines.run_worker import DeviceEngine
from tests.export.runtime.engines import fake_tensorrt
from tests.export.runtime.engines.fake_tensorrt import FLAVOUR, FakeCuda, device, images, plan

PLAIN = EngineConfig()


def loaded(content: bytes, *names: str, config: EngineConfig = PLAIN) -> DeviceEngine:
    return DeviceEngine(FLAVOUR, content, config, ("input",), names or ("output",))


def test_batches_of_any_size_in_any_order_and_everything_is_given_back() -> None:
    """And a result stays as it is when the next batch runs."""
    results = []
    with device() as cuda:
        before = cuda.free
        engine = loaded(plan())
        for seed, count in enumerate((3, 3, 8, 1, 3)):
            found = engine.infer({"input": images(count, seed)})
            assert list(found) == ["output"] and found["output"].dtype == np.float32
            results.append((images(count, seed), found["output"]))
        for x, y in results:
            np.testing.assert_allclose(y, x.sum(axis=(2, 3)), rtol=1e-6)
        assert cuda.launches == 5 and len(cuda.memory) == 2  # one shape at a time
        engine.close()
        assert cuda.free == before and not cuda.memory and not cuda.live


def test_a_shape_outside_the_profile_is_refused_before_anything_is_launched() -> None:
    with device() as cuda:
        engine = loaded(plan(smallest=2))
        for shape in ((9, 3, 4, 4), (1, 3, 4, 4), (2, 3, 8, 8), (2, 3, 4), (2, 1, 4, 4), (2, 3, 4, 4, 1)):
            for act in (engine.infer, lambda inputs: engine.time(inputs, 7)):
                with pytest.raises(ExportError) as error:
                    act({"input": np.zeros(shape, np.float32)})
                assert str(error.value) == f"the engine takes inputs of shape (2, 3, 4, 4) to (8, 3, 4, 4), got {shape}"
        assert not cuda.clock and not cuda.memory


def test_an_output_that_is_not_written_is_nan() -> None:
    with device():
        assert np.isnan(loaded(plan(behaviour="silent")).infer({"input": images(2)})["output"]).all()


def test_outputs_come_in_the_order_asked_for_and_wide_enough() -> None:
    kinds = {"classes": "INT64", "half": "HALF", "unasked": "FLOAT"}
    with device():
        found = loaded(plan(outputs=kinds), "half", "classes").infer({"input": images(2)})
    assert {name: a.dtype.name for name, a in found.items()} == {"half": "float32", "classes": "int64"}


def test_several_inputs_are_put_in_place_by_name() -> None:
    content = plan(inputs={"left": (3, 4, 4), "state": (3,)})
    with device() as cuda:
        with pytest.raises(ExportError, match="the engine has output, left, state: expected input and output"):
            loaded(content)
        engine = DeviceEngine(FLAVOUR, content, PLAIN, ("state", "left"), ("output",))
        for count in (3, 8, 3):
            x, state = images(count, count), images(count)[:, :, 0, 0]
            found = engine.infer({"state": state, "left": x})["output"]
            np.testing.assert_allclose(found, x.sum(axis=(2, 3)) + state, rtol=1e-6)
            assert len(cuda.memory) == 3
        with pytest.raises(ExportError, match=r"takes state of shape \(1, 3\) to \(8, 3\), got \(2, 4\)"):
            engine.infer({"left": images(2), "state": np.zeros((2, 4), np.float32)})
        engine.close()
        assert not cuda.memory


def test_bytes_reach_an_engine_of_bytes_and_no_other() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), np.uint8)
    with device() as cuda:
        found = loaded(plan(kind="UINT8")).infer({"input": pixels})["output"]
        np.testing.assert_array_equal(found, pixels.sum(axis=(2, 3)))
        assert sorted(buffer.nbytes for buffer in cuda.memory.values()) == [24, 96]
        for kind, given in (("UINT8", images(2)), ("FLOAT", pixels), ("HALF", images(2))):
            with pytest.raises(ExportError, match=f"input is {kind}, got {given.dtype}: expected FLOAT for float32 or"):
                loaded(plan(kind=kind)).infer({"input": given})


def test_runs_are_timed_behind_runs_that_do_not_count() -> None:
    with device() as cuda:
        engine = loaded(plan())
        seconds = engine.time({"input": images(4)}, 7)
        assert seconds == [1e-3] * 7 and cuda.launches == 14  # the stand-in's clock counts work in milliseconds
        assert len(cuda.live) == 2  # the stream and the graph, no events


FAILURES = {
    "not a plan": (b"no plan", ("output",), 2**20, "the engine does not load on this device: bad magic"),
    "other outputs": (plan(), ("logits",), 2**20, "the engine has output, input: expected input and logits"),
    "no context": (plan(behaviour="no context"), ("output",), 2**20, r"takes no input of shape \(2, 3, 4, 4\)"),
    "does not run": (plan(behaviour="fails"), ("output",), 2**20, "the engine failed to run a batch of 2"),
    "no memory": (plan(), ("output",), 400, "the GPU refuses: cudaErrorMemoryAllocation"),
    "odd type": (plan(outputs={"output": "FP8"}), ("output",), 2**20, "the engine's output is FP8: expected FLOAT"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_leaves_no_memory_behind(case: str) -> None:
    content, names, memory, reason = FAILURES[case]
    with device(memory) as cuda:
        with pytest.raises(ExportError, match=reason) as error:
            loaded(content, *names).infer({"input": images(2)})
        assert "\n" not in str(error.value) and not cuda.memory


def test_a_failed_shape_does_not_spoil_the_next() -> None:
    with device(memory=700) as cuda:
        engine = loaded(plan())
        with pytest.raises(ExportError, match="cudaErrorMemoryAllocation"):
            engine.infer({"input": images(8)})
        assert engine.infer({"input": images(2)})["output"].shape == (2, 3) and len(cuda.memory) == 2


def test_what_the_engine_was_built_for_reaches_the_runtime() -> None:
    with device() as cuda:
        engine: Any = loaded(plan(), config=EngineConfig(version_compatible=True, dla_core=1))
        assert engine._runtime.engine_host_code_allowed is True and engine._runtime.DLA_core == 1
        engine.infer({"input": images(2)})
        assert cuda.launches == 0 and cuda.clock > 0  # the accelerator's work is not recorded
        engine = loaded(plan())
        assert engine._runtime.engine_host_code_allowed is False and engine._runtime.DLA_core == -1


def test_tensorrt_rtx_records_its_graphs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace()
    for name in ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy"):
        monkeypatch.setattr(fake_tensorrt, name, getattr(tensorrt_rtx, name), raising=False)
    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "create_runtime_config", lambda _: config, raising=False)
    with device() as cuda:
        engine: Any = loaded(plan())
        assert engine.infer({"input": images(2)})["output"].shape == (2, 3) and cuda.launches == 0
    assert engine._engine.config is config
    assert config.cuda_graph_strategy == tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    eager = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == eager
    assert set(vars(config)) <= set(dir(tensorrt_rtx.IRuntimeConfig))


def test_the_stand_in_has_no_name_that_tensorrt_or_the_cuda_bindings_lack() -> None:
    for stand_in in (fake_tensorrt.Runtime, fake_tensorrt.ICudaEngine, fake_tensorrt.IExecutionContext):
        names = {name for name in vars(stand_in) if not name.startswith("_")}
        names |= {"engine_host_code_allowed", "DLA_core"} if stand_in is fake_tensorrt.Runtime else set()
        assert names and names <= set(dir(getattr(tensorrt_rtx, stand_in.__name__)))
    calls = [name for name in vars(FakeCuda) if name.startswith("cuda")]
    assert len(calls) > 20
    for name in calls:
        real, fake = getattr(real_cuda, name), getattr(FakeCuda, name)
        if inspect.isfunction(fake):
            text = (real.__doc__ or "").splitlines()[0]
            arguments = text[text.index("(") + 1 : text.rindex(")")]
            count = len(arguments.split(",")) if arguments else 0
            assert len(inspect.signature(fake).parameters) - 1 == count, text
