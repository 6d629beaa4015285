"""Pictures to inputs, against the steps of torchvision's evaluation transforms restated with Pillow and PyTorch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, eight_bits, imagenet_preprocessing
from resnet.data.presets import DIGITS
from resnet.errors import ResNetError
from resnet.model_card import read_model_card
from tests.resnet.checks import refusal

ROOT = Path(__file__).resolve().parents[3]
STATISTICS = {"L": ((0.45,), (0.226,)), "RGB": (IMAGENET_MEAN, IMAGENET_STD)}


def noise(width: int, height: int) -> Image.Image:
    """The same random picture for the same arguments."""
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


def square(resize: int, size: int, mode: str = "RGB") -> Preprocessing:
    return Preprocessing((size, size), (resize, resize), *STATISTICS[mode])


def torchvision_eval(picture: Image.Image, resize: int, size: int, mode: str) -> Tensor:
    """Resize(resize), CenterCrop(size), ToTensor(), Normalize(...) on a picture of that mode."""
    picture = picture.convert(mode)
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    shorter, longer = resize, int(resize * long / short)
    picture = picture.resize((shorter, longer) if width <= height else (longer, shorter), Image.Resampling.BILINEAR)
    top, left = round((picture.height - size) / 2.0), round((picture.width - size) / 2.0)
    pixels = np.array(picture).reshape(picture.height, picture.width, -1)[top : top + size, left : left + size]
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS[mode])
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255).sub(mean).div(std)


# width x height: landscape, portrait, square, odd, a photograph, as long as asked for, one more, small, extreme
PICTURES = [(64, 48), (48, 64), (50, 50), (101, 37), (640, 427), (36, 36), (55, 36), (37, 37), (20, 13), (7, 11)]
PICTURES += [(1, 1), (1, 150), (150, 1)]


@pytest.mark.parametrize("mode", STATISTICS)
@pytest.mark.parametrize("shape", PICTURES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_equals_torchvision(shape: tuple[int, int], mode: str) -> None:
    image = noise(*shape)
    for resize, size in ((36, 32), (37, 32), (39, 32), (36, 36), (256, 224)):
        (result,) = square(resize, size, mode)([image])
        assert torch.equal(torch.from_numpy(result), torchvision_eval(image, resize, size, mode)), (resize, size)


# picture (width, height), resize and size (height, width), scaled picture (width, height) whose middle is cut out
OBLONG = {
    "width-touches": ((100, 100), (30, 50), (30, 48), (50, 50)),
    "height-touches": ((100, 100), (50, 30), (45, 21), (50, 50)),
    "rounded-down": ((70, 99), (20, 40), (20, 40), (40, 56)),
    "enlarged": ((8, 8), (24, 10), (20, 9), (24, 24)),
}


@pytest.mark.parametrize("case", OBLONG)
def test_oblong_inputs(case: str) -> None:
    picture, resize, (height, width), scaled = OBLONG[case]
    expected = np.asarray(noise(*picture).resize(scaled, Image.Resampling.BILINEAR))
    top, left = round((scaled[1] - height) / 2.0), round((scaled[0] - width) / 2.0)
    result = Preprocessing((height, width), resize, *STATISTICS["RGB"]).pixels(noise(*picture))
    assert np.array_equal(result, expected[top : top + height, left : left + width])


# an interpolation, whether proportions stay, and what it comes to in a line
WAYS = {
    "nearest": (True, "shorter side scaled to 36 (nearest, without averaging where it shrinks), middle 24x32 cut out"),
    "bicubic": (False, "scaled to 36x36 whatever its proportions (bicubic, averaging where it shrinks), middle 24x32"),
    "lanczos": (True, "RGB, shorter side scaled to 36 (lanczos, averaging"),
}


@pytest.mark.parametrize("interpolation", WAYS)
def test_the_interpolation_and_the_proportions_are_those_that_are_said(interpolation: str) -> None:
    keep_aspect, said = WAYS[interpolation]
    way = Preprocessing((24, 32), (36, 36), *STATISTICS["RGB"], interpolation, keep_aspect)
    for shape, covering in {(90, 60): (54, 36), (50, 101): (36, 72), (20, 13): (55, 36)}.items():
        kind, (width, height) = Image.Resampling[interpolation.upper()], covering if keep_aspect else (36, 36)
        scaled = noise(*shape).resize((width, shape[1]), kind).resize((width, height), kind)
        top, left = round((scaled.height - 24) / 2), round((scaled.width - 32) / 2)
        expected = np.asarray(scaled)[top : top + 24, left : left + 32]
        np.testing.assert_array_equal(way.pixels(noise(*shape)), expected)
    assert said in str(way) and str(way).endswith("mean 0.485 0.456 0.406 and std 0.229 0.224 0.225 of x / 255")


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 40000, 65535]])
    for dtype in ("<u2", ">u2", "<i4"):
        assert np.asarray(eight_bits(Image.fromarray(values.astype(dtype)))).tolist() == [[0, 0, 1, 156, 255]]
    assert np.asarray(eight_bits(Image.fromarray(np.array([[-9, 70000]], np.int32)))).tolist() == [[0, 255]]


LONG = "at most 200 times as long as wide, got"  # said before it is scaled
UNFIT = [("F", (24, 24), "got Pillow's mode F"), ("LAB", (24, 24), "got Pillow's mode LAB")]
UNFIT += [("RGB", (1, 60_000), LONG), ("RGB", (60_000, 1), LONG)]


@pytest.mark.parametrize(("mode", "size", "expected"), UNFIT)
def test_pictures_without_a_fixed_range_or_of_extreme_proportions_are_refused(
    mode: str, size: tuple[int, int], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        square(256, 224).pixels(Image.new(mode, size))


@pytest.mark.parametrize("mode", STATISTICS)
def test_pictures_of_any_size_and_mode_become_one_batch(mode: str) -> None:
    given = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
    pictures = [noise(24 + index, 30).convert(other) for index, other in enumerate(given)]
    for picture in pictures:
        if "A" in picture.mode:  # which is left out, whatever it is
            picture.putalpha(noise(*picture.size).convert("L"))
    before = [(picture.mode, picture.size, picture.tobytes()) for picture in pictures]
    batch = square(24, 20, mode)(pictures)
    expected = torch.stack([torchvision_eval(picture, 24, 20, mode) for picture in pictures])
    assert torch.equal(torch.from_numpy(batch), expected) and batch.flags.c_contiguous
    assert [(picture.mode, picture.size, picture.tobytes()) for picture in pictures] == before


def test_json_says_every_step_and_comes_back() -> None:
    record = square(36, 32, "L").to_json()
    assert record == {
        **{"colour": "grey", "resize": [36, 36], "size": [32, 32], "mean": [0.45], "std": [0.226]},
        **{"interpolation": "bilinear", "scale": "x / 255", "layout": "NCHW"},
        **{"antialias": True, "keep_aspect": True},
    }
    oblong = Preprocessing((20, 28), (24, 32), (0.1, 0.2, 0.3), (1.0, 0.25, 1 / 3), "lanczos", keep_aspect=False)
    nearest = replace(square(256, 224), interpolation="nearest")
    assert nearest.to_json()["antialias"] is False
    for preprocessing in (square(36, 32, "L"), square(256, 224), oblong, nearest):
        assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


# changes to a sound record
MALFORMED: tuple[dict[str, object], ...] = (
    {"rotate": 90}, {"interpolation": "cubic"}, {"interpolation": ["bilinear"]}, {"antialias": False},
    {"interpolation": "nearest", "antialias": True}, {"keep_aspect": "no"}, {"layout": "NHWC"},
    {"scale": "x / 127.5"}, {"colour": "BGR"},
    {"colour": "grey"}, {"size": 224}, {"size": [3, 224, 224]}, {"size": ["224", "224"]}, {"size": [223.5, 224]},
    {"size": [math.nan, 224]}, {"resize": [math.inf, 256]}, {"size": [0, 0]}, {"size": [224, 257]}, {"size": None},
    {"mean": 0.5}, {"mean": "abc"}, {"mean": ["0.5", "0.5", "0.5"]}, {"mean": [0.5, math.nan, 0.5]},
    {"mean": [0.5, 0.5, -math.inf]}, {"mean": [1e300, 0.5, 0.5]}, {"mean": [10**400, 0.5, 0.5]}, {"mean": [0.5]},
    {"mean": [0.5, 0.5], "std": [1.0, 1.0]}, {"mean": [], "std": []}, {"std": [0.2, 0.0, 0.2]},
    {"std": [0.2, -0.2, 0.2]}, {"std": [0.2, 0.2, math.nan]}, {"std": [0.2, 1e-300, 0.2]},
)  # fmt: skip


SOUND = square(256, 224).to_json()
RECORDS = [None, "resnet", [1, 2], {}, *(SOUND | change for change in MALFORMED)]
LATER = ("antialias", "keep_aspect")  # which weights files written before do not say
RECORDS += [{key: value for key, value in SOUND.items() if key != missing} for missing in SOUND if missing not in LATER]


def test_what_older_weights_files_do_not_say() -> None:
    older = {key: value for key, value in SOUND.items() if key not in LATER}
    assert Preprocessing.from_json(older) == square(256, 224)
    shipped = read_model_card(ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors")
    assert shipped is not None and shipped.preprocessing == DIGITS


@pytest.mark.parametrize("record", RECORDS, ids=[f"{index}" for index in range(len(RECORDS))])
def test_other_records_are_refused(record: object) -> None:
    message = refusal(ResNetError, Preprocessing.from_json, record)
    assert "preprocessing" in message and f"{record!r:.80}" in message


def test_imagenet_values() -> None:
    rgb = Preprocessing((224, 224), (256, 256), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = Preprocessing((224, 224), (256, 256), (sum(rgb.mean) / 3,), (sum(rgb.std) / 3,))
    assert (imagenet_preprocessing(3), imagenet_preprocessing(1)) == (rgb, grey)
    assert imagenet_preprocessing(4) is None


def test_other_sizes_show_the_same_part() -> None:
    """Of pictures those of 224x224 cover 256x256."""
    covered = {(448, 448): (512, 512), (112, 224): (128, 256), (32, 65): (37, 74), (1, 3): (1, 3)}
    for size, cover in covered.items():
        assert square(256, 224).at(size) == Preprocessing(size, cover, IMAGENET_MEAN, IMAGENET_STD)
