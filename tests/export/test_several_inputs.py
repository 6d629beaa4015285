"""Two and more inputs by name: two images, or an image and a vector, through every form; wrong ones are refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export import Batch, ExportConfig, ExportError, ExportResult, export_bundle, fuse, open_bundle, verify_bundle
from export.base.batch import Arrays, Inputs
from export.base.precision import FORMATS, INT8, PRECISIONS
from export.criteria.batches import check_batches
from export.criteria.operators import check_operators
from export.criteria.references import run_references
from export.fusion.program import FusedProgram
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import ProgramRunner, TracedOnnxRunner, UnfusedRunner
from export.quantisation.calibration import InMemory
from export.runtime.artefacts import running_first
from export.runtime.engines.engine import FLAVOURS, build_engine
from export.runtime.parity.ladder import execute, judge
from export.sample_inputs import crops, photographs
from tests.export.digits import rewrite
from tests.export.onnx_edits import edited
from tests.export.zoo import conv, pooled

BATCH = Batch(1, 2, 4)
FP32 = PRECISIONS["fp32"]


class Siamese(nn.Module):
    """Two images, whose order counts, through one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Sequential(conv(3, 8, s=2), conv(8, 16, s=2)), pooled(32, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.trunk(left), self.trunk(right)
        return self.head(torch.cat([a, (a - b).abs()], 1))


class Stacked(Siamese):
    """The same, both images in one batch; and an input called as an output, which has a default."""

    def forward(self, left: Tensor, right: Tensor, output: Tensor | None = None) -> Tensor:
        a, b = self.trunk(torch.cat([left, right], 0)).chunk(2, 0)
        return self.head(torch.cat([a, (a - b).abs()], 1)) + (0.0 if output is None else output)


class Metadata(nn.Module):
    """An image and a vector, side by side behind the pool; a module has the name of an input and of a graph's own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.meta = nn.Sequential(conv(3, 8, s=2), conv(8, 16, s=2)), nn.Linear(6, 8)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(24, 5)

    def forward(self, image: Tensor, meta: Tensor) -> dict[str, Tensor]:
        y = torch.cat([self.pool(self.trunk(image)).flatten(1), torch.relu(self.meta(meta))], 1)
        return {"meta": self.head(y), "embedding": y}


class Film(nn.Module):
    """An image whose channels are scaled and shifted by a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.film, self.end = conv(3, 16, s=2), nn.Linear(6, 32), nn.Sequential(conv(16, 16), pooled(16, 5))

    def forward(self, image: Tensor, state: Tensor) -> Tensor:
        gain, bias = self.film(state)[:, :, None, None].chunk(2, 1)
        return self.end(torch.relu(self.stem(image) * (1 + gain) + bias))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "siamese": (Siamese, {"left": (3, 32, 32), "right": (3, 32, 32)}),
    "stacked": (Stacked, {"left": (3, 32, 32), "right": (3, 32, 32), "output": (5,)}),
    "metadata": (Metadata, {"image": (3, 32, 32), "meta": (6,)}),
    "film": (Film, {"image": (3, 32, 32), "state": (6,)}),
}
TRIALS = [(name, p) for name in NETWORKS for p in FORMATS if name != "stacked" or p in ("fp16", "int8")]


