"""evaluate.py as a user runs it, on a machine without PyTorch: the numbers, and one line for nonsense."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from export import Batch
from tests.export import digits

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("fp32", "fp16", "bf16", "static", "swapped")


@pytest.fixture(scope="module")
def network(trained_digits: tuple[nn.Module, torch.Tensor]) -> nn.Module:
    return trained_digits[0]


@pytest.fixture(scope="module")
def folder(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    program = digits.fused(network)
    for precision in ("fp32", "fp16", "bf16"):
        digits.write(program, folder / precision, precision)
    digits.write(digits.fused(network, Batch(7, 7, 7)), folder / "static")
    digits.write(digits.fused(digits.with_swapped_classes(network)), folder / "swapped")
    return folder


def run(folder: Path, *arguments: object, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """In a process that cannot import PyTorch, Triton, ONNX Script or what is hidden."""
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", *map(str, arguments)]
    environment = {**os.environ, **digits.without_torch(folder.parent / "hidden", *hidden)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def correct(model: onnx.ModelProto) -> int:
    """How many of the held-out digits a network gets right, one image at a time where it takes any batch."""
    inputs, labels = digits.held_out_arrays()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    size = session.get_inputs()[0].shape[0]
    step = size if isinstance(size, int) else 1
    found = []
    for start in range(0, len(inputs), step):
        batch = np.resize(inputs[start : start + step], (step, 1, 16, 16))
        found.append(session.run(None, {"input": batch})[0].argmax(1))
    return int((np.concatenate(found)[: len(labels)] == labels).sum())


def test_the_numbers_are_those_of_plain_numpy(folder: Path, network: nn.Module) -> None:
    process = run(folder, *NAMES, "digits", "--json")
    assert process.returncode == 0, process.stderr
    record = json.loads(process.stdout)
    measured = {row["bundle"]: row for row in record["measured"]}
    assert list(measured) == list(NAMES) and record["not_run"] == [] and record["data"] == "digits"
    inputs, labels = digits.held_out_arrays()
    for name, row in measured.items():
        assert row["artefact"] == "model.onnx" and row["runtime"].startswith("onnxruntime ")
        assert row["images"] == len(labels) == 359 and row["top1"] == row["correct"] / 359 and row["seconds"] > 0
        if name != "bf16":
            assert row["correct"] == correct(onnx.load(folder / name / "model.onnx")), name
    with torch.no_grad():
        eager = int((network(torch.from_numpy(inputs)).argmax(1).numpy() == labels).sum())
    assert measured["fp32"]["correct"] == measured["static"]["correct"] == eager > 300
    assert abs(measured["bf16"]["correct"] - eager) < 8 and measured["bf16"]["precision"] == "bf16"
    assert measured["swapped"]["correct"] < eager - 40, "two of ten classes are exchanged"


def test_a_table_with_differences_and_plain_progress(folder: Path) -> None:
    process = run(folder, "fp32", "swapped", "digits")
    assert process.returncode == 0
    first, second = [line.split() for line in process.stdout.splitlines() if "model.onnx" in line]
    assert first[:2] == ["fp32", "model.onnx"] and first[-2] == "%" and first[5] == "359"
    assert second[-2] == "pp" and float(second[-3]) < -10
    assert [line.split("s  ")[1] for line in process.stderr.splitlines()] == [
        "fp32/model.onnx: 359 images",
        "swapped/model.onnx: 359 images",
    ]


def test_what_does_not_run_here_is_listed_with_its_reason(folder: Path) -> None:
    def add_engine(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        facts = {"flavour": "tensorrt", "version": "10.9", "convolutions": 21, "build_seconds": 1.0, "gpu": None}
        manifest["engines"]["model.trt.engine"], files["model.trt.engine"] = facts, b"no plan"

    digits.rewrite(folder / "fp32", folder / "engine", add_engine)
    process = run(folder, "engine", "digits")
    assert process.returncode == 0 and "359" in process.stdout
    assert process.stdout.splitlines()[-1].startswith("engine/model.trt.engine not run: tensorrt is not installed")
    record = json.loads(run(folder, "engine", "digits", "--json").stdout)
    assert [row["artefact"] for row in record["measured"]] == ["model.onnx"]
    assert [row["artefact"] for row in record["not_run"]] == ["model.trt.engine"]


def test_where_nothing_runs_it_says_why(folder: Path) -> None:
    process = run(folder, "fp32", "digits", hidden=("onnxruntime",))
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert "fp32/model.onnx does not run: onnxruntime is not installed" in process.stderr


def save_pictures(folder: Path, *classes: str) -> None:
    data: Any = digits.held_out().pictures
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(data.labels == int(name, 36) % 10)[:5]:
            data.picture(i).save(folder / name / f"{i}.png")


def test_a_folder_with_some_of_the_classes(folder: Path, network: nn.Module, tmp_path: Path) -> None:
    """Label 0 of this data is class 7, label 1 is class 9."""
    save_pictures(tmp_path, "7", "9")
    (row,) = json.loads(run(folder, "fp32", tmp_path, "--json").stdout)["measured"]
    inputs, labels = digits.held_out_arrays()
    chosen = np.concatenate([np.flatnonzero(labels == label)[:5] for label in (7, 9)])
    with torch.no_grad():
        right = (network(torch.from_numpy(inputs[chosen])).argmax(1).numpy() == labels[chosen]).sum()
    assert (row["images"], row["correct"]) == (10, right) and right > 5


def test_an_unknown_class_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    save_pictures(tmp_path, "7", "9", "a")
    process = run(folder, "fp32", tmp_path)
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert "fp32: class 'a' of the data is none of the model's: 0, 1, 2, 3, 4, ..." in process.stderr


def test_an_unreadable_picture_is_named(folder: Path, tmp_path: Path) -> None:
    """Its header is whole: it is only found out when the picture is needed."""
    save_pictures(tmp_path, "7", "9")
    broken = tmp_path / "9" / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    process = run(folder, "fp32", tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    assert f"evaluate.py: error: {broken}: expected a picture" in process.stderr.splitlines()[-1]


def test_a_changed_bundle_is_refused(folder: Path) -> None:
    copy = digits.rewrite(folder / "fp32", folder / "changed", lambda manifest, files: None)
    content = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(content[:-9] + b"\0" + content[-8:])
    process = run(folder, "fp32", "changed", "digits")
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith("evaluate.py: error: changed/model.onnx: changed since it was written")


NONSENSE = {
    "no data": (["fp32"], "the following arguments are required: DATA"),
    "no bundle": (["nowhere", "digits"], "nowhere: expected a bundle"),
    "no source": (["fp32", "nowhere"], "nowhere: expected digits, a folder of class folders"),
    "unknown flag": (["fp32", "digits", "--jsn"], "did you mean --json"),
}


@pytest.fixture
def evaluate() -> ModuleType:
    """The script as a module, for refusals in this process."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module, path = importlib.util.module_from_spec(spec), sys.path.copy()
    try:
        sys.modules[spec.name] = module  # where its dataclass looks itself up
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
        del sys.modules[spec.name]
    return module


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_one_line_and_exit_2(
    case: str,
    folder: Path,
    evaluate: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, expected = NONSENSE[case]
    monkeypatch.chdir(folder)
    try:
        code = evaluate.main(arguments)
    except SystemExit as exit:
        code = exit.code
    out, error = capsys.readouterr()
    assert code == 2 and out == "" and expected in error and error.count("\n") == 1


def test_without_ray_the_extra_is_named(folder: Path) -> None:
    process = run(folder, "fp32", "digits", "--ray", hidden=("ray",))
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "ray is not installed; install it with: pip install -e '.[ray]'" in process.stderr


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'")
def test_a_ray_cluster_counts_the_same(folder: Path, tmp_path: Path) -> None:
    rows = {}
    for flags in ([], ["--ray"]):
        process = run(folder, "static", "fp32", "digits", "--json", *flags)
        assert process.returncode == 0, process.stderr
        rows[bool(flags)] = json.loads(process.stdout)["measured"]
    for here, spread in zip(rows[False], rows[True], strict=True):
        assert {name: here[name] for name in ("bundle", "images", "correct", "top1")} == {
            name: spread[name] for name in ("bundle", "images", "correct", "top1")
        }
        assert spread["runtime"] == f"{here['runtime']} x 1"
