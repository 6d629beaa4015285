"""export_bundle and verify_bundle from end to end on small networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from export import Batch, ExportConfig, ExportError, ExportResult, export_bundle, verify_bundle
from export.base.precision import PRECISIONS, Precision
from export.fusion.program import FusedProgram
from export.lowering.runners import ProgramRunner
from export.quantisation.calibration import InMemory
from export.runtime.parity.accuracy import Meter
from export.sample_inputs import crops, photographs
from export.terminal.flags import in_flags
from resnet.data.labelled import LabelledInputs
from resnet.data.preprocessing import Preprocessing
from resnet.data.sources import open_test
from tests.export import digits, networks
from tests.export.criteria import mutants
from tests.export.networks import BATCH, Fused
from tests.export.onnx_edits import change, setting
from tests.export.quantised import name_of
from tests.export.report.html_tree import cells, parse

pytestmark = pytest.mark.usefixtures("captured_once")

FILES = {
    "model.onnx", "model.rtx.engine", "model.rtx.layers.json", "parity.json", "report.html", "golden.safetensors",
    "manifest.json",
}  # fmt: skip
EXAMPLE = torch.zeros(1, 3, 32, 32)
SINGLE = ExportConfig("fp32", BATCH, "none")
Export = Callable[..., ExportResult]


@pytest.fixture(scope="module")
def bundle(resnet8: Fused, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "resnet8-fp16"
    steps: list[str] = []
    config = ExportConfig("fp16", BATCH)
    result = export_bundle(resnet8.model, EXAMPLE, output, config, metadata={"name": "resnet8"}, progress=steps.append)
    assert result, result.report.verdict
    assert steps[0] == "capture and fuse" and steps[-1] == "write the bundle"
    return output


def test_parity_json_says_what_was_compared(bundle: Path) -> None:
    parity = json.loads((bundle / "parity.json").read_text())
    assert parity["passed"] is True and parity["images"] == 16 and not parity["evidence"]["weaknesses"]
    low, high = parity["evidence"]["active_share"]
    assert 0.1 < low < high < 0.9 and parity["evidence"]["outputs"]
    assert parity["accuracy"] == []  # without labelled pictures none is claimed
    rungs = {rung["name"]: rung for rung in parity["rungs"]}
    assert list(rungs) == ["eager", "folded", "fused", "onnx", "tensorrt-rtx"]
    for name in ("fused", "onnx"):
        assert rungs[name]["passed"] is True and rungs[name]["precision"] == "fp16"
        assert 0 < rungs[name]["error"] <= 1.5 * rungs[name]["eager_error"]
        assert rungs[name]["ratio"] <= rungs[name]["limit"] == 1.5
        assert len(rungs[name]["operators"]["checked"]) == 8 and not rungs[name]["operators"]["unchecked"]
    if not torch.cuda.is_available():
        assert rungs["tensorrt-rtx"]["passed"] is None and "not run" in rungs["tensorrt-rtx"]["verdict"]


def test_the_manifest_describes_the_artefacts(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {path.name for path in bundle.iterdir()} == FILES == {*manifest["files"], "manifest.json"}
    assert manifest["model"] == {"name": "resnet8"} and manifest["precision"] == "fp16"
    assert manifest["batch"] == {"min": 1, "opt": 4, "max": 8} and manifest["accuracy"] == []
    assert manifest["inputs"] == [{"name": "input", "shape": ["batch", 3, 32, 32], "dtype": "float32"}]
    said = {"kind": "scores or values", "why": "nobody said; ExportConfig.outputs does"}
    assert manifest["outputs"] == [{"name": "output", "shape": ["batch", 10], "dtype": "float32", **said}]
    assert manifest["verified"] is True and manifest["verdict"] == "equal to the eager model"
    assert manifest["engines"]["model.rtx.engine"]["convolutions"] == 9
    layers = json.loads((bundle / "model.rtx.layers.json").read_text())
    assert sum(layer["type"] == "CONVOLUTION" and set(layer["outputs"]) == {"HALF"} for layer in layers) == 9
    assert manifest["versions"]["torch"] == torch.__version__  # with its build
    assert str(Path.cwd()) not in (bundle / "manifest.json").read_text()


def test_the_golden_file_is_the_float64_model(bundle: Path, resnet8: Fused) -> None:
    golden = load_file(bundle / "golden.safetensors")
    with torch.no_grad():
        expected = copy.deepcopy(resnet8.model).double()(golden["input"].double())
    assert golden["input"].dtype == torch.float32 and golden["oracle.output"].dtype == torch.float64
    assert (golden["oracle.output"] - expected).norm() <= networks.EXACT * expected.norm()


def test_the_report_is_of_this_export(bundle: Path) -> None:
    page = parse((bundle / "report.html").read_bytes())
    assert page.one("h1").words == "resnet8 in fp16" and page.one(id="verdict").words.startswith("✓ equal")
    forms = [form for form, *_ in cells(page.one("table", within="rungs"))]
    assert [form.partition(" ")[2] for form in forms[1:]] == ["eager", "folded", "fused", "onnx", "tensorrt-rtx"]
    plotted = page.all("table", within="plot")
    assert len(plotted) >= 2 and all(len(plot.one("tbody").all("tr")) == 8 for plot in plotted)
    assert len(page.one(id="graph").all("article", within="fused")) == 8


def test_verify_accepts_the_bundle(bundle: Path) -> None:
    rungs = verify_bundle(bundle)
    assert [rung.name for rung in rungs] == ["eager", "folded", "tensorrt-rtx", "onnx"] and all(rungs)


def test_verify_refuses_a_file_that_computes_something_else(bundle: Path, tmp_path: Path) -> None:
    """A bundle that is whole, but whose ONNX file was made from other weights."""
    scaled = setting(0, lambda weight: 1.5 * weight[0])
    edit = digits.change_onnx(lambda model: change(model, "layer2.0.conv1.weight", scaled))
    changed = digits.rewrite(bundle, tmp_path / "b", edit)
    rungs = {rung.name: rung for rung in verify_bundle(changed)}
    assert not rungs["onnx"] and "times that of unfused" in rungs["onnx"].verdict


def test_weak_evidence_writes_nothing_and_keeps_the_old_bundle(resnet8: Fused, tmp_path: Path) -> None:
    """Whether of images that are all alike, of one image, or for any network."""
    output, model, nothing = tmp_path / "bundle", resnet8.model, torch.zeros(4, 3, 32, 32)
    assert export_bundle(resnet8.model, EXAMPLE, output, SINGLE)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()).eval()
    for network, images in ((model, nothing), (model, crops(photographs(), 1, 3, (32, 32))), (plain, nothing)):
        result = export_bundle(network, EXAMPLE, output, SINGLE, images=images)
        assert not result and result.report.verdict.startswith("no verdict, the evidence is too weak")
        assert all(result.report.rungs)
    assert "inputs hardly differ between images" in result.report.evidence.weaknesses
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def defective(program: FusedProgram, precision: Precision, names: tuple[str, ...]) -> ProgramRunner:
    defect = mutants.MUTANTS[mutants.PROJECTION]["projection dropped"]
    return ProgramRunner(program, precision, names, operators=defect.operators(program))


WRONG: dict[str, tuple[Callable[..., ProgramRunner], str]] = {
    "classes in another order": (mutants.answering(lambda y: y[:, ::-1]), "% top-1 where the eager model has"),
    "an operator": (defective, "layer3.0.conv2 (conv2d_projection_bias_act): "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_candidate_writes_nothing_and_is_named(
    case: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, verdict = WRONG[case]
    monkeypatch.setattr("export.forms.ProgramRunner", runner)
    result = export(labelled=digits.held_out())
    assert not result and result.report.verdict.startswith("not equal to the eager model: ")
    assert verdict in result.report.verdict and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", [networks.squeeze_excite, networks.two_heads], ids=name_of)
def test_a_users_model_is_exported(network: networks.Network, tmp_path: Path, fused: Mapping[Any, Fused]) -> None:
    subject, config = fused[network], ExportConfig("fp16", BATCH, "tensorrt-rtx")
    result = export_bundle(subject.model, subject.images, tmp_path / "b", config, images=subject.images)
    assert result or result.report.verdict.startswith("no verdict"), result.report.verdict
    assert all(result.report.rungs), [rung.verdict for rung in result.report.rungs]


NONE = LabelledInputs(open_test("digits").subset(np.arange(0)), digits.PREPROCESSING)
SMALLER = LabelledInputs(open_test("digits"), Preprocessing((8, 8), (8, 8), (0.5,), (0.5,)))
EVERYTHING = ("conv1", "layer1", "layer2", "layer3", "fc")
PICTURES = InMemory(np.zeros((1, *digits.EXAMPLE.shape[1:]), np.float32))
IN_8_BITS: dict[str, Any] = {"precision": "int8", "calibration": PICTURES}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "fp8"}, "expected a precision of fp32, fp16, bf16, int8, got 'fp8'"),
    "engine": ({"engine": "openvino"}, "expected an engine of auto, none, tensorrt, tensorrt-rtx, got 'openvino'"),
    "metadata": ({"metadata": {"model": nn.ReLU()}}, "expected metadata that JSON can hold"),
    "image size": ({"images": torch.zeros(4, 1, 8, 8)}, "expected images of shape [N, *[1, 16, 16]], got [4, 1, 8, 8]"),
    "layers of fp32": ({"precision": "fp32", "keep_fp32": ("fc",)}, "--keep-fp32 is for --fp16 and --bf16, got --fp32"),
    "all in fp32": ({"keep_fp32": EVERYTHING}, "none is left: use --fp32"),
    "auto beside names": ({"keep_fp32": ("auto", "fc")}, "--keep-fp32: expected auto or names, got both: auto fc"),
    "a string": ({"keep_fp32": "fc"}, "--keep-fp32: expected auto or a tuple of names, got 'fc'"),
    "no labelled pictures": ({"labelled": NONE}, "expected labelled pictures to measure accuracy on, got none"),
    "another size": ({"labelled": SMALLER}, "of shape [N, *[1, 16, 16]] float32, got [1, 1, 8, 8] float32"),
    "other classes": (
        {"labelled": digits.held_out(), "metadata": {"classes": list("abcdefghij")}},
        "class '0' of the data is none of",
    ),
    "no such layer": ({"keep_fp32": ("layer2.1.conv9",)}, "no layer is called 'layer2.1.conv9'; expected a layer"),
    "pictures for fp16": ({"calibration": PICTURES}, "--calibration DIR is for --int8, got --fp16"),
    "method": ({"calibration_method": "mean"}, "percentile, entropy, minmax, got 'mean'"),
    "no pictures": ({"precision": "int8"}, "int8 needs pictures to calibrate on, got none; give --calibration DIR"),
    "kernels for no such GPU": ({"kernels": ("sm_88",)}, "--kernels sm_88: expected auto or some of sm_80, sm_86"),
    "kernels for an old GPU": ({"kernels": ("sm_75",)}, "--kernels sm_75: Triton compiles matrix products to its FMA"),
    "kernels twice": ({"kernels": ("sm_87", "sm_87")}, "--kernels: expected each architecture once, got sm_87 sm_87"),
    "kernels of int8": (IN_8_BITS | {"kernels": ("sm_87",)}, "--kernels is for fp32, fp16 and bf16, got --int8"),
    "fp32 of int8": ({"precision": "int8", "keep_fp32": "auto"}, "--keep-fp32 is for --fp16 and --bf16, got --int8"),
    "fp16 of fp32": ({"precision": "fp32", "keep_fp16": ("fc",)}, "--keep-fp16 is for --int8, got --fp32"),
    "costs of fp32": ({"precision": "fp32", "layer_costs": True}, "--layer-costs is for --int8, got --fp32"),
    "auto without labels": (IN_8_BITS | {"keep_fp16": "auto"}, "needs labelled pictures"),
    "no such layer of int8": (IN_8_BITS | {"keep_fp16": ("layer9",)}, "no layer is called 'layer9'"),
    "all in fp16": (IN_8_BITS | {"keep_fp16": EVERYTHING}, "nothing is left to quantise: use --fp16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line(case: str, export: Export, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ExportError) as error:
        export(**settings)
    assert message in in_flags(str(error.value)) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "batch"), [("fp16", BATCH), ("fp32", Batch(7, 7, 7))])
def test_accuracy_is_measured_before_and_after(
    precision: str, batch: Batch, trained_digits: tuple[nn.Module, Tensor], export: Export
) -> None:
    steps: list[str] = []
    result = export(labelled=digits.held_out(), precision=precision, batch=batch, progress=steps.append)
    assert result, result.report.verdict
    fused = "triton" if torch.cuda.is_available() else "fused"
    inputs, labels = digits.held_out_arrays()
    with torch.no_grad():
        expected = int((trained_digits[0](torch.from_numpy(inputs)).argmax(1).numpy() == labels).sum())
    measured = result.report.accuracy
    assert [(form.form, form.precision) for form in measured] == [
        ("eager", "fp32"), (fused, precision), ("onnx", precision),
    ]  # fmt: skip
    assert [form.images for form in measured] == [359] * 3 and measured[0].correct == expected > 300
    assert all(abs(form.correct - expected) <= 0.01 * form.images for form in measured)  # what an export may lose
    told = [f"measure accuracy: {form.form}" for form in measured]
    assert [step for step in steps if step in (*told, "compare")] == [told[0], "compare", *told[1:]]
    records = [form.to_json() for form in measured]
    assert json.loads((result.output / "parity.json").read_text())["accuracy"] == records
    manifest = json.loads((result.output / "manifest.json").read_text())
    assert manifest["accuracy"] == records
    assert manifest["inputs"][0]["shape"] == ["batch" if batch == BATCH else 7, 1, 16, 16]


def test_an_engine_that_does_not_run_fails_the_export_with_its_report(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = Mock(side_effect=ExportError("the engine does not load on this device"))
    monkeypatch.setattr("export.runtime.engines.runner.TensorRTRunner.__enter__", refuse)
    monkeypatch.setattr("export.pipeline.why_not_runnable", lambda engine: "")
    result = export(labelled=digits.held_out(), precision="fp32", engine="tensorrt-rtx")
    assert not result and not result.output.exists()
    assert "tensorrt-rtx: (run): the engine does not load on this device" in result.report.verdict
    assert [accuracy.form for accuracy in result.report.accuracy] == ["eager", "fused", "onnx"]


def test_a_form_that_loses_accuracy_is_not_written(
    trained_digits: tuple[nn.Module, Tensor], export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused program whose accuracy is measured has two class rows exchanged; all that is compared is right."""
    swapped = digits.fused(digits.with_swapped_classes(trained_digits[0]), BATCH)
    wrong, run = ProgramRunner(swapped, PRECISIONS["fp32"], ("output",)), Meter._run
    monkeypatch.setattr(
        Meter, "_run", lambda meter, runner, *others: run(meter, wrong if runner.name == "fused" else runner, *others)
    )
    result = export(labelled=digits.held_out(), precision="fp32")
    eager, fused, onnx = result.report.accuracy
    assert all(result.report.rungs) and not result and list(tmp_path.iterdir()) == []
    assert fused.correct < eager.correct - 40 and onnx.correct == eager.correct
    expected = f"accuracy lost: {fused.form} (fp32) has {100 * fused.top1:.2f} % top-1 where the eager model has "
    assert result.report.verdict.startswith(f"{expected}{100 * eager.top1:.2f} %")


