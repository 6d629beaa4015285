"""TensorRT: real TensorRT-RTX engines, built without a GPU, and what a full TensorRT adds, with stand-ins."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
from torch import Tensor, nn

from export import Batch, ExportError, MissingDependency, fuse
from export.base.precision import INT8, PRECISIONS
from export.lowering.onnx_file import lower_onnx
from export.runtime.engines import build_worker
from export.runtime.engines import engine as tensorrt_engine
from export.runtime.engines.engine import FLAVOURS, Engine, Flavour, build_engine, import_flavour, why_not_buildable
from export.runtime.engines.options import DEFAULT_ENGINE, TARGETS, EngineConfig
from tests.export.lowering import qdq
from tests.export.networks import BATCH

RTX, FULL = FLAVOURS["tensorrt-rtx"], FLAVOURS["tensorrt"]
FP16 = PRECISIONS["fp16"]
SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def onnx_files(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> dict[str, bytes]:
    program = fuse(calibrated["resnet8"], pictures["resnet8"], BATCH)
    return {name: lower_onnx(program, p, {}).serialize() for name, p in PRECISIONS.items()}


def build_quantised(content: bytes, config: EngineConfig = DEFAULT_ENGINE, *kept: str) -> Engine:
    return build_engine(content, RTX, INT8, qdq.BATCH, {"input": qdq.SHAPE}, config, frozenset(kept))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engine_is_built_in_the_precision_asked_for(precision: str, onnx_files: dict[str, bytes]) -> None:
    engine = build_engine(onnx_files[precision], RTX, PRECISIONS[precision], BATCH, {"input": SHAPE})
    assert engine.convolutions == 9
    assert len(engine.plan) > 10_000 and engine.version and engine.seconds > 0
    kind = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}[precision]
    assert sum(layer["type"] == "CONVOLUTION" and layer["outputs"] == [kind] for layer in engine.layers) == 9
    assert json.loads(json.dumps(engine.layers)) == list(engine.layers)


def test_a_quantised_engine_is_built() -> None:
    engine = build_quantised(qdq.network())
    assert engine.convolutions == 2 and {"QUANTIZE", "DEQUANTIZE"} <= {layer["type"] for layer in engine.layers}
    assert build_quantised(qdq.network(kept="fc"), DEFAULT_ENGINE, "fc").convolutions == 2


def test_an_engine_that_is_not_what_was_asked_is_impossible(onnx_files: dict[str, bytes]) -> None:
    """The proof has its own tests: here, that it is asked for."""
    with pytest.raises(ExportError, match="would compute in"):
        build_engine(onnx_files["fp32"], RTX, FP16, BATCH, {"input": SHAPE})
    with pytest.raises(ExportError, match="would not compute in INT8"):
        build_quantised(qdq.network(kept="stage1.conv1"))


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", b"\x08\x08" * 50])
def test_file_that_is_no_onnx_model_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(ExportError, match=r"the ONNX file|an ONNX file|could not build an engine") as error:
        build_engine(content, RTX, FP16, BATCH, {"input": SHAPE})
    assert "\n" not in str(error.value)


def test_what_is_asked_of_the_builder_reaches_it() -> None:
    content = qdq.network()
    plain = build_quantised(content)
    everywhere = build_quantised(content, EngineConfig(targets=TARGETS))
    assert len(everywhere.plan) > 1.1 * len(plain.plan)  # sm_75 has kernels of its own
    assert everywhere.config.targets == TARGETS


def test_the_builders_messages_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="export.base.process"):
        build_quantised(qdq.network())
    assert any("stage1.conv1" in record.message for record in caplog.records)


def test_missing_package_names_the_command_that_installs_it() -> None:
    absent = Flavour("tensorrt-rtx", "no_such_module", "x.engine", "x.json", needs_gpu=False, inspects=False)
    with pytest.raises(MissingDependency, match=r"pip install -e '\.\[tensorrt-rtx\]'"):
        build_engine(b"", absent, FP16, BATCH, {"input": SHAPE})
    assert "no_such_module is not installed" in why_not_buildable(absent)


def test_a_builder_that_dies_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a death of the process is turned into is in tests/export/base/test_process.py."""
    child = Mock(side_effect=ExportError("it died"))
    monkeypatch.setattr(tensorrt_engine, "run_in_child", child)
    with pytest.raises(ExportError, match="it died"):
        build_engine(b"", RTX, FP16, BATCH, {"input": SHAPE})
    assert child.call_args.args[:2] == ("building the tensorrt-rtx engine", "")  # which takes no lever of memory
    with pytest.raises(ExportError, match="it died"):
        build_engine(b"", RTX, FP16, BATCH, {"input": SHAPE}, levers=["ExportConfig.batch"], otherwise="give up")
    assert child.call_args.args[1] == "lower ExportConfig.batch, or give up"
    monkeypatch.setattr(tensorrt_engine, "import_flavour", Mock())
    with pytest.raises(ExportError, match="it died"):
        build_engine(b"", FULL, FP16, BATCH, {"input": SHAPE}, levers=["ExportConfig.batch"])
    lower = "lower ExportConfig.batch, EngineConfig.workspace_mib or EngineConfig.optimization_level"
    assert child.call_args.args[:2] == ("building the tensorrt engine", lower)


