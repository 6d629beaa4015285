"""evaluate.py as a user runs it, on a machine without PyTorch: the numbers, and one line for nonsense."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.export import digits
from tests.scripts import loading
from tests.scripts.loading import refusal, run_here

NAMES = ("fp32", "fp16", "bf16", "static", "swapped", "engine")


def run(bundles: Path, *arguments: object, hidden: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """In a process that cannot import PyTorch, Triton, ONNX Script or what is hidden."""
    environment = digits.without_torch(bundles.parent / "hidden", *hidden)
    return loading.run("evaluate", *arguments, cwd=bundles, **environment)


def right(network: nn.Module, inputs: np.ndarray, labels: np.ndarray) -> int:
    with torch.no_grad():
        return int((network(torch.from_numpy(inputs)).argmax(1).numpy() == labels).sum())


def test_the_numbers_are_those_of_plain_numpy(bundles: Path, network: nn.Module) -> None:
    process = run(bundles, *NAMES, "digits", "--json")
    assert process.returncode == 0, process.stderr
    record = json.loads(process.stdout)
    measured = {row["bundle"]: row for row in record["measured"]}
    assert list(measured) == list(NAMES) and record["data"] == "digits"
    assert [(row["bundle"], row["artefact"]) for row in record["not_run"]] == [("engine", "model.trt.engine")]
    inputs, labels = digits.held_out_arrays()
    for row in measured.values():
        assert row["artefact"] == "model.onnx" and row["runtime"].startswith("onnxruntime ")
        assert row["images"] == len(labels) == 359 and row["top1"] == row["correct"] / 359 and row["seconds"] > 0
    eager, swapped = (right(model, inputs, labels) for model in (network, digits.with_swapped_classes(network)))
    for name, expected in (("fp32", eager), ("static", eager), ("engine", eager), ("swapped", swapped)):
        assert measured[name]["correct"] == expected, name
    assert eager > 300 and swapped < eager - 40, "two of ten classes are exchanged"
    for name in ("fp16", "bf16"):  # change what is nearly undecided, a few in a hundred at most
        assert abs(measured[name]["correct"] - eager) < 8 and measured[name]["precision"] == name


def test_a_table_with_differences_what_did_not_run_and_plain_progress(bundles: Path) -> None:
    process = run(bundles, "fp32", "swapped", "engine", "digits")
    assert process.returncode == 0
    *rows, last = [line for line in process.stdout.splitlines() if "model." in line]
    first, second, _ = [line.split() for line in rows]
    assert first[:2] == ["fp32", "model.onnx"] and first[-2] == "%" and first[5] == "359"
    assert second[-2] == "pp" and float(second[-3]) < -10
    assert last.startswith("engine/model.trt.engine not run: tensorrt is not installed")
    progress = [line.split("s  ")[1] for line in process.stderr.splitlines()]
    assert progress == [f"{name}/model.onnx: 359 images" for name in ("fp32", "swapped", "engine")]


ABSENT = {
    "onnxruntime": (("fp32", "digits"), "fp32/model.onnx does not run: onnxruntime is not installed"),
    "ray": (("fp32", "digits", "--ray"), "ray is not installed; install it with: pip install -e '.[ray]'"),
}


@pytest.mark.parametrize("package", ABSENT)
def test_where_nothing_runs_it_says_why(package: str, bundles: Path) -> None:
    arguments, expected = ABSENT[package]
    assert expected in refusal(run(bundles, *arguments, hidden=(package,)))


def test_a_folder_with_some_of_the_classes(bundles: Path, network: nn.Module, tmp_path: Path) -> None:
    """Label 0 of this data is class 7, label 1 is class 9."""
    inputs, labels = digits.held_out_arrays()
    chosen = [int(index) for label in (7, 9) for index in np.flatnonzero(labels == label)[:5]]
    for index in chosen:
        folder = tmp_path / str(labels[index])
        folder.mkdir(exist_ok=True)
        digits.held_out().pictures.picture(index).save(folder / f"{index}.png")
    (row,) = json.loads(run_here("evaluate", bundles / "fp32", tmp_path, "--json").stdout)["measured"]
    expected = right(network, inputs[chosen], labels[chosen])
    assert (row["images"], row["correct"]) == (10, expected) and expected > 5


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'")
def test_a_ray_cluster_counts_the_same(bundles: Path) -> None:
    rows: dict[bool, list[dict[str, Any]]] = {}
    for flags in ([], ["--ray"]):
        process = run(bundles, "static", "fp32", "digits", "--json", *flags)
        assert process.returncode == 0, process.stderr
        rows[bool(flags)] = json.loads(process.stdout)["measured"]
    for here, spread in zip(rows[False], rows[True], strict=True):
        assert all(here[name] == spread[name] for name in ("bundle", "images", "correct", "top1"))
        assert spread["runtime"] == f"{here['runtime']} x 1"
