"""OpenVINO where it is asked for: the file's own arithmetic, the file for this CPU, and nothing where it is absent."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from export import ExportError, open_bundle, verify_bundle
from export.base.precision import FORMATS, INT8
from export.runtime import openvino_session
from export.runtime.artefacts import OPENVINO, artefacts, running
from export.runtime.onnx_session import CPU_ONNX_FILE, ONNX_FILE
from export.runtime.openvino_session import openvino_file
from tests.export import summing


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return summing.write(tmp_path / "bundle")


def test_it_is_used_where_it_is_asked_for_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    assert OPENVINO not in {artefact.executor for artefact in artefacts(opened)}
    (only,) = artefacts(opened, "onnxruntime")
    assert (only.file, only.form) == (ONNX_FILE, "onnx")
    with pytest.raises(ExportError, match="has nothing for kernels: expected one of onnxruntime, openvino"):
        artefacts(opened, "kernels")
    with pytest.raises(ExportError, match=r"artefacts\(runtime='tensort'\): expected one of tensorrt, tensorrt-rtx, k"):
        artefacts(opened, "tensort")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportError, match=r"model.onnx does not run here: openvino .*\.\[openvino\]"):
        verify_bundle(bundle, runtime=OPENVINO)


def test_the_file_is_the_fastest_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, file in (("fpu avx512_vnni", CPU_ONNX_FILE), ("fpu amx_tile amx_int8", ONNX_FILE)):
        monkeypatch.setattr("export.base.machine._cpu_fact", lambda key, found=features: found)
        assert openvino_file(INT8) == file and openvino_file(FORMATS["fp16"]) == ONNX_FILE


class Core:
    """A CPU that computes in bfloat16 whatever it is asked for; with `capabilities` as it says."""

    capabilities: tuple[str, ...] = ("FP32", "BF16", "INT8")

    def __init__(self) -> None:
        self.get_property = lambda device, name: list(self.capabilities)
        self.read_model = lambda content: SimpleNamespace(inputs=[], reshape=lambda shapes: None)

    def compile_model(self, model: object, device: str, options: dict[str, object]) -> SimpleNamespace:
        asked.append(options["INFERENCE_PRECISION_HINT"])
        return SimpleNamespace(get_property=lambda name: SimpleNamespace(to_string=lambda: "bf16"))


asked: list[object] = []


def test_another_arithmetic_than_the_files_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(Core=Core, __version__="2026.4.1-22982")
    monkeypatch.setattr(openvino_session, "import_openvino", lambda: fake)
    opened = open_bundle(bundle)
    (artefact,) = artefacts(opened, OPENVINO)
    assert artefact.runtime == "openvino 2026.4.1"
    with pytest.raises(ExportError, match="openvino would compute in bf16: expected f32"), running(opened, artefact):
        pass
    hints = {name: openvino_session._arithmetic(precision, ["FP32"]) for name, precision in FORMATS.items()}
    assert set(hints.values()) == {"f32"} and asked == ["f32"]  # what the CPU lacks is not asked for
    hints = {name: openvino_session._arithmetic(FORMATS[name], ["FP16", "BF16"]) for name in FORMATS}
    assert hints == {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}


def test_it_computes_what_was_exported(bundle: Path) -> None:
    pytest.importorskip("openvino")
    *_, rung = verify_bundle(bundle, runtime=OPENVINO)
    assert rung and rung.name == OPENVINO and rung.runtime.startswith("openvino 20")
    opened = open_bundle(bundle)
    (artefact,) = artefacts(opened, OPENVINO)
    x = np.random.default_rng(0).random((5, 3, 4, 4), np.float32)
    with running(opened, artefact) as infer:
        found = infer(x)["output"]
        backwards = infer(x[::-1])["output"]  # which must not overwrite what the call before it gave
    np.testing.assert_allclose(found, x.astype(np.float16).sum((2, 3), np.float32), rtol=1e-3)
    np.testing.assert_array_equal(backwards[::-1], found)
