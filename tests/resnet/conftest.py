"""What the tests of this room share: crops of real photographs as images."""

import math

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Photographs:
    """Random resized crops (area 0.2 to 1, aspect 3/4 to 4/3) and flips of photographs, normalised."""

    def __init__(self) -> None:
        photos = load_sample_images().images
        self.photos = [torch.tensor(photo).permute(2, 0, 1).float() / 255 for photo in photos]

    def crops(self, count: int, size: int, seed: int) -> Tensor:
        """float32 [count, 3, size, size], taken from the photographs in turn; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        images = []
        for index in range(count):
            photo = self.photos[index % len(self.photos)]
            _, height, width = photo.shape
            area = height * width * uniform(0.2, 1.0)
            aspect = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
            h, w = min(height, round(math.sqrt(area / aspect))), min(width, round(math.sqrt(area * aspect)))
            top, left = int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1))
            crop = photo[:, top : top + h, left : left + w]
            crop = crop.flip(2) if uniform(0, 1) < 0.5 else crop
            resized = functional.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)
            images.append((resized[0] - MEAN) / STD)
        return torch.stack(images)


@pytest.fixture(scope="session")
def photographs() -> Photographs:
    return Photographs()
