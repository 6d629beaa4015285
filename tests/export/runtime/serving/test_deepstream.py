"""nvinfer's configuration: what it makes of a pixel is what the network was trained on, or it is refused."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from export import ExportError, open_bundle
from export.base.normalisation import Normalisation
from export.lowering.onnx_file import OnnxFile, _normalising
from export.runtime.serving.deepstream import deepstream_config
from tests.export import digits, summing
from tests.scripts.loading import run_here

GREY, COLOUR = Normalisation((0.5, 0.4, 0.3), (0.25,) * 3), Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)


def bundle(folder: Path, normalisation: Normalisation, as_bytes: bool = False, **facts: Any) -> Path:
    model = {"preprocessing": normalisation.to_json(), "classes": ["cat", "dog", "emu"]}
    source = summing.write(folder / "float", model=model, **facts)
    if not as_bytes:
        return source

    def taking_bytes(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        file = OnnxFile(onnx.load_model_from_string(files["model.onnx"]), ("output",), {})
        files["model.onnx"] = _normalising(file, normalisation).serialize()
        manifest["inputs"] = [{"name": "input", "shape": ["batch", 4, 4, 3], "dtype": "uint8"}]

    return digits.rewrite(source, folder / "bytes", taking_bytes)


def settings(folder: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(folder / "config_infer_primary.txt")
    return dict(parser["property"])


def nvinfer(folder: Path) -> NDArray:
    """The outputs of its file on PIXELS, made into inputs as nvinfer's documentation says."""
    said = settings(folder)
    offsets = np.array(said.get("offsets", "0").split(";"), np.float32)
    x = np.float32(said["net-scale-factor"]) * (PIXELS.astype(np.float32) - offsets)
    if said.get("network-input-order", "0") == "0":
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    session = onnxruntime.InferenceSession(folder / said["onnx-file"])
    return np.asarray(session.run(None, {"input": x})[0])


def test_its_pixels_give_what_the_bundle_gives(tmp_path: Path) -> None:
    source, folder = bundle(tmp_path, GREY), tmp_path / "nvinfer"
    said = run_here("serve_config", source, "--deepstream", folder)
    assert said.returncode == 0 and said.stdout.splitlines()[-1].startswith("gst-launch-1.0 ")
    assert "labels no picture whose scores are all 0 or less" in said.stdout and "nobody proves" in said.stdout
    session = onnxruntime.InferenceSession(source / "model.onnx")
    (expected,) = session.run(None, {"input": GREY(PIXELS)})
    np.testing.assert_allclose(nvinfer(folder), expected, rtol=2e-3, atol=0.02)  # one fp16 ulp of an input, at most
    found = settings(folder)
    assert (found["model-color-format"], found["network-type"], found["network-mode"]) == ("0", "1", "2")
    assert (folder / found["labelfile-path"]).read_text() == "cat;dog;emu\n" and found["batch-size"] == "4"


def test_channels_of_different_deviations_only_where_the_file_normalises(tmp_path: Path) -> None:
    folder = tmp_path / "nvinfer"
    said = run_here("serve_config", bundle(tmp_path, COLOUR), "--deepstream", folder)
    assert said.returncode == 2 and not folder.exists()
    assert "the standard deviations are 0.229, 0.224, 0.225: export with --input uint8" in said.stderr
    source = bundle(tmp_path, COLOUR, as_bytes=True)
    assert run_here("serve_config", source, "--deepstream", folder).returncode == 0
    session = onnxruntime.InferenceSession(source / "model.onnx")
    (expected,) = session.run(None, {"input": PIXELS})
    np.testing.assert_array_equal(nvinfer(folder), expected)


def test_an_engine_is_loaded_as_it_is_and_one_of_an_older_file_never(tmp_path: Path) -> None:
    """nvinfer would take whatever engine has the name that it gives its own."""
    source, folder = bundle(tmp_path, GREY), tmp_path / "nvinfer"
    served, _ = deepstream_config(open_bundle(source), folder)
    served.write()
    (model,) = folder.glob("*.onnx")
    (folder / f"{model.name}_b4_gpu0_fp16.engine").write_bytes(b"built by nvinfer")
    built = digits.rewrite(
        source, tmp_path / "built", digits.add_engine("model.trt.engine", "tensorrt", "10.9", b"plan")
    )
    served, notes = deepstream_config(open_bundle(built), folder)
    served.write()
    (engine,) = folder.glob("model*")
    assert engine.read_bytes() == b"plan" and settings(folder)["model-engine-file"] == engine.name
    assert "onnx-file" not in settings(folder) and not any("nobody proves" in note for note in notes)


def features(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["outputs"] = [{"name": "layer2", "shape": ["batch", 3, 2, 2], "kind": "values", "why": "a map"}]


def test_what_is_no_classifier_hands_on_its_tensors(tmp_path: Path) -> None:
    source = digits.rewrite(bundle(tmp_path, GREY), tmp_path / "maps", features)
    served, _ = deepstream_config(open_bundle(source), tmp_path / "nvinfer")
    served.write()
    found = settings(served.path)
    assert (found["network-type"], found["output-tensor-meta"], found["output-blob-names"]) == ("100", "1", "layer2")
    assert "labels.txt" not in served.files


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bfloat16": ({"precision": "bf16"}, "of bf16 nvinfer builds no engine that anybody proved"),
    "8 bits": ({"precision": "int8"}, "of int8 nvinfer builds no engine that anybody proved"),
    "from two images on": (
        {"batch": {"min": 2, "opt": 4, "max": 8}},
        "expected one exported with ExportConfig.batch=1:4:8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nvinfer_cannot_do_is_refused(case: str, tmp_path: Path) -> None:
    facts, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        deepstream_config(open_bundle(bundle(tmp_path, GREY, **facts)), tmp_path / "nvinfer")
    assert not (tmp_path / "nvinfer").exists()
    no_pictures = summing.write(tmp_path / "b")
    with pytest.raises(ExportError, match="does not say how pictures are normalised"):
        deepstream_config(open_bundle(no_pictures), tmp_path / "nvinfer")
