"""classify.py as a user runs it, on a machine without PyTorch: the probabilities, and one line for nonsense."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from tests.export import digits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(trained_digits: tuple[nn.Module, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.write(digits.fused(trained_digits[0]), tmp_path_factory.mktemp("bundles") / "fp32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine digits as files: one more than a batch holds."""
    folder, data = tmp_path_factory.mktemp("pictures"), digits.held_out().pictures
    paths = [folder / f"{i}.png" for i in range(9)]
    for i, path in enumerate(paths):
        data.picture(i).save(path)  # type: ignore[attr-defined]
    return paths


@pytest.fixture
def classify() -> ModuleType:
    """The script as a module, for refusals in this process."""
    spec = importlib.util.spec_from_file_location("classify_script", ROOT / "scripts" / "classify.py")
    assert spec is not None and spec.loader is not None
    module, path = importlib.util.module_from_spec(spec), sys.path.copy()
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def run(folder: Path, *arguments: object, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """In a process that cannot import PyTorch, Triton or ONNX Script."""
    command = [sys.executable, ROOT / "scripts" / "classify.py", *map(str, arguments)]
    environment = {**os.environ, **digits.without_torch(folder / "hidden", *hidden)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def test_the_hook_hides_pytorch(tmp_path: Path) -> None:
    environment = {**os.environ, **digits.without_torch(tmp_path / "hidden")}
    for module in ("torch", "triton", "onnxscript"):
        command = [sys.executable, "-c", f"import {module}"]
        assert b"is hidden" in subprocess.run(command, capture_output=True, env=environment).stderr


def test_probabilities_without_pytorch(
    bundle: Path, pictures: list[Path], trained_digits: tuple[nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    process = run(tmp_path, bundle, *pictures, "--json")
    assert process.returncode == 0, process.stderr
    assert process.stderr.startswith(f"{bundle}/model.onnx on onnxruntime ") and process.stderr.count("\n") == 1
    records = json.loads(process.stdout)["images"]
    assert [record["path"] for record in records] == list(map(str, pictures))
    inputs = torch.from_numpy(digits.held_out_arrays()[0][:9])
    with torch.no_grad():
        expected = trained_digits[0](inputs).double().softmax(1)
    for record, row in zip(records, expected, strict=True):
        probabilities, order = row.sort(descending=True)
        assert record["runtime"].startswith("onnxruntime ")
        assert [found["class"] for found in record["predictions"]] == order[:5].tolist()
        assert [found["label"] for found in record["predictions"]] == [str(i) for i in order[:5].tolist()]
        found = [found["probability"] for found in record["predictions"]]
        np.testing.assert_allclose(found, probabilities[:5], rtol=1e-3)


def test_a_table_for_each_picture(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    process = run(tmp_path, bundle, *pictures[:2])
    assert process.returncode == 0
    lines = process.stdout.splitlines()
    assert len(lines) == 12 and lines[0].strip() == str(pictures[0]) and lines[6].strip() == str(pictures[1])
    assert " % " in lines[1] and "█" in lines[1]


def test_softmax_in_float64(classify: ModuleType) -> None:
    logits = np.array([1000.0, 999.0, -1000.0], np.float32)
    (first, p), (second, q), (third, r) = classify.most_probable(logits)
    assert (first, second, third) == (0, 1, 2) and r == 0.0
    assert p == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-12) and p + q == pytest.approx(1.0, rel=1e-12)
    assert len(classify.most_probable(np.zeros(9))) == 5 and len(classify.most_probable(np.zeros(2))) == 2


def test_without_names_a_class_has_its_number(
    bundle: Path, pictures: list[Path], classify: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless = digits.rewrite(bundle, tmp_path / "b", lambda manifest, files: manifest["model"].pop("classes"))
    assert classify.main([str(nameless), str(pictures[3]), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["images"]
    assert all(found["label"] == f"class {found['class']}" for found in record["predictions"])


def model(**facts: object) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda manifest, files: manifest["model"].update(facts)


def two_dimensions_more(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    manifest["outputs"][0]["shape"] = ["batch", 10, 2, 2]


REFUSED: dict[str, tuple[Callable[[dict[str, Any], dict[str, bytes]], None], str]] = {
    "no preprocessing": (model(preprocessing=None), "takes inputs of shape [1, 16, 16], not pictures"),
    "another preprocessing": (model(preprocessing={"size": 3}), "expected the description of a preprocessing"),
    "pictures of another size": (
        model(preprocessing={**digits.PREPROCESSING.to_json(), "size": [8, 16]}),
        "takes inputs of shape [1, 16, 16]: its preprocessing makes [1, 8, 16]",
    ),
    "too few names": (model(classes=["one", "two"]), "expected the names of 10 classes, got 2"),
    "no logits": (two_dimensions_more, "expected a first output of shape [N, classes]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bundle_that_is_no_classifier_of_pictures_is_refused(
    case: str,
    bundle: Path,
    pictures: list[Path],
    classify: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, message = REFUSED[case]
    other = digits.rewrite(bundle, tmp_path / "b", change)
    assert classify.main([str(other), str(pictures[0])]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("classify.py: error: ") and message in error and error.count("\n") == 1


def test_a_changed_file_is_refused(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    copy = digits.rewrite(bundle, tmp_path / "b", lambda manifest, files: None)
    content = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(content[:-9] + b"\0" + content[-8:])
    process = run(tmp_path, copy, pictures[0])
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"classify.py: error: {copy}/model.onnx: changed since it was written")


def test_what_is_no_bundle_is_refused(
    classify: ModuleType, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify.main([str(tmp_path), str(pictures[0])]) == 2
    assert "expected a bundle" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "folder", "pipe"])
def test_an_unreadable_picture_is_named(
    kind: str,
    bundle: Path,
    pictures: list[Path],
    classify: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "broken.png"
    if kind == "text":
        path.write_text("a cat")
    elif kind == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    assert classify.main([str(bundle), *map(str, pictures), str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and f"classify.py: error: {path}: expected a picture" in error.splitlines()[-1]


def test_nan_is_said_and_nothing_is_classified(
    bundle: Path, pictures: list[Path], classify: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(network: onnx.ModelProto) -> None:
        tensor = next(t for t in network.graph.initializer if t.name == "fc.bias")
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[0] = np.nan
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    poisoned = digits.rewrite(bundle, tmp_path / "b", digits.change_onnx(poison))
    assert classify.main([str(poisoned), str(pictures[0])]) == 1
    out, error = capsys.readouterr()
    assert out == "" and f"{pictures[0]}: model.onnx returns NaN or Inf" in error.splitlines()[-1]


@pytest.mark.parametrize("package", ["numpy", "rich", "PIL"])
def test_a_missing_package_is_one_line(package: str, tmp_path: Path) -> None:
    process = run(tmp_path, "bundle", "picture.png", hidden=(package,))
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"classify.py: error: {package} is not installed here: ")