def inputs_of(name: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(seed), {}
    for index, (key, shape) in enumerate(NETWORKS[name][1].items()):
        images = len(shape) == 3
        vector = torch.randn(count, *shape, generator=generator)
        found[key] = crops(photographs(), count, 3, (32, 32), 2 * seed + index) if images else vector
    return found


def arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@lru_cache
def settled(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        model.train()(**inputs_of(name, 32, 9))
    return model.eval()


pytestmark = pytest.mark.usefixtures("captured_once")


def exported(name: str, path: Path, precision: str = "fp32", **others: Any) -> ExportResult:
    """The example is given in another order than forward has."""
    settings = {
        "model": settled(name),
        "example": dict(reversed(inputs_of(name, 1).items())),
        "config": ExportConfig(precision, BATCH, "none"),
        "images": inputs_of(name, 8, 1),
        "calibration": InMemory(arrays(inputs_of(name, 24, 2))) if precision == INT8.name else None,
    }
    return export_bundle(output=path, **{**settings, **others})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("siamese", "metadata"):
        assert exported(name, folder / name)
    return {name: folder / name for name in ("siamese", "metadata")}


@pytest.mark.right_network
@pytest.mark.parametrize(("name", "precision"), TRIALS)
def test_every_precision_is_exported_and_verified(name: str, precision: str, tmp_path: Path) -> None:
    shapes, model = NETWORKS[name][1], settled(name)
    result = exported(name, tmp_path / "b", precision)
    assert result, result.report.verdict
    for rung in verify_bundle(tmp_path / "b"):
        assert rung, rung.verdict
    bundle = open_bundle(tmp_path / "b")
    assert dict(bundle.inputs) == shapes and list(bundle.inputs) == list(shapes)
    written = onnx.load(tmp_path / "b" / "model.onnx").graph
    assert [value.name for value in written.input] == list(shapes)
    if precision == INT8.name:
        quantised = {node.output[0] for node in written.node if node.op_type == "QuantizeLinear"}
        assert {f"{key}.quantized" for key in shapes if name != "stacked"} <= quantised
    given = inputs_of(name, 9, 3)
    with torch.no_grad():
        expected = model(**given)
    expected = next(iter(expected.values())) if isinstance(expected, dict) else expected
    allowed = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "int8": 2e-1}[precision] * float(expected.norm())
    with running_first(bundle) as (_, infer):
        for rows in (slice(1), slice(4), slice(None, None, -1)):
            found = infer({key: given[key].numpy()[rows] for key in reversed(shapes)})
            y = next(iter(found.values()))
            assert np.linalg.norm(y - expected.numpy()[rows]) <= allowed
    assert name != "metadata" or list(found) == ["output_meta", "embedding"]  # no output is called as an input


def exchanged(inputs: Inputs) -> Arrays:
    return dict(zip(inputs, list(inputs.values())[::-1], strict=True))


class Exchanged(TracedOnnxRunner):
    """Feeds one input with the other."""

    def _run(self, inputs: Inputs) -> Arrays:
        return super()._run(exchanged(inputs))

    def trace(self, inputs: Inputs) -> dict[str, Tensor]:
        found = super().trace(exchanged(inputs))
        return {**found, **{name: torch.from_numpy(x) for name, x in inputs.items()}}


def spoiled(model: onnx.ModelProto, name: str) -> None:
    """One tap of the first layer that reads an input is 5 % off, for that input alone."""
    node = next(n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[0] == name)
    weight = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1])).copy()
    weight.reshape(-1)[np.abs(weight).argmax()] *= 1.05
    model.graph.initializer.append(numpy_helper.from_array(weight, "spoiled"))
    node.input[1] = "spoiled"


@pytest.mark.parametrize("name", ["siamese", "metadata", "film"])
def test_exchanged_inputs_and_a_wrong_layer_behind_any_of_them_are_refused(name: str) -> None:
    model, data = settled(name), arrays(inputs_of(name, 8, 1))
    program: FusedProgram = fuse(model, inputs_of(name, 1), BATCH)
    file = lower_onnx(program, FP32, {})
    references = run_references(model, program, file.output_names, data, FP32)

    def verdicts(runner: TracedOnnxRunner) -> tuple[bool, bool]:
        execution = execute(runner, data, BATCH)
        operators = check_operators(program, FP32, execution.trace, True)
        return bool(operators), bool(judge(execution, references, FP32, FP32.network_factor))

    assert verdicts(TracedOnnxRunner(file, FP32)) == (True, True)
    if name == "siamese":
        assert verdicts(Exchanged(file, FP32)) == (False, False)
    for key in data:
        wrong = OnnxFile(edited(file.model, partial(spoiled, name=key)), file.output_names, file.values)
        assert verdicts(TracedOnnxRunner(wrong, FP32)) == (False, False), key


