"""INT8 from end to end, on a network that was trained to read digits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import Batch, ExportResult
from export.quantisation.calibration import InMemory
from export.runtime.artefacts import artefacts, running_first
from export.runtime.bundle.contents import open_bundle
from export.runtime.onnx_session import CPU_ONNX_FILE, ONNX_FILE
from export.runtime.parity.accuracy import count_correct
from export.runtime.verify import verify_bundle
from resnet.data.sources import open_splits
from tests.export import digits
from tests.export.onnx_edits import change
from tests.export.report.html_tree import cells, parse

pytestmark = pytest.mark.usefixtures("captured_once")

LAYERS = 10
BLOCK = "layer1.0"
IMAGES = torch.from_numpy(digits.held_out_arrays()[0][::22][:16])
SETTINGS: dict[str, Any] = {
    "images": IMAGES,
    "labelled": digits.held_out(),
    "calibration": InMemory(open_splits("digits").train.inputs(range(0, 600, 5), digits.PREPROCESSING)),
    "precision": "int8",
    "batch": Batch(1, 8, 32),
}
Export = Callable[..., ExportResult]


@pytest.fixture
def export(export: Export) -> Export:
    return partial(export, **SETTINGS)


@pytest.fixture(scope="module")
def exported(trained_digits: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    output = tmp_path_factory.mktemp("int8") / "bundle"
    return digits.export(trained_digits[0], output=output, engine="tensorrt-rtx", layer_costs=True, **SETTINGS)


def test_trained_network_keeps_its_accuracy_in_both_files(exported: ExportResult) -> None:
    """99 % of the eager model's top-1, or the export fails."""
    assert exported, exported.report.verdict
    eager, *forms = exported.report.accuracy
    assert [(form.form, form.precision) for form in forms] == [("onnx", "int8"), ("onnx cpu", "int8")]
    assert {form.images for form in exported.report.accuracy} == {359} and eager.correct > 300


def test_every_layer_is_quantised_and_held_to_its_scales(exported: ExportResult) -> None:
    quantisation = exported.report.quantisation
    assert quantisation is not None
    assert (quantisation.layers, quantisation.kept, quantisation.float_convolutions) == (LAYERS, (), 0)
    assert (quantisation.method, quantisation.images, len(quantisation.costs)) == ("percentile", 120, LAYERS)
    assert list(quantisation.costs) == sorted(quantisation.costs, key=lambda cost: -cost.error)
    rungs = {rung.name: rung for rung in exported.report.rungs}
    for name in ("onnx", "onnx cpu"):
        operators = rungs[name].operators
        assert operators is not None and operators and not operators.unchecked
        assert len([check for check in operators.checks if check.kind == "weight"]) >= LAYERS
    assert rungs["fused"].precision == "fp32" and rungs["onnx"].precision == "int8"
    assert exported.report.verdict.startswith("every value of 8 bits is what its scales say")


def test_files_say_what_they_are_for(exported: ExportResult) -> None:
    facts = {}
    for name in (ONNX_FILE, CPU_ONNX_FILE):
        model = onnx.load(exported.output / name)
        facts[name] = {entry.key: entry.value for entry in model.metadata_props}
        assert facts[name]["precision"] == "int8"
    assert "TensorRT" in facts[ONNX_FILE]["purpose"] and "ONNX Runtime on x86" in facts[CPU_ONNX_FILE]["purpose"]
    manifest = open_bundle(exported.output).manifest
    assert manifest["quantisation"]["purposes"] == {name: fact["purpose"] for name, fact in facts.items()}
    assert {ONNX_FILE, CPU_ONNX_FILE, "model.rtx.engine", "model.rtx.layers.json"} <= manifest["files"].keys()


