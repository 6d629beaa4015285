"""A repository as Triton's own schema reads it, its ONNX models run on what it says, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export import ExportError, open_bundle
from export.runtime.serving.triton import triton_models
from tests.export import digits, summing
from tests.scripts.loading import refusal, run_here


def bundle(folder: Path, **facts: Any) -> Path:
    return summing.write(folder / "sums of 3", model={"classes": ['a "cat"', "dög", "emu\n"]}, **facts)


def with_engine(source: Path, folder: Path, file: str = "model.trt.engine", flavour: str = "tensorrt") -> Path:
    output = folder / "with engine"
    return digits.rewrite(source, output, digits.add_engine(file, flavour, "10.9.0.34", b"a plan"))


def configs(repository: Path) -> dict[str, Any]:
    """Name of a model -> its configuration, by the schema that the server publishes."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    found = {path.parent.name: path.read_text() for path in repository.glob("*/config.pbtxt")}
    return {name: text_format.Parse(text, schema.ModelConfig()) for name, text in found.items()}


BATCHES = {"dynamic": ({"min": 1, "opt": 4, "max": 8}, 8, []), "static": ({"min": 4, "opt": 4, "max": 4}, 0, [4]),
           "from two on": ({"min": 2, "opt": 4, "max": 8}, 0, [-1])}  # fmt: skip


@pytest.mark.parametrize("case", BATCHES)
def test_the_servers_schema_reads_it_and_its_warm_up_runs(case: str, tmp_path: Path) -> None:
    batch, largest, first = BATCHES[case]
    path, repository = with_engine(bundle(tmp_path, batch=batch), tmp_path), tmp_path / "repository"
    said = run_here("serve_config", path, "--triton", repository)
    assert said.returncode == 0 and said.stdout.splitlines()[-1] == f"tritonserver --model-repository={repository}"
    assert "with_engine_tensorrt needs a server whose TensorRT is 10.9.0.34" in said.stdout
    found = configs(repository)
    assert found.keys() == {"with_engine", "with_engine_tensorrt"}
    for name, config in found.items():
        engine = name.endswith("_tensorrt")
        assert (config.name, config.backend) == (name, "tensorrt" if engine else "onnxruntime")
        assert config.max_batch_size == largest and config.HasField("dynamic_batching") == (case == "dynamic")
        preferred = [4] if case == "dynamic" and engine else []
        assert list(config.dynamic_batching.preferred_batch_size) == preferred
        assert [group.Kind.Name(group.kind) for group in config.instance_group] == [
            "KIND_GPU" if engine else "KIND_AUTO"
        ]
        (given,), (returned,) = config.input, config.output
        assert (given.name, list(given.dims)) == ("input", [*first, 3, 4, 4])
        assert (returned.name, list(returned.dims), returned.label_filename) == ("output", [*first, 3], "labels.txt")
        assert (repository / name / "labels.txt").read_text() == 'a "cat"\ndög\nemu\\n\n'
        sizes = [warm.batch_size for warm in config.model_warmup]
        assert sizes == ([1, 4, 8] if case == "dynamic" else [1])
    assert (repository / "with_engine_tensorrt" / "1" / "model.plan").read_bytes() == b"a plan"
    file = repository / "with_engine" / "1" / "model.onnx"
    assert file.read_bytes() == (path / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(file)
    for warm in found["with_engine"].model_warmup:
        ((name, value),) = warm.inputs.items()
        assert value.zero_data and value.data_type == found["with_engine"].input[0].data_type
        shape = [warm.batch_size, *value.dims] if largest else list(value.dims)
        shape = [4 if size == -1 else size for size in shape]
        (sums,) = session.run(None, {name: np.zeros(shape, np.float32)})
        assert sums.shape == (shape[0], 3)


def test_which_file_is_for_which_backend(tmp_path: Path) -> None:
    """ONNX Runtime gets the int8 file for CPUs and no bfloat16; engines of TensorRT-RTX are for neither backend."""

    def int8(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        manifest["precision"], files["model.cpu.onnx"] = "int8", b"for CPUs"

    source = bundle(tmp_path)
    (model,), _ = triton_models(open_bundle(digits.rewrite(source, tmp_path / "int8", int8)), tmp_path / "r")
    assert model.files["1/model.onnx"] == b"for CPUs" and b"kind: KIND_CPU" in model.files["config.pbtxt"]
    wide = bundle(tmp_path / "wide", precision="bf16")
    with pytest.raises(ExportError, match=r"expected a file for Triton; model.onnx is left out: .* no bfloat16"):
        triton_models(open_bundle(wide), tmp_path / "r")
    (model,), _ = triton_models(open_bundle(with_engine(wide, tmp_path)), tmp_path / "r")
    assert model.path.name == "with_engine_tensorrt" and model.files["1/model.plan"] == b"a plan"
    foreign = with_engine(source, tmp_path, "model.rtx.engine", "tensorrt-rtx")
    (model,), notes = triton_models(open_bundle(foreign), tmp_path / "r")
    assert notes == ["model.rtx.engine is left out: it is for tensorrt-rtx, not for TensorRT"]


def test_only_what_it_wrote_is_replaced(tmp_path: Path) -> None:
    source, repository = bundle(tmp_path), tmp_path / "repository"
    other = repository / "another model" / "1"
    other.mkdir(parents=True)
    for _ in range(2):
        assert run_here("serve_config", source, "--triton", repository).returncode == 0
    model = repository / "sums_of_3"
    assert sorted(path.name for path in repository.iterdir()) == ["another model", "sums_of_3"]
    later = summing.write(tmp_path / "later" / "sums of 3", "second")
    assert run_here("serve_config", later, "--triton", repository).returncode == 0
    assert (model / "1" / "model.onnx").read_bytes() == (later / "model.onnx").read_bytes()
    assert not (model / "labels.txt").exists(), "of the bundle before"
    before = (model / "config.pbtxt").read_bytes()
    for name in ("2/model.onnx", "notes.txt", "1/weights.bin"):
        foreign = model / name
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_bytes(b"")
        said = refusal(run_here("serve_config", source, "--triton", repository))
        assert said == f"{model} holds {name}, which was not written by this: choose another folder"
        foreign.unlink()
    (model / "config.pbtxt").write_text("name: 'mine'")
    said = refusal(run_here("serve_config", source, "--triton", repository))
    assert said == f"{model} exists and was not written by this: choose another folder"
    (model / "config.pbtxt").write_bytes(before)
    assert "expected --triton DIR" in refusal(run_here("serve_config", source))
