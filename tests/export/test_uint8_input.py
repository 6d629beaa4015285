"""Bundles that take pictures as bytes: the network of the float bundle, behind a normalisation that is exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor, nn

from export import Batch, ExportConfig, ExportError, ExportResult, export_bundle, open_bundle, verify_bundle
from export.base.batch import UINT8, Inputs
from export.base.normalisation import Normalisation
from export.base.precision import INT8, PRECISIONS
from export.criteria.normalised import with_normalised
from export.criteria.operators import check_operators
from export.fusion.nodes import input_nodes
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import TracedOnnxRunner
from export.quantisation.calibration import InMemory
from export.runtime.artefacts import artefacts, running, running_first
from export.runtime.engines.engine import FLAVOURS, build_engine
from export.runtime.parity.ladder import execute, judge, operator_inputs
from export.sample_inputs import byte_crops, photographs
from resnet.data.labelled import LabelledInputs
from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from resnet.data.sources import open_splits, open_test
from tests.conftest import Made
from tests.export import digits
from tests.export.networks import BATCH, Fused
from tests.export.onnx_edits import Edit, bypass, change, edited, producer
from tests.export.report.html_tree import parse
from tests.export.test_several_inputs import Metadata, Siamese
from tests.scripts import loading

pytestmark = pytest.mark.usefixtures("captured_once")

DIGIT = 3  # of the held-out ones: a 4
BYTES = replace(digits.PREPROCESSING, as_bytes=True)
GREY = Normalisation(BYTES.mean, BYTES.std)
IMAGENET = Normalisation(IMAGENET_MEAN, IMAGENET_STD)


def held_out(preprocessing: Preprocessing) -> LabelledInputs:
    return LabelledInputs(open_test("digits"), preprocessing)


def calibration(preprocessing: Preprocessing) -> InMemory:
    return InMemory(open_splits("digits").train.inputs(range(0, 600, 5), preprocessing))


def arguments(preprocessing: Preprocessing, precision: str) -> dict[str, Any]:
    labelled = held_out(preprocessing)
    return {
        "images": torch.from_numpy(labelled.pictures.inputs(range(0, 359, 22), preprocessing)),
        "precision": precision,
        **({"calibration": calibration(preprocessing)} if precision == INT8.name else {}),
        **({"labelled": labelled} if precision == "fp32" else {}),
    }


@pytest.fixture(scope="module")
def exported(
    trained_digits: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, ExportResult]:
    """Precision -> an export that takes bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    return Made(lambda p: digits.export(trained_digits[0], output=folder / p, input=UINT8, **arguments(BYTES, p)))


