"""Running a bundle: integrity first, then any number of images through whatever runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from torch import Tensor, nn

from export import ExportError, MissingDependency
from export.base.batch import Arrays, Inputs
from export.runtime.artefacts import artefacts, running, running_first
from export.runtime.bundle.contents import open_bundle
from export.runtime.bundle.folder import FORMAT
from export.runtime.engines import engine as tensorrt_engine
from export.runtime.engines.runner import TensorRTRunner
from export.runtime.onnx_session import ONNX_FILE, open_session, rounded_copy
from tests.export import digits

pytestmark = pytest.mark.usefixtures("captured_once")

RTX_FILE = "model.rtx.engine"
RTX_ENGINE = digits.add_engine(RTX_FILE, "tensorrt-rtx", "1.2.3")
Change = dict[str, Any] | digits.Change


@pytest.fixture(scope="module")
def inputs() -> NDArray[np.float32]:
    return digits.held_out_arrays()[0][:20]


@pytest.fixture(scope="module")
def bundles(trained_digits: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, (network, _) = tmp_path_factory.mktemp("bundles"), trained_digits
    program = digits.fused(network)
    return {
        "fp32": digits.write(program, folder / "fp32"),
        "bf16": digits.write(program, folder / "bf16", "bf16"),
    }


@pytest.fixture
def changed(bundles: dict[str, Path], tmp_path: Path) -> Callable[[Change], Path]:
    """The fp32 bundle, whole, with another manifest or other files."""

    def rewrite(change: Change) -> Path:
        function = change if callable(change) else lambda manifest, files: manifest.update(change)
        return digits.rewrite(bundles["fp32"], tmp_path / "b", function)

    return rewrite


def run(path: Path, images: NDArray) -> dict[str, NDArray]:
    with running_first(open_bundle(path)) as (_, infer):
        return infer(images)


def test_bfloat16_runs_as_its_rounded_copy(bundles: dict[str, Path], inputs: NDArray[np.float32]) -> None:
    copy = rounded_copy(onnx.load(bundles["bf16"] / ONNX_FILE))
    (expected,) = open_session(copy.SerializeToString()).run(["output"], {"input": inputs[:8]})
    found = run(bundles["bf16"], inputs)["output"]
    np.testing.assert_array_equal(found[:8], expected)
    assert np.abs(found - run(bundles["fp32"], inputs)["output"]).max() > 1e-3


def test_names_come_from_the_manifest(
    bundles: dict[str, Path], changed: Callable[[Change], Path], inputs: NDArray[np.float32]
) -> None:
    names = {"input": "pixels", "output": "logits"}

    def rename(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        digits.change_onnx(rename_values)(manifest, files)
        manifest["inputs"][0]["name"], manifest["outputs"][0]["name"] = names.values()

    def rename_values(model: onnx.ModelProto) -> None:
        for value in [*model.graph.input, *model.graph.output]:
            value.name = names[value.name]
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]

    found = run(changed(rename), inputs)
    assert list(found) == ["logits"]
    np.testing.assert_array_equal(found["logits"], run(bundles["fp32"], inputs)["output"])


def test_other_inputs_are_refused(bundles: dict[str, Path]) -> None:
    for shape in ((2, 3, 16, 16), (2, 1, 8, 8), (1, 16, 16), (0, 1, 16, 16)):
        with pytest.raises(ExportError, match=r"expected inputs of shape \[N, \*\[1, 16, 16\]\], got"):
            run(bundles["fp32"], np.zeros(shape, np.float32))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and TensorRT-RTX 1.2.3."""
    monkeypatch.setattr(tensorrt_engine, "import_flavour", lambda flavour: SimpleNamespace(__version__="1.2.3"))
    monkeypatch.setattr(tensorrt_engine, "why_no_gpu", lambda extra: "")
    monkeypatch.setattr(tensorrt_engine, "_why_other_gpu", lambda engine: "")