def test_the_program_is_called_like_the_model_and_engines_have_a_profile_for_each_input() -> None:
    model, data = settled("metadata"), inputs_of("metadata", 3)
    program = fuse(model, data, BATCH)
    with torch.no_grad():
        expected, got = model(**data), program(data["image"], meta=data["meta"])
    assert got.keys() == expected.keys() and torch.allclose(got["meta"], expected["meta"], atol=1e-5)
    for given, message in [
        ((data["image"],), "expected 2 inputs, image, meta, got one without a name"),
        ((data["meta"], data["image"]), r"expected image of shape \[1:2:4, \*\[3, 32, 32\]\], got \[3, 6\]"),
        ((data["image"], data["meta"][:2]), r"expected meta of shape \[1:2:4, \*\[6\]\], got \[2, 6\]"),
    ]:
        with pytest.raises(ExportError, match=message):
            program(*given)
    pytest.importorskip("tensorrt_rtx")
    file = lower_onnx(program, PRECISIONS["fp16"], {})
    engine = build_engine(file.serialize(), FLAVOURS["tensorrt-rtx"], PRECISIONS["fp16"], BATCH, file.inputs)
    assert engine.convolutions == 2
    with pytest.raises(ExportError):
        build_engine(file.serialize(), FLAVOURS["tensorrt-rtx"], FP32, BATCH, {"image": (3, 32, 32)})


def test_inputs_that_show_nothing_are_weak_evidence(tmp_path: Path) -> None:
    model = copy.deepcopy(settled("film"))
    model.film = nn.Linear(6, 32).eval()
    nn.init.normal_(model.film.weight, 0, 1e-8)
    for own, images, weakness in [
        (model, inputs_of("film", 8, 1), "state of another image moves the outputs by .* expected at least 4"),
        (
            settled("film"),
            {**inputs_of("film", 8, 1), "state": torch.ones(8, 6)},
            "inputs of state hardly differ between",
        ),
    ]:
        result = exported("film", tmp_path / "b", images=images, model=own)
        assert not result and not (tmp_path / "b").exists()
        assert any(re.match(weakness, found) for found in result.report.evidence.weaknesses)


class Unused(Siamese):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.trunk(left)] * 2, 1))


class Mixed(Siamese):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.trunk(left), self.trunk(right).flip(0)], 1))


