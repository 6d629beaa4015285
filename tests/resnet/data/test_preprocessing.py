"""Pictures to inputs, against the steps of torchvision's evaluation transforms restated with Pillow and PyTorch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, eight_bits, imagenet_preprocessing

STATISTICS = {"L": ((0.45,), (0.226,)), "RGB": (IMAGENET_MEAN, IMAGENET_STD)}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """The same random picture for the same arguments."""
    planes = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, planes), np.uint8)
    return Image.fromarray(values.squeeze(2)) if planes == 1 else Image.frombytes(mode, (width, height), values)


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
    image, imagenet = noise(*shape), imagenet_preprocessing(3)
    for resize, size in ((36, 32), (37, 32), (39, 32), (36, 36)):
        (result,) = square(resize, size, mode)([image])
        assert torch.equal(torch.from_numpy(result), torchvision_eval(image, resize, size, mode)), (resize, size)
    if mode == "RGB" and min(shape) > 1:
        assert imagenet is not None
        (result,) = imagenet([image])
        assert torch.equal(torch.from_numpy(result), torchvision_eval(image, 256, 224, mode))


# picture (width, height), resize and size (height, width), scaled picture (width, height) whose middle is cut out
OBLONG = {
    "same-shape": ((120, 90), (60, 80), (40, 56), (80, 60)),
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


def luma(rgb: NDArray) -> NDArray:
    """ITU-R 601-2 in the 16-bit fixed point of Pillow."""
    return ((rgb.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16).astype(np.uint8)


def grey(plane: NDArray) -> NDArray:
    return np.repeat(plane[..., None], 3, axis=2)


def pictures_and_colours() -> dict[str, tuple[Image.Image, NDArray]]:
    """A picture of each mode, and its colours."""
    generator = np.random.default_rng(3)
    palette, ink = generator.integers(0, 256, (256, 3), np.uint8), generator.integers(0, 256, (24, 24, 3), np.uint8)
    deep, no_black = generator.integers(0, 1 << 16, (24, 24)), np.zeros((24, 24, 1), np.uint8)
    plain = {mode: noise(24, 24, mode) for mode in ("L", "RGB", "RGBA", "LA")}
    values = {mode: np.asarray(picture) for mode, picture in plain.items()}
    two, indexed = plain["L"].convert("1"), plain["L"].copy()
    indexed.putpalette(palette.tobytes())
    return {
        "L": (plain["L"], grey(values["L"])),
        "RGB": (plain["RGB"], values["RGB"]),
        "RGBA": (plain["RGBA"], values["RGBA"][..., :3]),
        "LA": (plain["LA"], grey(values["LA"][..., 0])),
        "P": (indexed, palette[values["L"]]),
        "CMYK": (Image.frombytes("CMYK", (24, 24), np.concatenate([ink, no_black], axis=2).tobytes()), 255 - ink),
        "1": (two, grey(np.asarray(two) * np.uint8(255))),
        "16-bit": (Image.fromarray(deep.astype("<u2")), grey((deep // 256).astype(np.uint8))),
        "16-bit-in-32": (Image.fromarray(deep.astype("<i4")), grey((deep // 256).astype(np.uint8))),
    }


MODES = pictures_and_colours()


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    picture, colours = MODES[mode]
    before = (picture.tobytes(), picture.mode, picture.size)
    assert np.array_equal(square(24, 24).pixels(picture), colours)
    expected = colours[..., 0] if (colours == colours[..., :1]).all() else luma(colours)
    assert np.array_equal(square(24, 24, "L").pixels(picture)[..., 0], expected)
    assert (picture.tobytes(), picture.mode, picture.size) == before


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 40000, 65535]])
    for dtype in ("<u2", ">u2", "<i4"):
        assert np.asarray(eight_bits(Image.fromarray(values.astype(dtype)))).tolist() == [[0, 0, 1, 156, 255]]
    assert np.asarray(eight_bits(Image.fromarray(np.array([[-9, 70000]], np.int32)))).tolist() == [[0, 255]]


UNFIT = {
    **{mode: (mode, (24, 24), f"8 or 16 bits per channel, got Pillow's mode {mode}") for mode in ("F", "LAB")},
    "tall": ("RGB", (1, 60_000), "at most 200 times as long as wide, got"),  # before it is scaled
    "wide": ("RGB", (60_000, 1), "at most 200 times as long as wide, got"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_pictures_without_a_fixed_range_or_of_extreme_proportions_are_refused(case: str) -> None:
    mode, size, expected = UNFIT[case]
    with pytest.raises(ValueError, match=expected):
        square(256, 224).pixels(Image.new(mode, size))


@pytest.mark.parametrize("mode", STATISTICS)
def test_batches_are_contiguous_float32_in_nchw(mode: str) -> None:
    preprocessing = Preprocessing((20, 28), (24, 32), *STATISTICS[mode])
    pictures = [noise(40, 30), noise(30, 40), noise(9, 9, "L"), noise(28, 20, "RGBA")]
    batch = preprocessing(pictures)
    assert (batch.shape, batch.dtype) == ((4, preprocessing.channels, 20, 28), np.float32)
    assert batch.flags.c_contiguous
    for index, picture in enumerate(pictures):
        assert np.array_equal(batch[index], preprocessing([picture])[0])


def test_json_says_every_step_and_comes_back() -> None:
    record = square(36, 32, "L").to_json()
    assert record == {
        **{"colour": "grey", "resize": [36, 36], "size": [32, 32], "mean": [0.45], "std": [0.226]},
        **{"interpolation": "bilinear", "scale": "x / 255", "layout": "NCHW"},
    }
    oblong = Preprocessing((20, 28), (24, 32), (0.1, 0.2, 0.3), (1.0, 0.25, 1 / 3))
    for preprocessing in (square(36, 32, "L"), square(256, 224), oblong):
        assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


def refusal(record: object) -> str:
    with pytest.raises(ValueError) as caught:
        Preprocessing.from_json(record)
    message = str(caught.value)
    assert "preprocessing" in message and "\n" not in message and len(message) < 800
    return message


@pytest.mark.parametrize("record", [None, "resnet", [1, 2], {}], ids=repr)
def test_other_things_are_refused(record: object) -> None:
    assert f"got {record!r}" in refusal(record)


# changes to a sound record
MALFORMED: tuple[dict[str, object], ...] = (
    {"rotate": 90}, {"interpolation": "bicubic"}, {"layout": "NHWC"}, {"scale": "x / 127.5"}, {"colour": "BGR"},
    {"colour": "grey"}, {"size": 224}, {"size": [3, 224, 224]}, {"size": ["224", "224"]}, {"size": [223.5, 224]},
    {"size": [math.nan, 224]}, {"resize": [math.inf, 256]}, {"size": [0, 0]}, {"size": [224, 257]}, {"size": None},
    {"mean": 0.5}, {"mean": "abc"}, {"mean": ["0.5", "0.5", "0.5"]}, {"mean": [0.5, math.nan, 0.5]},
    {"mean": [0.5, 0.5, -math.inf]}, {"mean": [1e300, 0.5, 0.5]}, {"mean": [10**400, 0.5, 0.5]}, {"mean": [0.5]},
    {"mean": [0.5, 0.5], "std": [1.0, 1.0]}, {"mean": [], "std": []}, {"std": [0.2, 0.0, 0.2]},
    {"std": [0.2, -0.2, 0.2]}, {"std": [0.2, 0.2, math.nan]}, {"std": [0.2, 1e-300, 0.2]},
)  # fmt: skip


@pytest.mark.parametrize("change", MALFORMED, ids=lambda change: repr(change)[1:40])
def test_malformed_records_are_refused(change: dict[str, object]) -> None:
    refusal(square(256, 224).to_json() | change)


@pytest.mark.parametrize("key", square(8, 8).to_json())
def test_records_with_a_missing_key_are_refused(key: str) -> None:
    record = square(256, 224).to_json()
    assert Preprocessing.from_json(record) == square(256, 224)
    del record[key]
    refusal(record)


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
