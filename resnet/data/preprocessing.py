"""From a picture to the input of a network: one description for training, evaluation and the device.

The steps and their rounding are those of torchvision's evaluation transforms (Resize, CenterCrop, ToTensor,
Normalize), on which published weights were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet.errors import ResNetError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_COLOURS = {1: "grey", 3: "RGB"}
_MODES = {1: "L", 3: "RGB"}  # Pillow's names of the same
_LARGEST = 1e6  # deviations are above its inverse; NaN and Inf fail the comparison too
MOST_PIXELS = 2**15  # of a side
_LONGEST = 200  # what lies outside the middle is scaled too, in memory
_FIXED = {"scale": "x / 255", "layout": "NCHW"}
# Each averages over all that a pixel of the smaller picture covers, but for the nearest pixel, which stands for it.
INTERPOLATIONS = {kind.name.lower(): kind for kind in Image.Resampling}


@dataclass(frozen=True)
class Preprocessing:
    """Scale a picture, cut `size` from its middle, then (x / 255 - mean) / std.

    What is so described is the whole way; the last step is left to the network's file where that takes bytes.

    Attributes:
        size: height and width of the input in pixels.
        resize: height and width that the scaled picture covers, touching in one of them, or has; at least `size`.
        mean: per channel: one for grey pictures, three for RGB.
        std: per channel, above 0, and like the means within what float32 inputs can show.
        interpolation: a key of INTERPOLATIONS, as Pillow computes it.
        keep_aspect: whether the scaled picture has the proportions of the given one and covers `resize`; else it has
            that size.
        as_bytes: whether inputs are bytes [N, H, W, C], to be normalised behind; no part of the description.

    Raises:
        ResNetError: values that describe no preprocessing.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    keep_aspect: bool = True
    as_bytes: bool = False

    def __post_init__(self) -> None:
        if min(self.size) < 1 or any(r < s for r, s in zip(self.resize, self.size, strict=True)):
            raise ResNetError(f"expected a size of at least 1x1 and a resize that covers it, "
                f"got size {self.size} and resize {self.resize}")  # fmt: skip
        if max(self.resize) > MOST_PIXELS:
            raise ResNetError(f"expected sizes of at most {MOST_PIXELS} pixels, got {self.resize}")
        if len(self.mean) not in _COLOURS or len(self.std) != len(self.mean):
            raise ResNetError(f"expected mean and std of 1 or 3 channels, got {self.mean} and {self.std}")
        sound = all(abs(m) < _LARGEST for m in self.mean) and all(1 / _LARGEST < s < _LARGEST for s in self.std)
        if not sound:
            raise ResNetError(f"expected finite means and positive deviations, got {self.mean} and {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ResNetError(f"expected an interpolation of {known}, got {self.interpolation!r:.80}")

    def __str__(self) -> str:
        """In one line, for a person."""
        (height, width), (cover_height, cover_width) = self.size, self.resize
        how = f"{self.interpolation}, {'averaging' if self.antialias else 'without averaging'} where it shrinks"
        cover = f"{cover_height}x{cover_width}"
        if not self.keep_aspect:
            scaled = f"scaled to {cover} whatever its proportions"
        elif cover_height == cover_width:
            scaled = f"shorter side scaled to {cover_height}"
        else:
            scaled = f"scaled until it covers {cover}"
        cut = "" if self.resize == self.size and not self.keep_aspect else f", middle {height}x{width} cut out"
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{_COLOURS[self.channels]}, {scaled} ({how}){cut}, mean {mean} and std {std} of x / 255"

    @property
    def antialias(self) -> bool:
        """Whether a picture that shrinks is averaged, as by Pillow, or sampled, as by OpenCV's INTER_LINEAR."""
        return self.interpolation != "nearest"

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an input: (C, H, W), or (H, W, C) of bytes."""
        height, width = self.size
        return (height, width, self.channels) if self.as_bytes else (self.channels, height, width)

    def at(self, size: tuple[int, int]) -> Preprocessing:
        """The same for inputs of another height and width, cut out of the same part of the picture."""
        scaled = [round(new * cover / old) for new, cover, old in zip(size, self.resize, self.size, strict=True)]
        return replace(self, size=size, resize=(max(scaled[0], size[0]), max(scaled[1], size[1])))

    def pixels(self, picture: Image.Image) -> NDArray[np.uint8]:
        """The scaled and cut picture, [H, W, C].

        Raises:
            ResNetError: a picture of extreme proportions, or one that `eight_bits` refuses.
        """
        picture = eight_bits(picture).convert(_MODES[self.channels])
        (height, width), (cover_height, cover_width) = self.size, self.resize
        # The side that touches gets its exact length, the other is rounded down.
        if not self.keep_aspect:
            scaled = (cover_width, cover_height)
        elif picture.width * cover_height <= picture.height * cover_width:
            scaled = (cover_width, cover_width * picture.height // picture.width)
        else:
            scaled = (cover_height * picture.width // picture.height, cover_height)
        if max(scaled) > _LONGEST * max(cover_height, cover_width):
            raise ResNetError(f"expected a picture at most {_LONGEST} times as long as wide, got {picture.size}")
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        if picture.size != scaled:
            # Rows first, then columns: at once, Pillow 13 begins with the columns where more of the height goes than
            # twice what goes of the width, and every version before it with the rows; the results differ by levels.
            # Columns outside the middle leave in between, as no other column's result depends on them.
            kind = INTERPOLATIONS[self.interpolation]
            rows = picture.resize((scaled[0], picture.height), kind).crop((left, 0, left + width, picture.height))
            picture, left = rows.resize((width, scaled[1]), kind), 0
        return np.asarray(picture.crop((left, top, left + width, top + height))).reshape(height, width, self.channels)

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, H, W, C] -> [N, C, H, W]: each of the 256 values of a byte is normalised once, and then looked up."""
        count, height, width, channels = pixels.shape
        normalised = np.empty((count, channels, height, width), np.float32)
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            table = (levels - np.float32(mean)) / np.float32(std)
            np.take(table, pixels[..., channel], out=normalised[:, channel], mode="clip")  # which does not buffer
        return normalised

    def __call__(self, pictures: Sequence[Image.Image]) -> NDArray:
        """Pictures of any size and mode -> inputs: [N, C, H, W] float32, or bytes [N, H, W, C]."""
        return self.of_pixels([self.pixels(picture) for picture in pictures])

    def of_pixels(self, scaled: Sequence[NDArray[np.uint8]]) -> NDArray:
        """The same of what `pixels` made of each."""
        pixels = np.stack(scaled)
        return pixels if self.as_bytes else self.normalise(pixels)

    def to_json(self) -> dict[str, Any]:
        return {
            "colour": _COLOURS[self.channels],
            "resize": list(self.resize),
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "keep_aspect": self.keep_aspect,
            **_FIXED,
        }

    @classmethod
    def from_json(cls, record: object) -> Preprocessing:
        """The inverse of `to_json`; a record need not say `antialias` and `keep_aspect`.

        Raises:
            ResNetError: not such a record, or one with steps that this version does not know.
        """
        if not isinstance(record, Mapping):
            raise ResNetError(f"expected the description of a preprocessing, got {record!r:.80}")
        try:
            (height, width), (cover_height, cover_width) = record["size"], record["resize"]
            size, resize = (int(height), int(width)), (int(cover_height), int(cover_width))
            mean, std = (tuple(float(value) for value in record[key]) for key in ("mean", "std"))
            keep_aspect = record.get("keep_aspect", True)
            description = cls(size, resize, mean, std, record["interpolation"], bool(keep_aspect))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ResNetError(f"expected the description of a preprocessing, got {record!r:.200} ({error})") from error
        if description.to_json() != {"antialias": description.antialias, "keep_aspect": keep_aspect, **record}:
            raise ResNetError(f"unknown steps in the preprocessing {record!r:.200}, expected {description.to_json()}")
        return description


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture from a file, with 8 bits per channel.

    Raises:
        ResNetError: the file is missing, is no picture or is cut short; names it.
    """
    if not Path(path).is_file():  # opening a pipe would wait for whoever writes to it
        raise ResNetError(f"{path}: expected a picture (no such file)")
    try:
        with Image.open(path) as picture:
            picture.load()
            return eight_bits(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ResNetError(f"{path}: expected a picture ({reason})") from error


def eight_bits(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits per channel: of 16-bit grey the upper ones, where Pillow's conversion would clip.

    Raises:
        ResNetError: a mode without a fixed range, or one that Pillow does not convert.
    """
    if picture.mode.startswith("I"):  # 32 bits are how older versions of Pillow open 16
        return Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    if picture.mode in ("F", "LAB"):
        raise ResNetError(f"expected a picture with 8 or 16 bits per channel, got Pillow's mode {picture.mode}")
    return picture


def imagenet_preprocessing(channels: int) -> Preprocessing | None:
    """What torchvision's first ImageNet weights expect at 224x224; None where pictures do not have so many channels.

    Args:
        channels: 3 for RGB; 1 for grey, with the average of the RGB statistics.
    """
    if channels not in _COLOURS:
        return None
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if channels == 1:
        return Preprocessing((224, 224), (256, 256), (sum(mean) / 3,), (sum(std) / 3,))
    return Preprocessing((224, 224), (256, 256), mean, std)
