"""The normalisation of pictures: done by whoever feeds a network, or in the network's file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Inputs
from export.base.errors import ExportError

SCALE = 255
CHANNELS = (1, 3)  # grey, RGB
_STEP = f"x / {SCALE}"


@dataclass(frozen=True)
class Normalisation:
    """(x / 255 - mean) / std of bytes, by channel; every step is rounded to float32.

    Attributes:
        mean: one value for grey pictures, three for RGB; finite.
        std: as many, normal numbers of float32 above 0.

    Raises:
        ExportError: other values.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) not in CHANNELS or len(self.std) != len(self.mean):
            raise ExportError(f"expected mean and std of 1 or 3 channels, got {self.mean} and {self.std}")
        limits = np.finfo(np.float32)
        if not all(math.isfinite(m) for m in self.mean) or not all(limits.tiny <= s <= limits.max for s in self.std):
            raise ExportError(f"expected finite means and positive deviations, got {self.mean} and {self.std}")

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, H, W, C] -> [N, C, H, W]: each of the 256 values of a byte is normalised once, and then looked up."""
        count, height, width, channels = pixels.shape
        normalised = np.empty((count, channels, height, width), np.float32)
        levels = np.arange(SCALE + 1, dtype=np.float32) / np.float32(SCALE)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            table = (levels - np.float32(mean)) / np.float32(std)
            np.take(table, pixels[..., channel], out=normalised[:, channel], mode="clip")  # which does not buffer
        return normalised

    def of(self, inputs: Inputs) -> Arrays:
        """Of each of several inputs."""
        return {name: self(pixels) for name, pixels in inputs.items()}

    def to_json(self) -> dict[str, Any]:
        return {"scale": _STEP, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Normalisation:
        """From the description of a preprocessing, which may say more.

        Raises:
            ExportError: it has no mean and std, or another scale.
        """
        try:
            mean, std = (tuple(float(value) for value in record[name]) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ExportError(f"expected mean and std by channel, got {record!r:.200}") from error
        if record.get("scale", _STEP) != _STEP:
            raise ExportError(f"expected the scale {_STEP}, got {record['scale']!r:.80}")
        return cls(mean, std)