def test_bundle_verifies_and_the_cpu_file_is_what_runs(exported: ExportResult) -> None:
    rungs = verify_bundle(exported.output)
    assert all(rungs) and {"onnx", "onnx cpu"} <= {rung.name for rung in rungs if not rung.not_run}
    bundle = open_bundle(exported.output)
    assert [artefact.file for artefact in artefacts(bundle)] == ["model.rtx.engine", CPU_ONNX_FILE, ONNX_FILE]
    with running_first(bundle) as (artefact, infer):
        assert artefact.file == CPU_ONNX_FILE
        found = [count_correct(infer(x), labels, np.arange(10)) for x, labels in digits.held_out().batches(32)]
    assert sum(found) == exported.report.accuracy[-1].correct


def test_the_report_shows_what_8_bits_cost(exported: ExportResult) -> None:
    page = parse((exported.output / "report.html").read_bytes())
    headings = [heading.words.split()[0] for heading in page.one(id="operators").all("h4")]
    assert headings == ["Error", *["Error", "Share", "Everything"] * 2, "Error"]
    assert len(page.all("table", within="plot")[-1].one("tbody").all("tr")) == LAYERS
    files = [file for file, *_ in cells(page.one(id="files").all("table")[0])]
    assert sum("ONNX Runtime" in file or "TensorRT" in file for file in files) == 2


def test_changed_scale_is_refused_on_the_device(exported: ExportResult, tmp_path: Path) -> None:
    """Whole files with wrong contents: what a device computes is held to the simulation, not to itself."""
    edit = digits.change_onnx(lambda model: change(model, "layer2.0.conv1.scale", lambda scale: scale / 2))
    changed = digits.rewrite(exported.output, tmp_path / "changed", edit)
    assert {rung.name for rung in verify_bundle(changed) if not rung} == {"onnx"}


def test_ruined_calibration_fails_and_leaves_nothing(export: Export) -> None:
    result = export(calibration=InMemory(np.zeros((100, *digits.EXAMPLE.shape[1:]), np.float32)))
    assert not result and result.report.verdict.startswith("accuracy lost")
    assert result.report.quantisation is not None and len(result.report.quantisation.costs) == LAYERS
    assert not result.output.exists()


def test_fewest_layers_are_kept_where_eight_bits_lose_too_much(
    trained_digits: tuple[nn.Module, Tensor], export: Export
) -> None:
    """One channel between two layers is 2,000 times as large: a scale per tensor cannot hold it."""
    model = copy.deepcopy(trained_digits[0])
    block: Any = model.get_submodule(BLOCK)
    with torch.no_grad():
        block.bn1.weight[3] *= 2000
        block.bn1.bias[3] *= 2000
        block.conv2.weight[:, 3] /= 2000
    kept = export(model=model, keep_fp16="auto", calibration_method="minmax")
    assert kept and kept.report.quantisation is not None
    assert kept.report.quantisation.kept == (f"{BLOCK}.conv2",) and kept.report.quantisation.layers == LAYERS - 1
    assert kept.report.quantisation.costs[0].name == f"{BLOCK}.conv2"


def test_named_layers_stay_in_floating_point(export: Export) -> None:
    result = export(labelled=None, keep_fp16=("conv1", BLOCK), engine="tensorrt-rtx")
    assert result and result.report.quantisation is not None and not result.report.accuracy
    assert result.report.quantisation.costs == ()
    assert result.report.quantisation.kept == ("conv1", f"{BLOCK}.conv1", f"{BLOCK}.conv2")
    assert result.report.quantisation.float_convolutions == 3
    model = onnx.load(result.output / ONNX_FILE)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["conv1.weight"] == onnx.TensorProto.FLOAT16
    assert types["layer2.0.conv1.weight.quantized"] == onnx.TensorProto.INT8


@pytest.mark.parametrize("size", [1, 3])
def test_static_batches(size: int, export: Export) -> None:
    """Of a size that divides neither the pictures to calibrate on nor those that are compared."""
    result = export(calibration=InMemory(IMAGES.numpy()[:10]), labelled=None, batch=size)
    assert result, result.report.verdict
    assert all(verify_bundle(result.output))
