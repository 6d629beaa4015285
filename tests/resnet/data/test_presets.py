"""What is said of preprocessing and of classes: presets, timm's files, value by value, names in files and folders."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resnet.data.labelled import DataError
from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, imagenet_preprocessing
from resnet.data.presets import DIGITS, Changes, Preset, open_preset, read_classes
from resnet.data.sources import folder_classes
from resnet.errors import ResNetError
from tests.resnet.checks import refusal

SIZE = (32, 48)
HALF = (0.5, 0.5, 0.5)
# As timm 1.0 writes config.json on the hub, shortened.
TIMM: dict[str, Any] = {
    "architecture": "resnet50",
    "num_classes": 3,
    "label_names": ["tench", "goldfish", "shark"],
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "test_crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(HALF),
        "std": list(HALF),
        "num_classes": 3,
    },
}
NAMES = ("tench", "goldfish", "shark")
SCALED = math.floor(224 / 0.95)  # as timm's transforms_imagenet_eval has it


def timm(tmp_path: Path, record: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record))
    return str(path)


def test_presets() -> None:
    imagenet = imagenet_preprocessing(3)
    assert imagenet is not None and open_preset("imagenet", 3, SIZE) == Preset(imagenet.at(SIZE))
    assert open_preset("imagenet", None, SIZE).preprocessing.channels == 3
    assert open_preset("imagenet", 1, SIZE).preprocessing.channels == 1
    assert open_preset("digits", None, SIZE) == Preset(DIGITS) == open_preset("digits", 1, SIZE)


CONFIGS: dict[str, tuple[dict[str, Any], Preset]] = {
    "of the hub": (TIMM, Preset(Preprocessing((224, 224), (SCALED,) * 2, HALF, HALF, "bicubic"), NAMES)),
    "of a model": (TIMM["pretrained_cfg"], Preset(Preprocessing((224, 224), (SCALED,) * 2, HALF, HALF, "bicubic"))),
    "squashed": (
        {"input_size": [1, 60, 80], "crop_pct": 0.9, "crop_mode": "squash", "mean": [0.5], "interpolation": "bilinear"},
        Preset(Preprocessing((60, 80), (66, 88), IMAGENET_MEAN[:1] * 1, IMAGENET_STD[:1], keep_aspect=False)),
    ),
    "by default": (
        {"interpolation": "", "mean": None, "label_names": NAMES},
        Preset(Preprocessing((224, 224), (256, 256), IMAGENET_MEAN, IMAGENET_STD, "bicubic")),
    ),
    "names by number": (
        {**TIMM, "label_names": {"10": "c", "2": "b", "1": "a"}},
        Preset(Preprocessing((224, 224), (SCALED,) * 2, HALF, HALF, "bicubic"), ("a", "b", "c")),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_of_timm(case: str, tmp_path: Path) -> None:
    record, expected = CONFIGS[case]
    if case == "squashed":
        record["std"] = [0.25]
        expected = Preset(replace(expected.preprocessing, mean=(0.5,), std=(0.25,)))
    assert open_preset(timm(tmp_path, record), None, SIZE) == expected


OBLONG = {**TIMM["pretrained_cfg"], "input_size": [3, 224, 320]}
MISREAD: dict[str, tuple[object, int | None, str]] = {
    "no configuration": ({"mode": "x"}, None, "config.json: expected a data configuration of timm (it has no mean"),
    "a list": ([1], None, "expected a data configuration of timm"),
    "with borders": ({**OBLONG, "crop_mode": "border"}, None, "crop_mode center or squash, got 'border'"),
    "oblong": (OBLONG, None, "whose longer side timm rounds"),
    "two means": ({"mean": [0.5, 0.5], "std": [1, 1]}, None, "mean and std of 1 or 3 channels"),
    "no kernel": ({"interpolation": "random"}, None, "expected an interpolation of nearest,"),
    "no share": ({"mean": [0.5], "crop_pct": "most"}, None, "expected a data configuration of timm"),
    "grey network": (TIMM, 1, "is for 3 channels, the network takes 1"),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_is_no_configuration_of_this_network_is_refused(case: str, tmp_path: Path) -> None:
    record, channels, message = MISREAD[case]
    assert message in refusal(DataError, open_preset, timm(tmp_path, record), channels, SIZE)


def test_other_names_and_channels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"\xff{")
    assert "expected imagenet, digits or a JSON file" in refusal(DataError, open_preset, "imagnet", 3, SIZE)
    assert "expected a data configuration of timm" in refusal(
        DataError, open_preset, str(tmp_path / "damaged"), 3, SIZE
    )
    assert "is for 1 channels, the network takes 3" in refusal(DataError, open_preset, "digits", 3, SIZE)
    assert "is for 1 or 3 channels, the network takes 4" in refusal(DataError, open_preset, "imagenet", 4, SIZE)


BASE = Preprocessing((224, 224), (256, 256), IMAGENET_MEAN, IMAGENET_STD)
# As torchvision's transforms say it: Resize(232), CenterCrop(192); Resize((64, 80)).
CHANGED: dict[str, tuple[Changes, bool, Preprocessing]] = {
    "nothing": (Changes(), False, BASE),
    "statistics": (Changes((0.5,), HALF), False, replace(BASE, mean=HALF, std=HALF)),
    "shorter side": (Changes(resize=(232,)), False, replace(BASE, resize=(232, 232))),
    "and cut": (Changes(resize=(232,), crop=(192, 160)), False, replace(BASE, resize=(232, 232), size=(192, 160))),
    "cut alone": (Changes(crop=(64, 64)), False, replace(BASE, size=(64, 64))),
    "squashed": (Changes(resize=(64, 80)), False, replace(BASE, resize=(64, 80), size=(64, 80), keep_aspect=False)),
    "squashed more": (Changes(resize=(240, 280)), True, replace(BASE, resize=(240, 280), keep_aspect=False)),
    "kernel": (Changes(interpolation="bicubic"), False, replace(BASE, interpolation="bicubic")),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_is_said_goes_before_what_holds(case: str) -> None:
    changes, fixed_size, expected = CHANGED[case]
    assert changes.of(BASE, fixed_size) == expected
    assert bool(changes.said) == (case != "nothing") and all(name.startswith("Changes.") for name in changes.said)


UNFIT = {
    "two channels": (Changes(mean=(0.5, 0.5)), "Changes.mean: expected 3 values, one per channel, or one, got 2"),
    "of 0 to 255": (
        Changes(std=(58.395, 57.12, 57.375)),
        "got 58.395 57.12 57.375; divided by 255 that is 0.229 0.224",
    ),
    "not a number": (Changes(mean=(math.nan,)), "expected finite means"),
    "does not cover": (Changes(resize=(128,)), "scaled to 128x128 and 224x224 is cut out of that"),
    "larger than scaled": (Changes(crop=(300, 200)), "scaled to 256x256 and 300x200 is cut out"),
    "unknown": (Changes(interpolation="cubic"), "expected an interpolation of nearest, box, "),
}


@pytest.mark.parametrize("case", UNFIT)
def test_values_that_do_not_fit_are_refused(case: str) -> None:
    changes, message = UNFIT[case]
    assert message in refusal(ResNetError, changes.of, BASE, False)


FILES = {
    "names": (b"\xef\xbb\xbfcat\r\n  dog \nb\xc3\xa4r", ("cat", "dog", "bär")),
    "an empty line": (b"cat\n\ndog\n", "line 2 is empty"),
    "one twice": (b"cat\ndog\ncat\n", "got 'cat' on lines 1 and 3"),
    "nothing": (b"", "got an empty file"),
    "Latin-1": (b"b\xe4r\n", "it is not UTF-8"),
}


@pytest.mark.parametrize("case", FILES)
def test_names_of_classes_in_a_file(case: str, tmp_path: Path) -> None:
    content, expected = FILES[case]
    (tmp_path / "names.txt").write_bytes(content)
    if isinstance(expected, str):
        assert expected in refusal(DataError, read_classes, tmp_path / "names.txt")
    else:
        assert read_classes(tmp_path / "names.txt") == expected
    assert "one per line (no such file)" in refusal(DataError, read_classes, tmp_path / "nowhere")


def test_names_of_folders(tmp_path: Path) -> None:
    def folders(root: Path, *names: str) -> str:
        for name in names:
            (root / name / "deep").mkdir(parents=True)
            Image.new("L", (4, 4)).save(root / name / "deep" / "p.png")
        return str(root)

    plain = folders(tmp_path / "plain", "dog", "cat", "ape", ".hidden")
    parts = folders(tmp_path / "parts", "train/dog", "train/cat", "val/dog")
    assert folder_classes(plain, 3) == ("ape", "cat", "dog") and folder_classes(parts, 2) == ("cat", "dog")
    assert folder_classes(plain, 4) is None and folder_classes("digits", 10) is None
    (tmp_path / "plain" / "empty").mkdir()
    assert folder_classes(plain, 4) is None
