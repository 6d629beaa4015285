"""Pictures to inputs, against the steps of torchvision's evaluation transforms restated with Pillow and PyTorch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, eight_bits, imagenet_preprocessing

ROOT = Path(__file__).resolve().parents[3]
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


# width x height of the pictures
PICTURES = {
    "landscape": (64, 48),
    "portrait": (48, 64),
    "square": (50, 50),
    "odd": (101, 37),
    "photograph": (640, 427),
    "exactly": (36, 36),
    "exactly-in-height": (55, 36),
    "one-more": (37, 37),
    "small": (20, 13),
    "small-portrait": (7, 11),
    "one-pixel": (1, 1),
    "1xN": (1, 150),
    "Nx1": (150, 1),
}


@pytest.mark.parametrize("mode", STATISTICS)
@pytest.mark.parametrize(("resize", "size"), [(36, 32), (37, 32), (39, 32), (36, 36)], ids=str)
@pytest.mark.parametrize("picture", PICTURES)
def test_equals_torchvision(picture, resize, size, mode):
    image = noise(*PICTURES[picture])
    (result,) = square(resize, size, mode)([image])
    assert torch.equal(torch.from_numpy(result), torchvision_eval(image, resize, size, mode))


@pytest.mark.parametrize("picture", ["landscape", "portrait", "photograph"])
def test_equals_torchvision_at_the_size_of_imagenet(picture):
    preprocessing, image = imagenet_preprocessing(3), noise(*PICTURES[picture])
    assert preprocessing is not None
    assert torch.equal(torch.from_numpy(preprocessing([image])[0]), torchvision_eval(image, 256, 224, "RGB"))


# picture (width, height), resize and size (height, width), scaled picture (width, height) whose middle is cut out
OBLONG = {
    "same-shape": ((120, 90), (60, 80), (40, 56), (80, 60)),
    "width-touches": ((100, 100), (30, 50), (30, 48), (50, 50)),
    "height-touches": ((100, 100), (50, 30), (45, 21), (50, 50)),
    "rounded-down": ((70, 99), (20, 40), (20, 40), (40, 56)),
    "enlarged": ((8, 8), (24, 10), (20, 9), (24, 24)),
}


@pytest.mark.parametrize("case", OBLONG)
def test_oblong_inputs(case):
    picture, resize, (height, width), scaled = OBLONG[case]
    expected = np.asarray(noise(*picture).resize(scaled, Image.Resampling.BILINEAR))
    top, left = round((scaled[1] - height) / 2.0), round((scaled[0] - width) / 2.0)
    result = Preprocessing((height, width), resize, *STATISTICS["RGB"]).pixels(noise(*picture))
    assert np.array_equal(result, expected[top : top + height, left : left + width])


def luma(rgb: NDArray) -> NDArray:
    """ITU-R 601-2 in the 16-bit fixed point of Pillow."""
    return ((rgb.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16).astype(np.uint8)


def grey(plane: NDArray) -> NDArray:
    return np.repeat(plane[..., None], 3, axis=2)


def palette_picture() -> tuple[Image.Image, NDArray]:
    colours = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8)
    picture = noise(24, 24, "L")
    indices = np.asarray(picture)
    picture.putpalette(colours.tobytes())
    return picture, colours[indices]


def cmyk_picture() -> tuple[Image.Image, NDArray]:
    ink = np.random.default_rng(4).integers(0, 256, (24, 24, 3), np.uint8)
    no_black = np.concatenate([ink, np.zeros((24, 24, 1), np.uint8)], axis=2)
    return Image.frombytes("CMYK", (24, 24), no_black.tobytes()), 255 - ink


def deep_picture(dtype: str) -> tuple[Image.Image, NDArray]:
    values = np.random.default_rng(5).integers(0, 1 << 16, (24, 24))
    return Image.fromarray(values.astype(dtype)), grey((values // 256).astype(np.uint8))


def bands(mode: str, colours: Callable[[NDArray], NDArray]) -> tuple[Image.Image, NDArray]:
    picture = noise(24, 24, mode)
    return picture, colours(np.asarray(picture))


# a picture of each mode, and its colours
MODES = {
    "L": lambda: bands("L", grey),
    "RGB": lambda: bands("RGB", lambda values: values),
    "RGBA": lambda: bands("RGBA", lambda values: values[..., :3]),
    "LA": lambda: bands("LA", lambda values: grey(values[..., 0])),
    "P": palette_picture,
    "CMYK": cmyk_picture,
    "1": lambda: (noise(24, 24, "L").convert("1"), grey(np.asarray(noise(24, 24, "L").convert("1")) * np.uint8(255))),
    "16-bit": lambda: deep_picture("<u2"),
    "16-bit-in-32": lambda: deep_picture("<i4"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    picture, colours = MODES[mode]()
    assert np.array_equal(square(24, 24).pixels(picture), colours)
    is_grey = (colours == colours[..., :1]).all()
    expected = colours[..., 0] if is_grey else luma(colours)
    assert np.array_equal(square(24, 24, "L").pixels(picture)[..., 0], expected)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 255, 256, 40000, 65535]])
    for dtype in ("<u2", ">u2", "<i4"):
        assert np.asarray(eight_bits(Image.fromarray(values.astype(dtype)))).tolist() == [[0, 0, 1, 156, 255]]
    assert np.asarray(eight_bits(Image.fromarray(np.array([[-9, 70000]], np.int32)))).tolist() == [[0, 255]]


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_modes_without_a_fixed_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"8 or 16 bits per channel, got Pillow's mode {mode}"):
        square(24, 24).pixels(Image.new(mode, (24, 24)))


@pytest.mark.parametrize("mode", STATISTICS)
def test_batches_are_contiguous_float32_in_nchw(mode):
    preprocessing = Preprocessing((20, 28), (24, 32), *STATISTICS[mode])
    pictures = [noise(40, 30), noise(30, 40), noise(9, 9, "L"), noise(28, 20, "RGBA")]
    batch = preprocessing(pictures)
    assert (batch.shape, batch.dtype) == ((4, preprocessing.channels, 20, 28), np.float32)
    assert batch.flags.c_contiguous
    for index, picture in enumerate(pictures):
        assert np.array_equal(batch[index], preprocessing([picture])[0])


@pytest.mark.parametrize("mode", STATISTICS)
def test_pictures_are_not_changed(mode):
    picture = noise(24, 24, mode)
    before = picture.tobytes()
    square(24, 24, mode)([picture])
    assert (picture.tobytes(), picture.mode, picture.size) == (before, mode, (24, 24))


PREPROCESSINGS = {
    "grey": square(8, 8, "L"),
    "rgb": square(256, 224),
    "oblong": Preprocessing((20, 28), (24, 32), (0.1, 0.2, 0.3), (1.0, 0.25, 1 / 3)),
}


@pytest.mark.parametrize("case", PREPROCESSINGS)
def test_json_round_trip(case):
    record = json.loads(json.dumps(PREPROCESSINGS[case].to_json()))
    assert Preprocessing.from_json(record) == PREPROCESSINGS[case]


def test_json_says_every_step():
    assert square(36, 32, "L").to_json() == {
        "colour": "grey",
        "resize": [36, 36],
        "size": [32, 32],
        "mean": [0.45],
        "std": [0.226],
        "interpolation": "bilinear",
        "scale": "x / 255",
        "layout": "NCHW",
    }


NO_RECORDS = {"nothing": None, "text": "resnet", "list": [1, 2], "empty": {}}

# changes to a sound record
MALFORMED = {
    "unknown-step": {"rotate": 90},
    "interpolation": {"interpolation": "bicubic"},
    "layout": {"layout": "NHWC"},
    "scale": {"scale": "x / 127.5"},
    "colour": {"colour": "BGR"},
    "colour-of-other-statistics": {"colour": "grey"},
    "size-number": {"size": 224},
    "size-of-three": {"size": [3, 224, 224]},
    "size-text": {"size": ["224", "224"]},
    "size-fraction": {"size": [223.5, 224]},
    "size-nan": {"size": [math.nan, 224]},
    "size-infinite": {"resize": [math.inf, 256]},
    "size-zero": {"size": [0, 0]},
    "size-above-resize": {"size": [224, 257]},
    "size-nothing": {"size": None},
    "mean-number": {"mean": 0.5},
    "mean-text": {"mean": "abc"},
    "mean-of-text": {"mean": ["0.5", "0.5", "0.5"]},
    "mean-nan": {"mean": [0.5, math.nan, 0.5]},
    "mean-infinite": {"mean": [0.5, 0.5, -math.inf]},
    "mean-beyond-float32": {"mean": [1e300, 0.5, 0.5]},
    "mean-beyond-float64": {"mean": [10**400, 0.5, 0.5]},
    "mean-of-one": {"mean": [0.5]},
    "mean-of-two": {"mean": [0.5, 0.5], "std": [1.0, 1.0]},
    "mean-of-none": {"mean": [], "std": []},
    "std-zero": {"std": [0.2, 0.0, 0.2]},
    "std-negative": {"std": [0.2, -0.2, 0.2]},
    "std-nan": {"std": [0.2, 0.2, math.nan]},
    "std-below-float32": {"std": [0.2, 1e-300, 0.2]},
}


def refusal(record: object) -> str:
    with pytest.raises(ValueError) as caught:
        Preprocessing.from_json(record)
    message = str(caught.value)
    assert "preprocessing" in message and "\n" not in message and len(message) < 800
    return message


@pytest.mark.parametrize("case", NO_RECORDS)
def test_other_things_are_refused(case):
    assert f"got {NO_RECORDS[case]!r}" in refusal(NO_RECORDS[case])


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_records_are_refused(case):
    record = square(256, 224).to_json()
    Preprocessing.from_json(record)
    refusal(record | MALFORMED[case])


@pytest.mark.parametrize("key", square(8, 8).to_json())
def test_records_with_a_missing_key_are_refused(key):
    record = square(256, 224).to_json()
    del record[key]
    refusal(record)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)], ids=["tall", "wide"])
def test_a_picture_of_extreme_proportions_is_refused_before_it_is_scaled(size):
    with pytest.raises(ValueError, match="at most 200 times as long as wide, got"):
        square(256, 224).pixels(Image.new("RGB", size))


def test_imagenet_values():
    rgb = Preprocessing((224, 224), (256, 256), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert imagenet_preprocessing(3) == rgb
    grey = imagenet_preprocessing(1)
    assert grey is not None and (grey.size, grey.resize) == ((224, 224), (256, 256))
    assert (grey.mean, grey.std) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    assert imagenet_preprocessing(4) is None


# a size, and what its pictures cover where those of 224x224 cover 256x256
OTHER_SIZES = {
    "same": ((224, 224), (256, 256)),
    "half": ((112, 112), (128, 128)),
    "larger": ((448, 448), (512, 512)),
    "oblong": ((112, 224), (128, 256)),
    "rounded": ((32, 65), (37, 74)),
    "tiny": ((1, 3), (1, 3)),
}


@pytest.mark.parametrize("case", OTHER_SIZES)
def test_other_sizes_show_the_same_part(case):
    size, resize = OTHER_SIZES[case]
    preprocessing = square(256, 224)
    assert preprocessing.at(size) == Preprocessing(size, resize, preprocessing.mean, preprocessing.std)


def test_needs_no_pytorch():
    script = """
import sys
sys.modules["torch"] = None  # importing it is an ImportError now
import numpy as np
import resnet.data.sources, resnet.data.labelled
pixels = np.zeros((2, 8, 8), np.uint8)
data = resnet.data.labelled.LabelledImages("two", ("a", "b"), np.arange(2), pixels, mirrored=False)
preprocessing = resnet.data.sources.suggest_preprocessing(data, (8, 8))
print(data.inputs([0, 1], preprocessing).shape)
try:
    import torch
except ImportError:
    print("blocked")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "(2, 1, 8, 8)\nblocked\n"), result.stderr