@pytest.mark.parametrize("padding", [0, 2**20], ids=["a build that fails", "weights that do not fit"])
def test_a_workspace_that_the_weights_fill_says_what_to_raise_it_to(padding: int) -> None:
    """TensorRT-RTX counts the weights in and ends in OutOfMemory, or without a tactic: to lower it would be wrong."""
    content = qdq.network() + (b"\x32\x80\x80\x40" + bytes(padding) if padding else b"")  # a doc_string
    weights = -(-len(content) // 2**20)
    expected = f"EngineConfig.workspace_mib=1: too little for tensorrt-rtx, which counts the weights in, {weights} MiB"
    with pytest.raises(ExportError) as error:
        build_quantised(content, EngineConfig(workspace_mib=1))
    message = str(error.value)
    assert message.startswith(expected) and f"EngineConfig.workspace_mib={2 * weights + 16}, or none" in message
    assert ("could not build an engine" in message) is (padding == 0)


V10, COMPATIBLE, AMPERE = "10.3.0", EngineConfig(version_compatible=True), EngineConfig(hardware_compatible=True)
# an engine's flavour and options, the version installed and the GPU's compute capability where 10.3.0 built the engine
MACHINES: dict[str, tuple[Flavour, EngineConfig, str, tuple[int, int], str]] = {
    "the same version": (FULL, DEFAULT_ENGINE, V10, (8, 7), ""),
    "a later one": (FULL, DEFAULT_ENGINE, "10.16.1", (8, 7), "built by tensorrt 10.3.0, 10.16.1 is installed"),
    "a later one, asked for": (FULL, COMPATIBLE, "10.16.1", (8, 7), ""),
    "an earlier one, asked for": (FULL, COMPATIBLE, "10.2.9", (8, 7), "10.2.9 is installed"),
    "another major one, asked for": (FULL, COMPATIBLE, "11.4.0", (8, 7), "11.4.0 is installed"),
    "RTX on Ada": (RTX, DEFAULT_ENGINE, V10, (8, 9), ""),
    "RTX on what is newer": (RTX, DEFAULT_ENGINE, V10, (13, 0), ""),
    "RTX on Turing": (RTX, DEFAULT_ENGINE, V10, (7, 5), "export again with EngineConfig.targets=('sm_75',)"),
    "RTX for Turing": (RTX, EngineConfig(targets=("sm_75",)), V10, (7, 5), ""),
    "RTX for Turing on Ada": (
        RTX,
        EngineConfig(targets=("sm_75",)),
        V10,
        (8, 9),
        "built for sm_75, here is GPU; ",
    ),
    "RTX for Ada on newer": (RTX, EngineConfig(targets=("sm_89",)), V10, (13, 0), "without EngineConfig.targets"),
    "RTX on Orin": (RTX, DEFAULT_ENGINE, V10, (8, 7), "tensorrt-rtx does not serve the GPU here: GPU"),
    "RTX on Thor": (RTX, DEFAULT_ENGINE, V10, (11, 0), "tensorrt-rtx does not serve the GPU here: GPU"),
    "for Ampere and newer": (FULL, AMPERE, V10, (8, 0), ""),
    "for Ampere on Turing": (FULL, AMPERE, V10, (7, 5), "built for GPUs from Ampere on"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_which_machines_run_an_engine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flavour, config, installed, capability, expected = MACHINES[case]
    machine = {"import_flavour": SimpleNamespace(__version__=installed), "why_no_gpu": "", "gpu_name": "GPU",
               "compute_capability": capability}  # fmt: skip
    for name, value in machine.items():
        monkeypatch.setattr(tensorrt_engine, name, lambda _, value=value: value)
    reason = tensorrt_engine.why_not_runnable(Engine(flavour, b"", "10.3.0", FP16, 3, 1.0, config))
    assert expected in reason and bool(reason) == bool(expected)


def kernels(kind: str) -> list[dict[str, Any]]:
    tensor = {"Name": "x", "Datatype": kind, "Format": "Linear"}
    return [
        {"Name": name, "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor],
         "Weights": {"Type": kind, "Count": 1}, "Metadata": f"[ONNX Layer: {name}]"}
        for name in qdq.LAYERS
    ]  # fmt: skip


def show(package: SimpleNamespace, layers: list[Any]) -> None:
    inspector = package.engine.create_engine_inspector.return_value
    inspector.get_engine_information.return_value = json.dumps({"Layers": layers})


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package that builds as TensorRT-RTX does and is looked at as a full TensorRT, whose engine is a stand-in.

    `seen` is the builder's configuration, `engine` the stand-in, which shows kernels of int8.
    """
    real = import_flavour(RTX)
    package = SimpleNamespace(**{name: getattr(real, name) for name in dir(real)})
    package.Runtime = MagicMock()
    package.engine = package.Runtime.return_value.deserialize_cuda_engine.return_value
    show(package, kernels("Int8"))

    class Builder(real.Builder):  # type: ignore[name-defined]  # of a module that is known at run time only
        def create_builder_config(self) -> Any:
            package.seen = super().create_builder_config()
            return package.seen

    package.Builder = Builder
    monkeypatch.setattr(build_worker, "import_flavour", lambda flavour: package)
    return package


def build_full(content: bytes, config: EngineConfig = DEFAULT_ENGINE, batch: Batch = qdq.BATCH) -> Engine:
    return build_worker.build(content, FULL, INT8, batch, {"input": qdq.SHAPE}, config, ())


def test_a_full_tensorrt_is_looked_at_after_the_build(full: SimpleNamespace) -> None:
    engine = build_full(qdq.network())
    full.Runtime.return_value.deserialize_cuda_engine.assert_called_once_with(engine.plan)
    inspector = full.engine.create_engine_inspector.return_value
    assert inspector.execution_context is full.engine.create_execution_context.return_value
    inspector.execution_context.set_input_shape.assert_called_once_with("input", (4, *qdq.SHAPE))
    inspector.get_engine_information.assert_called_once_with(full.LayerInformationFormat.JSON)
    assert [layer["name"] for layer in engine.layers] == list(qdq.LAYERS)
    assert all(layer["type"] == "CaskConvolution" and layer["weights"] == "INT8" for layer in engine.layers)
    assert full.seen.profiling_verbosity == full.ProfilingVerbosity.DETAILED
    assert not full.seen.get_flag(full.BuilderFlag.TF32)


def test_a_kernel_of_another_type_is_refused_after_the_build(full: SimpleNamespace) -> None:
    show(full, [*kernels("Int8")[:2], kernels("Half")[2]])
    with pytest.raises(ExportError, match="the kernel fc computes in HALF: expected INT8"):
        build_full(qdq.network())
    show(full, list(qdq.LAYERS))
    with pytest.raises(ExportError, match="the engine inspector's answer is not understood"):
        build_full(qdq.network())


def test_what_is_asked_is_set(full: SimpleNamespace) -> None:
    build_full(qdq.network(), EngineConfig(workspace_mib=64, optimization_level=1))
    assert full.seen.get_memory_pool_limit(full.MemoryPoolType.WORKSPACE) == 64 * 2**20
    assert full.seen.builder_optimization_level == 1
    with pytest.raises(ExportError, match=r"could not build an engine: .*libnvinfer_lean"):  # the flag was set
        build_full(qdq.network(), EngineConfig(version_compatible=True))


def test_a_timing_cache_is_read_and_written(tmp_path: Path) -> None:
    options = SimpleNamespace(
        create_timing_cache=lambda content: SimpleNamespace(serialize=lambda: content + b"+"),
        set_timing_cache=lambda cache, mismatch: True,
    )
    path = tmp_path / "cache"
    for expected in (b"+", b"++"):
        cache = build_worker._timing_cache(options, path)
        build_worker._write(path, cache.serialize())
        assert path.read_bytes() == expected and list(tmp_path.iterdir()) == [path]
    options.set_timing_cache = lambda cache, mismatch: False
    with pytest.raises(ExportError, match="cache is not of this device and this version of TensorRT; remove it"):
        build_worker._timing_cache(options, path)
    with pytest.raises(ExportError, match=r"EngineConfig.timing_cache: .* cannot be read: Is a directory"):
        build_worker._timing_cache(options, tmp_path)
    with pytest.raises(ExportError, match=r"EngineConfig.timing_cache: .* cannot be written: "):
        build_worker._write(tmp_path / "no" / "folder", b"")


def test_what_the_package_ignores_in_silence_is_refused(full: SimpleNamespace) -> None:
    """TensorRT-RTX, which builds here, takes both values and forgets them."""
    with pytest.raises(ExportError, match=r"^EngineConfig.hardware_compatible: [\d.]+ builds for this GPU alone$"):
        build_full(qdq.network(), EngineConfig(hardware_compatible=True))
    with pytest.raises(ExportError, match=r"^EngineConfig.dla_core=1: [\d.]+ has no such deep-learning accelerator$"):
        build_full(qdq.network(), EngineConfig(dla_core=1), Batch(4, 4, 4))


def test_a_layer_that_the_accelerator_cannot_run_is_refused_by_name() -> None:
    trt = import_flavour(RTX)
    layers = [SimpleNamespace(name=name) for name in ("cast", "stage1.conv1", "fc")]
    network = SimpleNamespace(num_layers=3, get_layer=layers.__getitem__)
    flags: list[Any] = []

    def options(able: set[str]) -> SimpleNamespace:
        return SimpleNamespace(set_flag=flags.append, can_run_on_DLA=lambda layer: layer.name in able)

    chosen = options({"stage1.conv1", "fc"})
    build_worker._use_dla(trt, chosen, network, {"stage1.conv1", "fc"}, 1)
    assert (chosen.default_device_type, chosen.DLA_core) == (trt.DeviceType.DLA, 1)
    assert flags == [trt.BuilderFlag.GPU_FALLBACK]
    assert why_not_buildable(RTX, 0).startswith("EngineConfig.dla_core=0: this device has 0 deep-learning accelerators")
    with pytest.raises(ExportError, match=r"^EngineConfig.dla_core: fc cannot run on the deep-learning accelerator$"):
        build_worker._use_dla(trt, options({"stage1.conv1"}), network, {"stage1.conv1", "fc"}, 1)


def test_a_full_tensorrt_builds_on_the_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "import_flavour", lambda flavour: SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(tensorrt_engine, "why_no_gpu", lambda extra: f"no NVIDIA GPU here ({extra})")
    assert why_not_buildable(FULL).endswith("build on the device from model.onnx: no NVIDIA GPU here (tensorrt)")


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_tensorrt_builds_the_same_network(precision: str, onnx_files: dict[str, bytes]) -> None:
    pytest.importorskip("tensorrt", reason="needs the full TensorRT package")
    engine = build_engine(onnx_files[precision], FULL, PRECISIONS[precision], BATCH, {"input": SHAPE})
    assert engine.convolutions == 9 and engine.layers
    assert build_engine(qdq.network(), FULL, INT8, qdq.BATCH, {"input": qdq.SHAPE}).convolutions == 2