PAIR, VECTOR = inputs_of("siamese", 2), torch.zeros(2, 6)
EXAMPLES: dict[str, tuple[Any, str]] = {
    "one tensor": (PAIR["left"],
        "forward takes left, right: expected an example of each by name, {'left': ..., 'right'"),
    "one of two": ({"left": PAIR["left"]}, "forward takes left, right: expected an example of each"),
    "the second": ({"right": PAIR["left"]}, "names of forward's parameters, left, right: got right, without left"),
    "a tuple": (tuple(PAIR.values()), "got tuple: several inputs are given by the names of forward's parameters"),
    "none": ({}, "names of forward's parameters, left, right: got none, without left, right"),
    "misnamed": ({"left": PAIR["left"], "rigth": VECTOR}, "got left, rigth, without right"),
    "extra": ({**PAIR, "mask": VECTOR}, "forward's parameters, left, right: got left, right, mask"),
    "integers": ({**PAIR, "right": PAIR["right"].long()},
        r"example of right of shape \[N, ...\] in floating point, got "),
    "no tensor": ({**PAIR, "right": 3}, r"example of right of shape \[N, ...\] in floating point, got int"),
    "no batch": ({**PAIR, "right": VECTOR[0]}, r"example of right of shape \[N, ...\] in floating point, got \[6\]"),
    "batches": ({**PAIR, "right": PAIR["right"][:1]}, "same batch dimension first, got 2 of left, 1 of right"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXAMPLES)
def test_an_example_that_does_not_fit_forward_is_one_line(case: str) -> None:
    example, message = EXAMPLES[case]
    with pytest.raises(ExportError, match=message) as error:
        fuse(settled("siamese"), example, BATCH)
    assert "\n" not in str(error.value)


LABELLED: Any = SimpleNamespace(classes=("a", "b"))
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"images": None},
        r"no default images for several inputs: give .* by name, images={'left': \[N, 3, 32"),
    "one tensor": ({"images": PAIR["left"]}, r"images by name, left, right: got \[2, 3, 32, 32\]"),
    "misnamed": ({"images": {"left": PAIR["left"], "x": PAIR["left"]}}, "by name, left, right: got left, x"),
    "misshapen": ({"images": {**PAIR, "right": VECTOR}},
        r"images of right of shape \[N, \*\[3, 32, 32\]\], got \[2, 6\]"),
    "fewer": ({"images": {**PAIR, "right": PAIR["right"][:1]}},
        "as many images of each input, got 2 of left, 1 of right"),
    "labels": ({"labelled": LABELLED},
        "labelled pictures are for a model of one picture, got one that takes left, right"),
    "calibration": ({"calibration": InMemory(PAIR["left"].numpy())}, "by name, left, right: got one array without"),
    "its shape": ({"calibration": InMemory({"left": PAIR["left"].numpy(), "right": VECTOR.numpy()})},
        r"calibration inputs of shape left \[N, \*\[3, 32, 32\]\] float32, right .*, got .* right \[1, 6\] float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_what_does_not_go_with_several_inputs_is_one_line(case: str, tmp_path: Path) -> None:
    settings, message = SETTINGS[case]
    with pytest.raises(ExportError, match=message) as error:
        exported("siamese", tmp_path / "b", "int8" if "calibration" in settings else "fp32", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "b").exists()


def test_an_input_must_be_used_and_images_may_not_mix() -> None:
    with pytest.raises(ExportError, match="forward does not use right: expected inputs that what it returns follows"):
        fuse(Unused().eval(), PAIR, BATCH)
    with pytest.raises(ExportError, match="output of an image depends on the other images of its batch"):
        check_batches(fuse(Mixed().eval(), PAIR, BATCH), arrays(inputs_of("siamese", 4)))


GIVEN: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "missing": (lambda x: {"image": x["image"]}, "expected inputs image, meta, got image"),
    "extra": (lambda x: {**x, "mask": x["meta"]}, "expected inputs image, meta, got image, meta, mask"),
    "misnamed": (lambda x: {"image": x["image"], "state": x["meta"]}, "expected inputs image, meta, got image, state"),
    "misshapen": (lambda x: {**x, "meta": x["meta"][:, :5]}, r"expected meta of shape \[N, \*\[6\]\], got \[3, 5\]"),
    "fewer": (lambda x: {**x, "meta": x["meta"][:2]}, "as many rows of each input, got 3 of image, 2 of meta"),
    "double": (lambda x: {**x, "meta": x["meta"].astype(np.float64)}, "meta of type float32, got float64"),
    "no name": (lambda x: x["image"], "expected inputs by name, image, meta: got one array without a name"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_device_takes_all_inputs_of_a_bundle_and_no_others(case: str, bundles: dict[str, Path]) -> None:
    change, message = GIVEN[case]
    with running_first(open_bundle(bundles["metadata"])) as (_, infer), pytest.raises(ExportError, match=message):
        infer(change(arrays(inputs_of("metadata", 3))))


def test_a_bundle_of_several_inputs_is_no_classifier_of_pictures_and_its_manifest_is_checked(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = open_bundle(bundles["siamese"])
    for ask in (lambda: bundle.preprocessing, lambda: bundle.check_input((3, 32, 32))):
        with pytest.raises(ExportError, match=r"takes left \[N, 3, 32, 32\] and right .*: expected a bundle with one"):
            ask()

    def renamed(manifest: dict[str, Any], files: Any) -> None:
        manifest["inputs"][1]["name"] = "wrong"

    def twice(manifest: dict[str, Any], files: Any) -> None:
        manifest["inputs"][1]["name"] = "left"

    with pytest.raises(ExportError, match=r"golden\.safetensors has inputs left, right: expected left, wrong"):
        verify_bundle(rewrite(bundles["siamese"], tmp_path / "renamed", renamed))
    with pytest.raises(ExportError, match=r"several inputs .* of different names"):
        open_bundle(rewrite(bundles["siamese"], tmp_path / "twice", twice))


def test_a_static_batch_of_one_and_every_form_of_torch() -> None:
    data = inputs_of("film", 1)
    program = fuse(settled("film"), data, Batch(1, 1, 1))
    forms = [
        ProgramRunner(program, FP32, ("output",)),
        UnfusedRunner("folded", program, program.folded, FP32, ("output",)),
        TracedOnnxRunner(lower_onnx(program, FP32, {}), FP32),
    ]
    with torch.no_grad():
        expected = settled("film")(**data).numpy()
    for form in forms:
        with form:
            np.testing.assert_allclose(form.infer(arrays(data))["output"], expected, atol=1e-5)
