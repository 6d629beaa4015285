"""Photographs as network inputs: parity is never checked on noise or zeros."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def photographs() -> list[Image.Image]:
    """The two photographs that come with scikit-learn, RGB, 640 x 427 pixels."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


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
    generator = np.random.default_rng(seed)
    height, width = size
    batch = np.empty((count, height, width, 3), np.float32)
    for i in range(count):
        image = images[i % len(images)]
        side = min(image.size) * float(np.sqrt(generator.uniform(0.1, 1.0)))
        crop_width, crop_height = (min(1.0, width / height) * side, min(1.0, height / width) * side)
        left = generator.uniform(0, image.width - crop_width)
        top = generator.uniform(0, image.height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        crop = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(crop, np.float32) / 255
        batch[i] = pixels[:, ::-1] if generator.random() < 0.5 else pixels
    planes = ((batch - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(0, 3, 1, 2)
    if channels == 1:
        planes = planes.mean(axis=1, keepdims=True)
    elif channels != 3:
        planes = planes[:, np.arange(channels) % 3]
    return torch.from_numpy(np.ascontiguousarray(planes))
