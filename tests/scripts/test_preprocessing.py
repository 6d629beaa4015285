"""A checkpoint that says nothing of itself, trained behind other steps than ImageNet's, from its file to answers."""

from __future__ import annotations

import io
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from export import open_bundle
from export.runtime.artefacts import running_first
from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from resnet.data.presets import DIGITS
from resnet.initialise import initialise
from resnet.model_card import ModelCard, read_model_card
from resnet.models import create_model
from tests.export import digits
from tests.scripts.loading import ROOT, load_script, refusal, run_here

GUIDE = ROOT / "docs" / "deploy.md"
NAMES = ("apple", "birch", "cedar", "daisy", "elder")
MEAN, STD = (0.2, 0.55, 0.7), (0.3, 0.15, 0.4)
PREPROCESSING = Preprocessing((24, 24), (28, 28), MEAN, STD, "bicubic")
FLAGS = ("--mean", *MEAN, "--std", *STD, "--resize", 28, "--crop", 24, "--interpolation", "bicubic")
EXPORT = ("--model", "resnet8", "--engine", "none", "--batch", "1:4:8", "--image-size", 24)


def trained_on(path: Path) -> Tensor:
    """What training did to a picture: torchvision's Resize(28, BICUBIC), CenterCrop(24), ToTensor, Normalize."""
    picture = Image.open(path).convert("RGB")
    short, long = sorted(picture.size)
    scaled = (28, 28 * long // short) if picture.width <= picture.height else (28 * long // short, 28)
    pixels = np.array(picture.resize(scaled, Image.Resampling.BICUBIC))
    top, left = round((pixels.shape[0] - 24) / 2), round((pixels.shape[1] - 24) / 2)
    cut = torch.from_numpy(pixels[top : top + 24, left : left + 24]).permute(2, 0, 1).float().div(255)
    return cut.sub(torch.tensor(MEAN)[:, None, None]).div(torch.tensor(STD)[:, None, None])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of five classes, five pictures each: stripes that differ in colour and width, far larger than inputs."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (root / name).mkdir()
        for index in range(5):
            height, width = 60 + 9 * index, 90 - 7 * label
            place = np.arange(width) + np.arange(height)[:, None] * (label - 2)
            wave = np.sin(place / (2 + label) + generator.uniform(0, 6))[..., None]
            colour = np.array([label, 2 * label % 5, 4 - label]) * 25 + 70
            noise = generator.normal(0, 25, (height, width, 3))
            pixels = (colour + 60 * wave + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def files(pictures: Path) -> list[Path]:
    return sorted(pictures.rglob("*.png"))


@pytest.fixture(scope="module")
def network(files: list[Path]) -> nn.Module:
    """Its last layer is fitted to the pictures as training saw them, so that it gets all of them right."""
    inputs, labels = torch.stack([trained_on(path) for path in files]), torch.arange(25) // 5
    torch.manual_seed(0)
    model = initialise(create_model("resnet8", num_classes=5), inputs).eval()
    kept: list[Tensor] = []
    hook = model.get_submodule("fc").register_forward_hook(lambda module, given, output: kept.append(given[0]))
    with torch.no_grad():
        model(inputs)
        features = torch.cat([kept[0], torch.ones(25, 1)], 1).double()
        target = 8 * nn.functional.one_hot(labels, 5).double()
        fitted = torch.linalg.solve(
            features.T @ features + 1e-3 * torch.eye(features.shape[1]).double(), features.T @ target
        )
        model.get_parameter("fc.weight").copy_(fitted[:-1].T)
        model.get_parameter("fc.bias").copy_(fitted[-1])
        assert (model(inputs).argmax(1) == labels).all()
    hook.remove()
    return model


@pytest.fixture(scope="module")
def bundles(network: nn.Module, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """One that takes bytes, of the bare checkpoint and flags; one that takes floats, of the converted file and none."""
    folder = tmp_path_factory.mktemp("exports")
    torch.save(network.state_dict(), folder / "five.pth")
    (folder / "names.txt").write_text("\n".join(NAMES))
    weights = ("--weights", folder / "five.pth", "--num-classes", 5)
    said = run_here(
        "export", *EXPORT, *weights, *FLAGS, "--data", pictures, "--input", "uint8", "--output", folder / "u"
    )
    assert said.returncode == 0, said.stderr + said.stdout
    converted = folder / "five.safetensors"
    command = ("convert", folder / "five.pth", converted, "--model", "resnet8", "--preprocessing", "imagenet", *FLAGS)
    process = run_here(*command, "--classes", folder / "names.txt")
    assert process.returncode == 0 and str(PREPROCESSING) in process.stdout, process.stderr
    assert read_model_card(converted) == ModelCard("resnet8", PREPROCESSING, NAMES, "")
    again = run_here("export", "--weights", converted, "--engine", "none", "--batch", "1:4:8", "--output", folder / "f")
    assert again.returncode == 0, again.stderr + again.stdout
    lines = again.stdout.splitlines()
    assert f"pictures: {PREPROCESSING} (said by the weights)" in lines
    assert "classes: 5, apple, birch, cedar, daisy, elder (said by the weights)" in lines
    return folder / "u", folder / "f", said.stdout


def test_export_evaluate_and_classify_agree_with_training(
    bundles: tuple[Path, Path, str], pictures: Path, files: list[Path], network: nn.Module
) -> None:
    in_bytes, floats, said = bundles
    flags = "--mean --std --resize --crop --interpolation"
    assert (
        f"pictures: {PREPROCESSING} (said by {flags}, the rest by nobody: ImageNet's is assumed)" in said.splitlines()
    )
    assert f"classes: 5, {', '.join(NAMES)} (said by the folders of --data or --calibration)" in said.splitlines()
    for bundle in (in_bytes, floats):
        facts = open_bundle(bundle).manifest["model"]
        assert facts["preprocessing"] == PREPROCESSING.to_json() and facts["classes"] == list(NAMES)
    rows = json.loads(run_here("evaluate", in_bytes, floats, pictures, "--json").stdout)["measured"]
    assert [(row["images"], row["correct"]) for row in rows] == [(25, 25)] * 2
    for bundle in (in_bytes, floats):
        images = json.loads(run_here("classify", bundle, *files, "--json").stdout)["images"]
        assert [image["predictions"][0]["label"] for image in images] == [path.parent.name for path in files]
        assert run_here("verify", bundle).stdout.count("the golden picture becomes its input, bit for bit") == 1
    shown = torch.stack([trained_on(path) for path in files]).numpy()
    with running_first(open_bundle(floats)) as (_, infer):
        expected = infer(shown[:8])["output"]
    pixels = (shown[:8].transpose(0, 2, 3, 1) * np.array(STD) + np.array(MEAN)) * 255
    with running_first(open_bundle(in_bytes)) as (_, infer):
        np.testing.assert_array_equal(infer(pixels.round().astype(np.uint8))["output"], expected)
    with torch.no_grad():
        eager = network(torch.from_numpy(shown[:8])).numpy()
    assert np.linalg.norm(expected - eager) < 1e-5 * np.linalg.norm(eager)


def test_a_picture_that_is_prepared_otherwise_is_seen(
    bundles: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bundle in bundles[:2]:
        with monkeypatch.context() as patch:
            patch.setattr("resnet.data.preprocessing.INTERPOLATIONS", {"bicubic": Image.Resampling.BILINEAR})
            process = run_here("verify", bundle)
        assert process.returncode == 1 and "of 255 levels off (Pillow" in process.stdout
        assert process.stdout.splitlines()[-1].endswith("do not evaluate or classify with it")


def test_the_guide_s_check_of_an_application(bundles: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes on training's own steps, and says how far off a sampled picture is."""
    (block,) = re.findall(
        r"^```python needs: [^\n]*prepare\n(.*?golden-picture.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL
    )
    for bundle, as_bytes in zip(bundles[:2], (True, False), strict=True):
        monkeypatch.chdir(bundle)
        right = replace(PREPROCESSING, as_bytes=as_bytes)
        for way in (right, replace(right, interpolation="nearest")):
            with nullcontext() if way is right else pytest.raises(AssertionError, match=r"^up to \d\d of 255 levels"):
                exec(compile(block, "deploy.md", "exec"), {"prepare": lambda picture, way=way: way([picture])})


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


DAMAGED: dict[str, tuple[str, bytes | None, str]] = {
    "no picture": ("golden-picture.png", b"\x89PNG\r\n\x1a\n" + bytes(99), "expected a golden picture and the input"),
    "objects": ("golden-picture.npy", npy(np.array([{}])), "expected a golden picture and the input"),
    "no array": ("golden-picture.npy", b"", "expected a golden picture and the input"),
    "no input": ("golden-picture.npy", None, "expected a golden picture and the input"),
    "doubles": ("golden-picture.npy", npy(np.zeros((1, 3, 24, 24))), "float32 and not [1, 3, 24, 24] float64"),
    "another size": ("golden-picture.npy", npy(np.zeros((2, 2), np.float32)), "and not [2, 2] float32"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_golden_picture_that_is_none_is_refused(case: str, bundles: tuple[Path, Path, str], tmp_path: Path) -> None:
    file, content, message = DAMAGED[case]

    def change(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        files.pop(file)
        if content is not None:
            files[file] = content

    process = run_here("verify", digits.rewrite(bundles[1], tmp_path / "b", change))
    if message.startswith("expected"):
        assert message in refusal(process)
    else:
        assert process.returncode == 1 and message in process.stdout


HALF = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bilinear"}
HALVED = Preprocessing((32, 32), (32, 32), (0.5,) * 3, (0.25,) * 3)
ASSUMED = Preprocessing((32, 32), (37, 37), IMAGENET_MEAN, IMAGENET_STD)
OTHERS = ("one", "two", "three", "four", "five")
# flags -> what holds, who said it, the classes
SAID: dict[str, tuple[Preprocessing, str, tuple[str, ...] | None]] = {
    "--weights five.pth": (ASSUMED, "nobody: ImageNet's is assumed", None),
    "--weights five.safetensors": (PREPROCESSING, "the weights", NAMES),
    "--weights five.safetensors --image-size 12": (PREPROCESSING.at((12, 12)), "the weights", NAMES),
    "--weights five.safetensors --preprocessing timm.json": (HALVED, "--preprocessing timm.json", NAMES),
    "--weights five.pth --preprocessing timm.json": (HALVED, "--preprocessing timm.json", OTHERS),
    "--weights five.safetensors --classes others.txt": (PREPROCESSING, "the weights", OTHERS),
    "--weights five.safetensors --preprocessing timm.json --std 0.5 --crop 30": (
        replace(HALVED, std=(0.5,) * 3, size=(30, 30)),
        "--std --crop, the rest by --preprocessing timm.json",
        NAMES,
    ),
    "--classes others.txt --preprocessing digits --model resnet8": (DIGITS, "--preprocessing digits", OTHERS),
    "--preprocessing timm.json --num-classes 7": (HALVED, "--preprocessing timm.json", None),
    "--weights pretrained --model resnet18": (
        Preprocessing((224, 224), (256, 256), IMAGENET_MEAN, IMAGENET_STD),
        "the published weights",
        None,
    ),
}


@pytest.mark.parametrize("flags", SAID)
def test_who_is_asked_first(flags: str, bundles: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag, a preset, the weights' card, and ImageNet's where nobody says."""
    monkeypatch.chdir(bundles[0].parent)
    Path("timm.json").write_text(json.dumps({"num_classes": 5, "label_names": OTHERS, "pretrained_cfg": HALF}))
    Path("others.txt").write_text("\n".join(OTHERS))
    script, (preprocessing, said_by, classes) = load_script("export"), SAID[flags]
    source = script.describe_source(script.parse_args(flags.split()))
    assert (source.preprocessing, source.said_by, source.classes) == (preprocessing, said_by, classes)
    assert (source.size, source.in_channels) == (preprocessing.size, preprocessing.channels)
    assert classes is None or source.num_classes == 5


REFUSED = {
    "--weights five.pth --num-classes 5 --classes four": "four: expected a name for each of 5 outputs, got 4 names",
    "--weights five.pth --num-classes 5 --classes twice": "expected every class once, got 'a' on lines 1 and 2",
    "--weights five.safetensors --classes four": "four: expected a name for each of 5 outputs, got 4 names",
    "--weights five.safetensors --preprocessing digits": "digits is for 1 channels, the network takes 3",
    "--weights five.safetensors --mean 52 140 178": "--mean: expected it of x / 255, where x is 0 to 255",
    "--weights five.safetensors --crop 20 --image-size 22": "--image-size and --crop both say the size",
    "--weights five.safetensors --resize 20": "scaled to 20x20 and 24x24 is cut out of that",
    "--model resnet8 --in-channels 4 --mean 0.5": "--mean: expected a model for pictures of 1 or 3 channels, got 4",
    "--model resnet8 --resize 3x4x5": "argument --resize: expected H or HxW in pixels, got '3x4x5'",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_does_not_fit_the_network_is_refused(
    command: str, bundles: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundles[0].parent
    monkeypatch.chdir(folder)
    (folder / "four").write_text("a\nb\nc\nd\n")
    (folder / "twice").write_text("a\na\n")
    model = () if "--model" in command or "safetensors" in command else ("--model", "resnet8")
    assert REFUSED[command] in refusal(run_here("export", *model, *command.split()))
    assert not (folder / "build").exists()
    half = refusal(run_here("convert", "five.pth", "x.safetensors", "--model", "resnet8", "--mean", "0.5"))
    assert half.startswith("--mean: ") and half.endswith("expected both --preprocessing and --classes")
