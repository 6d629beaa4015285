"""TensorRT: real TensorRT-RTX engines, built without a GPU, and the proof of their precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import Tensor, nn

from export import Batch, ExportError, MissingDependency, fuse
from export.lowering import tensorrt_engine
from export.lowering.onnx_file import lower_onnx
from export.lowering.tensorrt_engine import FLAVOURS, Flavour, build_engine, prove_precision, why_not_buildable
from export.precision import PRECISIONS

BATCH = Batch(1, 4, 8)
RTX = FLAVOURS["tensorrt-rtx"]
SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def onnx_files(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> dict[str, bytes]:
    program = fuse(calibrated["resnet20"], pictures["resnet20"], BATCH)
    return {name: lower_onnx(program, pictures["resnet20"], p, {}).serialize() for name, p in PRECISIONS.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engine_is_built_in_the_precision_asked_for(precision: str, onnx_files: dict[str, bytes]) -> None:
    engine = build_engine(onnx_files[precision], RTX, PRECISIONS[precision], BATCH, SHAPE)
    assert engine.convolutions == 21
    assert len(engine.plan) > 100_000 and engine.version and engine.seconds > 0


@pytest.mark.parametrize(("file", "asked"), [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16"), ("fp16", "bf16")])
def test_engine_of_another_precision_is_impossible(file: str, asked: str, onnx_files: dict[str, bytes]) -> None:
    with pytest.raises(ExportError, match="would compute in"):
        build_engine(onnx_files[file], RTX, PRECISIONS[asked], BATCH, SHAPE)


def test_network_that_is_not_strongly_typed_is_refused() -> None:
    trt = tensorrt_engine.import_flavour(RTX)
    network = SimpleNamespace(get_flag=lambda flag: False, num_layers=0)
    with pytest.raises(ExportError, match="strongly typed"):
        prove_precision(trt, network, PRECISIONS["fp16"])


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", b"\x08\x08" * 50])
def test_file_that_is_no_onnx_model_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(ExportError, match=r"cannot parse the ONNX file|could not build an engine") as error:
        build_engine(content, RTX, PRECISIONS["fp16"], BATCH, SHAPE)
    assert "\n" not in str(error.value)


def test_missing_package_names_the_command_that_installs_it() -> None:
    absent = Flavour("tensorrt-rtx", "no_such_module", "x.engine", needs_gpu=False)
    with pytest.raises(MissingDependency, match=r"pip install -e '\.\[tensorrt-rtx\]'"):
        build_engine(b"", absent, PRECISIONS["fp16"], BATCH, SHAPE)
    assert "no_such_module is not installed" in str(why_not_buildable(absent))


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_tensorrt_builds_the_same_network(precision: str, onnx_files: dict[str, bytes]) -> None:
    pytest.importorskip("tensorrt", reason="needs the full TensorRT package")
    engine = build_engine(onnx_files[precision], FLAVOURS["tensorrt"], PRECISIONS[precision], BATCH, SHAPE)
    assert engine.convolutions == 21
