"""INT8 from end to end, on a network that was trained to read digits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import Batch, ExportConfig, ExportError, ExportResult, export_bundle
from export.quantisation.calibration import InMemory
from export.runtime.artefacts import artefacts, running_first
from export.runtime.bundle.contents import open_bundle
from export.runtime.onnx_session import CPU_ONNX_FILE, ONNX_FILE
from export.runtime.parity.accuracy import count_correct
from export.runtime.verify import verify_bundle
from export.terminal.flags import in_flags
from resnet.data.labelled import LabelledInputs
from resnet.data.sources import open_splits, open_test
from resnet.model_card import read_model_card
from resnet.models import create_model
from resnet.weights import load_weights
from tests.export.digits import change_onnx, rewrite

CHECKPOINT = Path(__file__).parents[2] / "resnet" / "checkpoints" / "resnet20-digits.safetensors"
BATCH = Batch(1, 8, 32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def reader() -> nn.Module:
    card = read_model_card(CHECKPOINT)
    assert card is not None
    model = create_model(card.model, num_classes=len(card.classes), in_channels=1)
    load_weights(model, CHECKPOINT)
    return model.eval()


@pytest.fixture(scope="module")
def held_out() -> LabelledInputs:
    card = read_model_card(CHECKPOINT)
    assert card is not None
    return LabelledInputs(open_test("digits", {"digits"}), card.preprocessing)


@pytest.fixture(scope="module")
def training() -> InMemory:
    card = read_model_card(CHECKPOINT)
    assert card is not None
    return InMemory(open_splits("digits").train.inputs(range(0, 600, 5), card.preprocessing))


def images(held_out: LabelledInputs) -> Tensor:
    return torch.from_numpy(held_out.pictures.inputs(range(0, 352, 22), held_out.preprocessing))


def export(
    model: nn.Module, output: Path, held_out: LabelledInputs, training: Any, labelled: bool = True, **config: Any
) -> ExportResult:
    settings = {"precision": "int8", "batch": BATCH, "engine": "none", **config}
    shown = images(held_out)
    return export_bundle(
        model,
        shown[:1],
        output,
        ExportConfig(**settings),
        images=shown,
        labelled=held_out if labelled else None,
        calibration=training,
        metadata={"preprocessing": held_out.preprocessing.to_json(), "classes": list(held_out.classes)},
    )


@pytest.fixture(scope="module")
def exported(
    reader: nn.Module, held_out: LabelledInputs, training: InMemory, tmp_path_factory: pytest.TempPathFactory
) -> ExportResult:
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return export(reader, folder / "bundle", held_out, training, engine="tensorrt-rtx")


def test_trained_network_keeps_its_accuracy_in_both_files(exported: ExportResult) -> None:
    assert exported, exported.report.verdict
    eager, *forms = exported.report.accuracy
    assert [form.form for form in forms] == ["onnx", "onnx cpu"]
    assert all(form.correct >= 0.999 * eager.correct for form in forms)
    assert {form.precision for form in forms} == {"int8"}


def test_every_layer_is_quantised_and_runs_so(exported: ExportResult) -> None:
    quantisation = exported.report.quantisation
    assert quantisation is not None
    assert (quantisation.layers, quantisation.kept, quantisation.float_convolutions) == (22, (), 0)
    assert (quantisation.method, quantisation.images) == ("percentile", 120)
    assert len(quantisation.costs) == 22
    assert list(quantisation.costs) == sorted(quantisation.costs, key=lambda cost: -cost.error)


def test_every_form_is_held_to_its_scales(exported: ExportResult) -> None:
    rungs = {rung.name: rung for rung in exported.report.rungs}
    for name in ("onnx", "onnx cpu"):
        operators = rungs[name].operators
        assert operators is not None and operators and not operators.unchecked
        assert len([check for check in operators.checks if check.kind == "weight"]) >= 22
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


def test_bundle_verifies_and_the_cpu_file_is_what_runs(exported: ExportResult, held_out: LabelledInputs) -> None:
    rungs = verify_bundle(exported.output)
    assert all(rungs) and {"onnx", "onnx cpu"} <= {rung.name for rung in rungs if not rung.not_run}
    bundle = open_bundle(exported.output)
    assert [artefact.file for artefact in artefacts(bundle)] == ["model.rtx.engine", CPU_ONNX_FILE, ONNX_FILE]
    with running_first(bundle) as (artefact, infer):
        assert artefact.file == CPU_ONNX_FILE
        found = [count_correct(infer(inputs), labels, np.arange(10)) for inputs, labels in held_out.batches(64)]
    assert sum(found) == exported.report.accuracy[-1].correct


def test_changed_scale_is_refused_on_the_device(exported: ExportResult, tmp_path: Path) -> None:
    """Whole files with wrong contents: what a device computes is held to the simulation, not to itself."""

    def halve(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "layer2.0.conv1.scale":
                value = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array((value / 2).astype(value.dtype), tensor.name))

    changed = rewrite(exported.output, tmp_path / "changed", change_onnx(halve))
    failed = {rung.name for rung in verify_bundle(changed) if not rung}
    assert failed == {"onnx"}


def test_ruined_calibration_fails_and_leaves_nothing(
    reader: nn.Module, held_out: LabelledInputs, tmp_path: Path
) -> None:
    grey = InMemory(np.zeros((100, 1, *held_out.preprocessing.size), np.float32))
    result = export(reader, tmp_path / "bundle", held_out, grey)
    assert not result and result.report.verdict.startswith("accuracy lost")
    assert not (tmp_path / "bundle").exists()


def outlying(reader: nn.Module) -> nn.Module:
    """The same network, with one channel between two layers 2,000 times as large: a scale per tensor cannot hold it."""
    model: Any = copy.deepcopy(reader)
    block = model.layer2[1]
    with torch.no_grad():
        block.bn1.weight[3] *= 2000
        block.bn1.bias[3] *= 2000
        block.conv2.weight[:, 3] /= 2000
    return model


def test_fewest_layers_are_kept_where_eight_bits_lose_too_much(
    reader: nn.Module, held_out: LabelledInputs, training: InMemory, tmp_path: Path
) -> None:
    model, settings = outlying(reader), {"calibration_method": "minmax"}
    lost = export(model, tmp_path / "lost", held_out, training, **settings)
    assert not lost and "accuracy lost" in lost.report.verdict
    kept = export(model, tmp_path / "kept", held_out, training, keep_fp16="auto", **settings)
    assert kept and kept.report.quantisation is not None
    assert kept.report.quantisation.kept == ("layer2.1.conv2",)
    assert kept.report.quantisation.layers == 21 and kept.report.quantisation.costs[0].name == "layer2.1.conv2"


def test_named_layers_stay_in_floating_point(
    reader: nn.Module, held_out: LabelledInputs, training: InMemory, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"keep_fp16": ("conv1", "layer3.2"), "engine": "tensorrt-rtx", "labelled": False}
    result = export(reader, tmp_path / "bundle", held_out, training, **settings)
    assert result and result.report.quantisation is not None and not result.report.accuracy
    assert result.report.quantisation.kept == ("conv1", "layer3.2.conv1", "layer3.2.conv2")
    assert result.report.quantisation.float_convolutions == 3
    model = onnx.load(result.output / ONNX_FILE)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["conv1.weight"] == onnx.TensorProto.FLOAT16
    assert types["layer1.0.conv1.weight.quantized"] == onnx.TensorProto.INT8


@pytest.mark.parametrize(
    ("settings", "calibrated", "labelled", "message"),
    [
        ({}, False, True, "int8 needs pictures to calibrate on, got none; give --calibration DIR"),
        ({"precision": "fp16"}, True, True, "--calibration DIR is for --int8, got --fp16"),
        ({"precision": "fp32", "keep_fp16": ("fc",)}, False, True, "--keep-fp16 is for --int8, got --fp32"),
        ({"keep_fp16": "auto"}, True, False, "needs labelled pictures"),
        ({"keep_fp16": ("layer9",)}, True, False, "no layer is called 'layer9'"),
    ],
)
def test_what_cannot_be_quantised_is_refused_in_one_line(
    settings: dict[str, Any],
    calibrated: bool,
    labelled: bool,
    message: str,
    reader: nn.Module,
    held_out: LabelledInputs,
    training: InMemory,
    tmp_path: Path,
) -> None:
    with pytest.raises(ExportError) as error:
        export(reader, tmp_path / "bundle", held_out, training if calibrated else None, labelled, **settings)
    assert message in in_flags(str(error.value)) and "\n" not in str(error.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("size", [1, 3])
def test_static_batches(size: int, reader: nn.Module, held_out: LabelledInputs, tmp_path: Path) -> None:
    """Of a size that divides neither the pictures to calibrate on nor those that are compared."""
    few = InMemory(images(held_out).numpy()[:10])
    result = export(reader, tmp_path / "bundle", held_out, few, labelled=False, batch=size)
    assert result, result.report.verdict
    assert all(verify_bundle(tmp_path / "bundle"))


def test_nothing_left_to_quantise_is_refused(
    reader: nn.Module, held_out: LabelledInputs, training: InMemory, tmp_path: Path
) -> None:
    everything = ("conv1", "layer1", "layer2", "layer3", "fc")
    with pytest.raises(ExportError, match="nothing is left to quantise: use "):
        export(reader, tmp_path / "bundle", held_out, training, keep_fp16=everything)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ExportError, match="expected a calibration method of percentile, entropy, minmax, got 'mean'"):
        ExportConfig(precision="int8", calibration_method="mean")
