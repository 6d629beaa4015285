"""Photographs as network inputs: parity is never checked on noise or zeros."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from export.base.errors import ExportError
from export.base.normalisation import Normalisation
from export.runtime.bundle.golden import PICTURE_FILE, PICTURE_INPUT_FILE

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_MODES = {1: "L", 3: "RGB"}  # Pillow's names
_GOLDEN_SIDE = 1.5  # the golden picture's shorter side over the input's longer one: it has to shrink


class PicturePreprocessing(Protocol):
    """From pictures to inputs of one network."""

    def to_json(self) -> dict[str, Any]:
        """What it does; `mean` and `std` of it are by channel."""

    def __call__(self, pictures: Sequence[Image.Image]) -> NDArray:
        """Pictures -> inputs [N, C, H, W] float32, or bytes [N, H, W, C]."""


def photographs() -> list[Image.Image]:
    """The two photographs that come with scikit-learn, RGB, 640 x 427 pixels."""
    spec = importlib.util.find_spec("sklearn")  # its files without its modules, which take a second to import
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    folder = Path(spec.origin).parent / "datasets" / "images"
    return [Image.fromarray(np.asarray(Image.open(folder / name))) for name in ("china.jpg", "flower.jpg")]


def crops(
    images: Sequence[Image.Image],
    count: int,
    channels: int,
    size: tuple[int, int],
    seed: int = 0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """Random resized crops with random flips, taken from the images in turn.

    Args:
        images: RGB pictures of any size.
        count: how many crops.
        channels: 3 gives RGB, 1 grey, any other number repeats the colour planes.
        size: height and width of a crop in pixels.
        seed: the same seed gives the same crops.
        mean, std: of the normalisation (x / 255 - mean) / std: one each for RGB's planes, or one for all.

    Returns:
        [count, channels, height, width], float32.
    """
    normalise = Normalisation(*(tuple(np.broadcast_to(values, 3).tolist()) for values in (mean, std)))
    planes = normalise(_cut(images, count, size, seed))
    if channels == 1:
        planes = planes.mean(axis=1, keepdims=True)
    elif channels != 3:
        planes = planes[:, np.arange(channels) % 3]
    return torch.from_numpy(np.ascontiguousarray(planes))


def byte_crops(
    images: Sequence[Image.Image], count: int, channels: int, size: tuple[int, int], seed: int = 0
) -> Tensor:
    """The same crops as bytes [count, height, width, channels], of 1 or 3 channels: grey or RGB."""
    return torch.from_numpy(_cut([image.convert(_MODES[channels]) for image in images], count, size, seed))


def _cut(images: Sequence[Image.Image], count: int, size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """[count, height, width, bands of the images]."""
    generator = np.random.default_rng(seed)
    height, width = size
    batch = np.empty((count, height, width, len(images[0].getbands())), np.uint8)
    for i in range(count):
        image = images[i % len(images)]
        side = min(image.size) * float(np.sqrt(generator.uniform(0.1, 1.0)))
        crop_width, crop_height = (min(1.0, width / height) * side, min(1.0, height / width) * side)
        left = generator.uniform(0, image.width - crop_width)
        top = generator.uniform(0, image.height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        crop = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(crop).reshape(batch.shape[1:])
        batch[i] = pixels[:, ::-1] if generator.random() < 0.5 else pixels
    return batch


def golden_picture(preprocessing: PicturePreprocessing, inputs: NDArray) -> dict[str, bytes]:
    """A picture, and the input that it becomes, as files of a bundle: what an application tests its own steps on.

    It is a photograph, oblong and larger than the input, so that a picture that is sampled, not averaged, becomes
    another input; grey where the network's are.

    Args:
        preprocessing: from the picture to the input.
        inputs: [N, ...] of the network, of which the shape and type count.

    Raises:
        ExportError: what is made of the picture is no input of the network.
    """
    record = preprocessing.to_json()
    channels = len(record["mean"])
    height, width = inputs.shape[1:3] if inputs.dtype == np.uint8 else inputs.shape[2:4]
    photograph, side = photographs()[0], round(_GOLDEN_SIDE * max(height, width, *record.get("resize", ())))
    repeats = math.ceil(side / photograph.height)
    tiled = Image.fromarray(np.tile(np.asarray(photograph), (repeats, repeats, 1)))
    picture = tiled.resize((side * tiled.width // tiled.height, side), Image.Resampling.BICUBIC)
    picture = picture.convert(_MODES[channels])
    made = preprocessing([picture])
    if made.shape != (1, *inputs.shape[1:]) or made.dtype != inputs.dtype:
        raise ExportError(
            f"expected a preprocessing that makes inputs [N, *{list(inputs.shape[1:])}] {inputs.dtype}, "
            f"got {list(made.shape)} {made.dtype}"
        )
    files = {PICTURE_FILE: io.BytesIO(), PICTURE_INPUT_FILE: io.BytesIO()}
    picture.save(files[PICTURE_FILE], format="PNG")
    np.save(files[PICTURE_INPUT_FILE], made)
    return {name: stream.getvalue() for name, stream in files.items()}