def test_weak_evidence_can_be_lifted_and_what_is_wrong_cannot(
    resnet8: Fused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By other pictures, or in a bundle that says that there is no verdict."""
    lifted, alike = ExportConfig("fp32", BATCH, "none", unverified=True), torch.zeros(4, 3, 32, 32)
    result = export_bundle(resnet8.model, EXAMPLE, tmp_path / "bundle", lifted, images=alike)
    assert not result and result.written and "unverified" not in result.report.verdict
    rungs = verify_bundle(tmp_path / "bundle")
    assert [rung.name for rung in rungs if not rung] == ["evidence"]
    assert next(rung for rung in rungs if not rung).verdict == result.report.verdict
    assert export_bundle(resnet8.model, EXAMPLE, tmp_path / "bundle", lifted)
    assert all(verify_bundle(tmp_path / "bundle"))
    monkeypatch.setattr("export.forms.ProgramRunner", mutants.RUNNERS["all zeros"])
    result = export_bundle(resnet8.model, EXAMPLE, tmp_path / "wrong", lifted, images=alike)
    assert not result and not result.written and not (tmp_path / "wrong").exists()


OUTPUTS_REFUSED = {
    "a word": ("classes", None, "expected outputs of auto, scores, probabilities, values, got 'classes'"),
    "labels of values": ("values", "digits", "labelled pictures are for class scores, got ExportConfig"),
}


@pytest.mark.parametrize("case", OUTPUTS_REFUSED)
def test_outputs_that_cannot_be(case: str, resnet8: Fused, tmp_path: Path) -> None:
    told, labels, message = OUTPUTS_REFUSED[case]
    with pytest.raises(ExportError, match=message):
        config = ExportConfig("fp32", BATCH, "none", outputs=told)
        labelled: Any = labels and [0]
        export_bundle(resnet8.model, EXAMPLE, tmp_path / "b", config, labelled=labelled)


def test_a_quick_export_checks_every_operator_and_says_what_it_left_out(
    resnet8: Fused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, left_out = ExportConfig("fp32", Batch(1, 8, 32), "none", quick=True), ["compared on 10 of 16 images"]
    left_out.append("no batch of 32 was run")
    result = export_bundle(resnet8.model, EXAMPLE, tmp_path / "bundle", config)
    assert result and result.report.images == 10 and list(result.report.quick) == left_out
    checked = [rung.operators for rung in result.report.rungs if rung.operators is not None]
    assert [len(operators.checks) for operators in checked] == [8, 8]
    for name in ("parity.json", "manifest.json"):
        assert json.loads((tmp_path / "bundle" / name).read_text())["quick"] == left_out
    page = parse((tmp_path / "bundle" / "report.html").read_bytes())
    assert "; ".join(left_out) in page.one(id="quick").words
    assert len(load_file(tmp_path / "bundle" / "golden.safetensors")["input"]) == 10
    monkeypatch.setattr("export.forms.ProgramRunner", mutants.RUNNERS["all zeros"])
    assert not export_bundle(resnet8.model, EXAMPLE, tmp_path / "wrong", config).written
