"""Photographs as network inputs: parity is never checked on noise or zeros."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from export.base.normalisation import Normalisation

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_MODES = {1: "L", 3: "RGB"}  # Pillow's names


def photographs() -> list[Image.Image]:
    """The two photographs that come with scikit-learn, RGB, 640 x 427 pixels."""
    spec = importlib.util.find_spec("sklearn")  # its files without its modules, which take a second to import
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the photographs come with scikit-learn, not installed here: pip install scikit-learn", name="sklearn"
        )
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