ABSENT = MissingDependency("tensorrt_rtx", "tensorrt-rtx", ModuleNotFoundError(name="tensorrt_rtx"))
LOADS_NOT = "tensorrt-rtx 1.2.3 cannot load the engine"
ENGINES: Mapping[str, tuple[Any, str, Mock, str]] = {
    "package missing": (tensorrt_engine, "import_flavour", Mock(side_effect=ABSENT), "tensorrt_rtx is not installed"),
    "no GPU": (tensorrt_engine, "why_no_gpu", Mock(return_value="no GPU"), "cannot run here: no GPU"),
    "does not load": (TensorRTRunner, "__enter__", Mock(side_effect=ExportError(LOADS_NOT)), LOADS_NOT),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", ENGINES)
def test_an_engine_comes_first_and_leaves_its_place_to_onnx_with_a_reason(
    case: str, changed: Callable[[Change], Path], inputs: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, answer, reason = ENGINES[case]
    monkeypatch.setattr(place, name, answer)
    bundle = open_bundle(changed(RTX_ENGINE))
    engine, file = artefacts(bundle)
    assert (engine.form, engine.file, engine.runtime) == ("tensorrt-rtx", RTX_FILE, "tensorrt-rtx 1.2.3")
    assert file.file == ONNX_FILE and not file.obstacle
    with pytest.raises(ExportError, match=reason), running(bundle, engine):
        pass
    said: list[str] = []
    with running_first(bundle, said.append) as (artefact, infer):
        assert artefact.file == ONNX_FILE and infer(inputs)["output"].shape == (20, 10)
    assert len(said) == 1 and reason in said[0]


@pytest.mark.usefixtures("gpu")
def test_an_engine_runs_in_batches_it_accepts(
    changed: Callable[[Change], Path], inputs: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is a stand-in: what it is given is the plan and batches of 1 to 8."""
    seen: list[Any] = []

    def run_on_device(runner: TensorRTRunner, inputs: Inputs) -> Arrays:
        x = inputs["input"]
        seen.append((runner._arguments[1], len(x)))
        return {"output": x.mean(axis=(1, 2))[:, :10]}

    monkeypatch.setattr(TensorRTRunner, "__enter__", lambda runner: runner)
    monkeypatch.setattr(TensorRTRunner, "__exit__", lambda runner, *error: seen.append("closed"))
    monkeypatch.setattr(TensorRTRunner, "_run", run_on_device)
    bundle = open_bundle(changed(digits.add_engine(RTX_FILE, "tensorrt-rtx", "1.2.3", b"the plan")))
    with running_first(bundle) as (artefact, infer):
        np.testing.assert_array_equal(infer(inputs)["output"], inputs.mean(axis=(1, 2))[:, :10])
    assert not artefact.obstacle and artefact.file == RTX_FILE
    assert seen == [(b"the plan", 8), (b"the plan", 8), (b"the plan", 4), "closed"]


FOREIGN = "not a bundle of this project"
MANIFESTS: Mapping[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 1}, f"has format 1: this version reads format {FORMAT}"),
    "precision": ({"precision": "fp4"}, f"{FOREIGN} .*fp4"),
    "batch": ({"batch": {"min": 4, "opt": 2, "max": 1}}, f"{FOREIGN} .*MIN <= OPT <= MAX"),
    "two inputs": ({"inputs": [{}, {}]}, FOREIGN),
    "input of two dimensions": ({"inputs": [{"name": "input", "shape": ["batch", 3]}]}, FOREIGN),
    "kept layers of another form": ({"kept": 1}, FOREIGN),
    "no outputs": ({"outputs": []}, FOREIGN),
    "engine by another name": ({"engines": {ONNX_FILE: {"flavour": "tensorrt-rtx"}}}, "is not the name of an engine"),
    "engine of another kind": ({"engines": {ONNX_FILE: {"flavour": "openvino"}}}, FOREIGN),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_of_something_else_is_refused(case: str, changed: Callable[[Change], Path]) -> None:
    change, message = MANIFESTS[case]
    with pytest.raises(ExportError, match=message):
        open_bundle(changed(change))