@pytest.fixture(scope="module")
def floats(trained_digits: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Precision -> the bundle of the same network that takes what the host normalised."""
    folder = tmp_path_factory.mktemp("floats")

    def write(precision: str) -> Path:
        if precision != INT8.name:
            return digits.write(digits.fused(trained_digits[0]), folder / precision, precision)
        settings = arguments(digits.PREPROCESSING, precision)
        return digits.export(trained_digits[0], output=folder / precision, **settings).output

    return Made(write)


@pytest.mark.right_network
@pytest.mark.parametrize("precision", ["fp32", "fp16", INT8.name])
def test_the_same_outputs_as_the_float_bundle_bit_for_bit(
    precision: str, exported: Mapping[str, ExportResult], floats: Mapping[str, Path]
) -> None:
    """Of every file, on pictures that neither was exported with; the float file is what lies behind the bytes."""
    result = exported[precision]
    assert result, result.report.verdict
    for rung in verify_bundle(result.output):
        assert rung, rung.verdict
    bundle, other = open_bundle(result.output), open_bundle(floats[precision])
    assert (bundle.dtype, bundle.inputs, other.dtype) == (UINT8, {"input": (16, 16, 1)}, "float32")
    pairs = list(zip(artefacts(bundle), artefacts(other), strict=True))
    assert len(pairs) == (2 if precision == INT8.name else 1)
    for ours, theirs in pairs:
        file = onnx.load(bundle.path / ours.file).graph
        before, behind = (onnx.load(other.path / theirs.file).graph, list(file.node)[5:])
        onnx.checker.check_model(onnx.load(bundle.path / ours.file), full_check=True)
        assert [node.op_type for node in file.node][:5] == ["Cast", "Div", "Sub", "Div", "Transpose"]
        assert [(node.op_type, node.output) for node in behind] == [(node.op_type, node.output) for node in before.node]
        assert {tensor.SerializeToString() for tensor in before.initializer} < {
            tensor.SerializeToString() for tensor in file.initializer
        }
        with running(bundle, ours) as given_bytes, running(other, theirs) as given_floats:
            for pixels, _ in held_out(BYTES).batches(64):
                expected = given_floats(GREY(pixels))["output"]
                np.testing.assert_array_equal(given_bytes(pixels)["output"], expected)


def test_it_says_what_it_takes_and_what_was_compared_were_bytes(exported: Mapping[str, ExportResult]) -> None:
    result = exported["fp32"]
    (entry,) = open_bundle(result.output).manifest["inputs"]
    normalisation = {"scale": "x / 255", "mean": [0.31], "std": [0.4]}
    assert entry == {
        "name": "input",
        "shape": ["batch", 16, 16, 1],
        "dtype": "uint8",
        "layout": "NHWC",
        "normalisation": normalisation,
    }
    facts = parse((result.output / "report.html").read_bytes()).one(id="facts").words
    assert "1 uint8, NHWC, normalised in the files: (x / 255 - mean) / std, mean 0.31, std 0.4" in facts
    golden = load_file(result.output / "golden.safetensors")["input"]
    assert golden.dtype == np.uint8 and golden.shape == (17, 16, 16, 1)
    eager, fused, onnx_form = result.report.accuracy
    assert eager.images == 359 and eager.correct == fused.correct == onnx_form.correct > 300
    shown = {rung.name: rung.operators for rung in result.report.rungs if rung.operators}
    assert shown["onnx"].checks[0].kind == "normalise" and shown["fused"].checks[0].kind != "normalise"


WRONG: dict[str, tuple[Callable[[NDArray], NDArray], str]] = {
    "normalised": (GREY, r"shape \[N, \*\[16, 16, 1\]\], got \[3, 1, 16, 16\]: bytes \[N, H, W, C\] before any"),
    "other layout": (lambda x: x.transpose(0, 3, 1, 2), r"got \[3, 1, 16, 16\]: bytes \[N, H, W, C\] before any"),
    "floats": (lambda x: x.astype(np.float32), "type uint8, got float32: bytes"),
    "signed": (lambda x: x.view(np.int8), "type uint8, got int8: bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_types_and_layouts_are_refused_where_it_runs(
    case: str, exported: Mapping[str, ExportResult], floats: Mapping[str, Path]
) -> None:
    wrong, message = WRONG[case]
    pixels, _ = next(held_out(BYTES).batches(3))
    with running_first(open_bundle(exported["fp32"].output)) as (_, infer), pytest.raises(ExportError, match=message):
        infer(wrong(pixels))
    with (
        running_first(open_bundle(floats["fp32"])) as (_, infer),
        pytest.raises(ExportError, match=r"of type float32, got uint8$"),
    ):
        infer(pixels.transpose(0, 3, 1, 2))


def test_a_manifest_that_says_otherwise_is_refused(exported: Mapping[str, ExportResult], tmp_path: Path) -> None:
    def says(dtype: str) -> digits.Change:
        return lambda manifest, files: manifest["inputs"][0].update(dtype=dtype)

    with pytest.raises(ExportError, match="expected inputs of type float32 or uint8, got int8"):
        open_bundle(digits.rewrite(exported["fp32"].output, tmp_path / "int8", says("int8")))
    (rung,) = (
        r for r in verify_bundle(digits.rewrite(exported["fp32"].output, tmp_path / "f", says("float32"))) if not r
    )
    assert "expected inputs of type float32, got uint8" in rung.verdict


@dataclass(frozen=True)
class Bytes:
    """A network behind a normalisation, and bytes to judge its forms on."""

    subject: Fused
    pixels: Tensor
    normalisation: Normalisation

    def file(self, precision: str) -> OnnxFile:
        return lower_onnx(self.subject.program, PRECISIONS[precision], {}, self.normalisation)

    def judged(self, file: OnnxFile, precision: str) -> tuple[bool, bool]:
        """Whether the network criterion accepts a file, and whether it shows the normalised input bit for bit."""
        p, given = PRECISIONS[precision], {"input": self.pixels.numpy()}
        execution = execute(TracedOnnxRunner(file, p), given, BATCH)
        inputs = self.normalisation.of(operator_inputs(given, BATCH))
        shown = {name: torch.from_numpy(x) for name, x in inputs.items()}
        operators = check_operators(self.subject.program, p, execution.trace, separate_addition=True)
        checks = with_normalised(operators, self.subject.program, p, shown, execution.trace)
        rung = judge(execution, self.subject.references[precision], p, p.network_factor)
        return bool(rung), bool(checks)


@pytest.fixture(scope="module")
def pictures(calibrated: dict[str, nn.Module]) -> Bytes:
    """Of a network whose first convolution pads."""
    pixels = byte_crops(photographs(), 8, 3, (32, 32))
    return Bytes(Fused(calibrated["resnet8"], torch.from_numpy(IMAGENET(pixels.numpy()))), pixels, IMAGENET)


def folded(model: onnx.ModelProto, normalisation: Normalisation) -> None:
    """The affine is folded into the first convolution, which pads with zeros: right inside, wrong at the border."""
    mean, std = (np.array(values, np.float64)[:, None, None] for values in (normalisation.mean, normalisation.std))
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    weight, bias = first.input[1:]
    wide = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == weight).astype(np.float64)
    for step in ("deviations", "centred", "scaled"):
        node = producer(model, f"input.{step}")
        bypass(model, node, node.input[0])
    change(model, weight, lambda values: wide / (255 * std))
    change(model, bias, lambda values: values - (wide * (mean / std)).sum(axis=(1, 2, 3)))


def inexact(model: onnx.ModelProto) -> None:
    """A product with 1 / 255 in place of the quotient: one rounding more, of which no output tells."""
    change(model, "pixel.scale", lambda scale: 1 / scale)
    producer(model, "input.scaled").op_type = "Mul"


def shifted(model: onnx.ModelProto) -> None:
    """Mean and deviation of the wrong channels: blue, green, red."""
    for name in ("pixel.mean", "pixel.std"):
        change(model, name, lambda values: values[::-1])


def test_the_border_is_what_the_host_s_normalisation_makes_it(pictures: Bytes) -> None:
    """And a fold through the padding, which makes it something else and the interior the same, is refused."""

    def first_layer(file: OnnxFile, given: NDArray) -> NDArray:
        node = next(node for node in pictures.subject.program.master.graph.nodes if "conv2d" in node.name)
        with TracedOnnxRunner(file, PRECISIONS["fp32"]) as runner:
            return runner.trace({"input": given})[node.name].numpy()

    file, pixels = pictures.file("fp32"), pictures.pixels.numpy()
    expected = first_layer(pictures.subject.files["fp32"], IMAGENET(pixels))
    np.testing.assert_array_equal(first_layer(file, pixels), expected)
    wrong = replace(file, model=edited(file.model, partial(folded, normalisation=IMAGENET)))
    found = first_layer(wrong, pixels)
    error, size = np.abs(found - expected), np.abs(expected).max()
    assert error[:, :, 1:-1, 1:-1].max() < 1e-5 * size and error[:, :, 0].max() > 0.05 * size
    assert pictures.judged(wrong, "fp32") == (False, False)


@pytest.mark.mutant
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_not_the_host_s_normalisation_is_refused(precision: str, pictures: Bytes) -> None:
    file = pictures.file(precision)
    assert pictures.judged(file, precision) == (True, True)

    def verdict(edit: Edit) -> tuple[bool, bool]:
        return pictures.judged(replace(file, model=edited(file.model, edit)), precision)

    assert verdict(partial(folded, normalisation=IMAGENET)) == (False, False)
    assert verdict(shifted) == (False, False)
    assert verdict(inexact) == (True, False) if precision == "fp32" else verdict(inexact)[0]
    (node,) = input_nodes(pictures.subject.program.master).values()
    hidden = {name: value for name, value in file.values.items() if name != node.name}
    assert pictures.judged(replace(file, values=hidden), precision) == (True, False)


def test_an_engine_is_built_from_it_with_its_precision_proved(pictures: Bytes) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    fp16, content = PRECISIONS["fp16"], pictures.file("fp16")
    engine = build_engine(content.serialize(), FLAVOURS["tensorrt-rtx"], fp16, BATCH, content.inputs)
    assert content.inputs == {"input": (32, 32, 3)} and engine.convolutions == 9
    assert engine.layers[0]["type"] == "CAST" and engine.layers[0]["inputs"] == ["UINT8"]


def test_both_normalisations_are_the_same_and_crops_are_those_of_floats() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((0.31,), (0.4,)), ((0.1307,), (0.3081,))):
        pixels = np.repeat(every, len(mean), axis=3)
        host = Preprocessing((16, 16), (16, 16), mean, std)
        np.testing.assert_array_equal(Normalisation(mean, std)(pixels), host.normalise(pixels))
        assert replace(host, as_bytes=True).shape == (16, 16, len(mean)) and host.shape == (len(mean), 16, 16)
    for channels in (1, 3):
        cut = byte_crops(photographs(), 4, channels, (20, 30))
        assert cut.dtype == torch.uint8 and cut.shape == (4, 20, 30, channels) and cut.float().std() > 30


@dataclass(frozen=True)
class Said:
    """A preprocessing that says something of itself and prepares nothing."""

    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.facts

    def __call__(self, pictures: Sequence[Image.Image]) -> NDArray:
        raise AssertionError("no picture is prepared")


def test_images_of_one_normalisation_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, names = Siamese(), ("left", "right")

    def views(count: int, seed: int) -> dict[str, Tensor]:
        return {name: byte_crops(photographs(), count, 3, (32, 32), 2 * seed + i) for i, name in enumerate(names)}

    def normalised(given: Inputs) -> dict[str, Tensor]:
        return {name: torch.from_numpy(x) for name, x in IMAGENET.of(given).items()}

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                nn.init.normal_(module.bias, 0, 0.2)
        model.train()(**normalised({name: x.numpy() for name, x in views(32, 9).items()}))
    config = ExportConfig("fp16", Batch(1, 2, 4), "none", input=UINT8)
    example = {name: torch.zeros(1, 3, 32, 32) for name in names}
    said = Said(IMAGENET.to_json())
    result = export_bundle(model.eval(), example, tmp_path / "b", config, images=views(8, 1), preprocessing=said)
    assert result, result.report.verdict
    assert all(verify_bundle(result.output))
    given = {name: x.numpy() for name, x in views(3, 2).items()}
    with running_first(open_bundle(result.output)) as (_, infer), torch.no_grad():
        found, expected = infer(given)["output"], model(**normalised(given)).numpy()
    assert np.linalg.norm(found - expected) <= 5e-3 * np.linalg.norm(expected)


def of(**facts: Any) -> dict[str, Any]:
    return {"preprocessing": Said(facts)}


SIGNED = {**digits.PREPROCESSING.to_json(), "scale": "x / 127.5"}
PICTURES = torch.zeros(8, 16, 16, 1, dtype=torch.uint8)
# what is given otherwise than it should be, and what is said
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"preprocessing": None},
        r"ExportConfig.input='uint8': expected the mean and std .* give export_bundle\(preprocessing",
    ),
    "no deviation": (of(mean=[0.5]), "expected mean and std by channel, got"),
    "deviation of zero": (of(mean=[0.5], std=[0.0]), "positive deviations"),
    "another scale": (of(**SIGNED), "expected the scale x / 255, got 'x / 127.5'"),
    "three for grey": (of(**IMAGENET.to_json()), "mean and std of 1 channels for input"),
    "prepared as floats": (
        {"preprocessing": digits.PREPROCESSING},
        r"a preprocessing that makes inputs \[N, \*\[16, 16, 1\]\] uint8, got \[1, 1, 16, 16\] float32",
    ),
    "floats": ({"images": torch.zeros(8, 1, 16, 16)}, r"images of shape \[N, \*\[16, 16, 1\]\] of torch.uint8, got"),
    "float type": ({"images": PICTURES.float()}, r"of torch.uint8, got \[8, 16, 16, 1\] torch.float32"),
    "labelled floats": (
        {"labelled": digits.held_out()},
        r"labelled inputs of shape \[N, \*\[16, 16, 1\]\] uint8, got \[1, 1, 16, 16\] float32",
    ),
    "calibrated on floats": (
        {"precision": "int8", "calibration": InMemory(np.zeros((9, 1, 16, 16), np.float32))},
        r"calibration inputs of shape \[N, \*\[16, 16, 1\]\] uint8, got \[1, 1, 16, 16\] float32",
    ),
    "another type": ({"input": "int8"}, "expected an input of float32, uint8, got 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_bytes_or_not_known_is_refused_in_a_line(
    case: str, trained_digits: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    changed, message = REFUSED[case]
    settings = {"images": PICTURES, "input": UINT8, **changed}
    with pytest.raises(ExportError, match=message):
        digits.export(trained_digits[0], output=tmp_path / "b", **settings)
    assert not (tmp_path / "b").exists()


def test_other_channels_and_vectors_are_refused(tmp_path: Path) -> None:
    said, config = Said(IMAGENET.to_json()), ExportConfig(input=UINT8)
    four = nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU()).eval()
    two = {"image": torch.zeros(1, 3, 32, 32), "meta": torch.zeros(1, 6)}
    message = r"ExportConfig.input='uint8': expected images of 1 or 3 channels, got "
    for model, example, got in (
        (four, torch.zeros(1, 4, 8, 8), r"input \[N, \*\[4, 8, 8\]\]"),
        (Metadata().eval(), two, r"meta \[N, \*\[6\]\]"),
    ):
        with pytest.raises(ExportError, match=message + got):
            export_bundle(model, example, tmp_path / "b", config, preprocessing=said)
    with pytest.raises(ExportError, match=r"metadata\['preprocessing'\]: expected it as export_bundle\(pre"):
        export_bundle(four, torch.zeros(1, 4, 8, 8), tmp_path / "b", metadata={"preprocessing": SIGNED})


def test_from_the_command_line_to_a_device_with_few_packages(tmp_path: Path) -> None:
    """The card of the weights has mean and deviation; without one they are those of ImageNet."""
    out, shipped = tmp_path / "out", loading.ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors"
    command = ("export", "--weights", shipped, "--fp16", "--input", "uint8", "--engine", "none", "--output", out)
    process = loading.run_here(*command)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "input: uint8 [N, H, W, C], bytes as a camera or decoder gives them, normalised in the artefacts" in lines
    assert any(
        line.startswith("pictures: grey, ") and "mean 0.3055 and std 0.3187 of x / 255 (said by" in line
        for line in lines
    )
    (entry,) = json.loads((out / "manifest.json").read_text())["inputs"]
    assert entry["normalisation"]["mean"] == [0.3055] and entry["dtype"] == "uint8"
    process = loading.run("verify", out, cwd=tmp_path, **digits.without_torch(tmp_path / "few", "onnx", "rich", "PIL"))
    assert process.returncode == 0 and "ready to deploy" in process.stdout, process.stderr
    environment = digits.without_torch(tmp_path / "hidden")
    process = loading.run("evaluate", out, "digits", "--json", cwd=tmp_path, **environment)
    assert process.returncode == 0, process.stderr
    (row,) = json.loads(process.stdout)["measured"]
    assert (row["images"], row["correct"]) == (359, 356)
    digits.held_out().pictures.picture(DIGIT).save(tmp_path / "0.png")
    process = loading.run("classify", out, "0.png", "--json", cwd=tmp_path, **environment)
    assert process.returncode == 0, process.stderr
    first, *_ = json.loads(process.stdout)["images"][0]["predictions"]
    assert first["class"] == 4
