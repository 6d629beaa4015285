"""Pictures with their classes, and the same as one network takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet.data.preprocessing import Preprocessing, open_picture
from resnet.errors import ResNetError


class DataError(ResNetError):
    """Data that cannot be used. The message is one line: what was given, what was expected."""


@dataclass(frozen=True)
class LabelledImages:
    """Pictures with their classes.

    Attributes:
        name: of the source: `digits`, `cifar10`, `cifar100` or the name of a folder.
        classes: what each label means.
        labels: [N], int64, indices into `classes`.
        pictures: [N, H, W] or [N, H, W, 3], uint8; or the files they are read from when asked for.
        mirrored: whether a picture seen in a mirror is known to show its class still.
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    pictures: NDArray[np.uint8] | tuple[Path, ...]
    mirrored: bool

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """One picture.

        Raises:
            DataError: its file cannot be read.
        """
        picture = self.pictures[index]
        if not isinstance(picture, Path):
            return Image.fromarray(picture)
        try:
            return open_picture(picture)
        except ResNetError as error:
            raise DataError(str(error)) from error

    def subset(self, indices: NDArray[np.int64]) -> LabelledImages:
        pictures = self.pictures
        chosen = pictures[indices] if isinstance(pictures, np.ndarray) else tuple(pictures[i] for i in indices)
        return replace(self, labels=self.labels[indices], pictures=chosen)

    def inputs(self, indices: Sequence[int], preprocessing: Preprocessing) -> NDArray:
        """The network's inputs for some of the pictures, as `preprocessing` makes them."""
        return preprocessing([self.picture(index) for index in indices])


@dataclass(frozen=True)
class LabelledInputs:
    """Labelled pictures as one network takes them."""

    pictures: LabelledImages
    preprocessing: Preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        return self.pictures.classes

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, size: int) -> Iterator[tuple[NDArray, NDArray]]:
        """Inputs and labels of all pictures in order, `size` at a time; no more than that is held in memory."""
        for start in range(0, len(self), size):
            indices = range(start, min(start + size, len(self)))
            yield self.pictures.inputs(indices, self.preprocessing), self.pictures.labels[start : start + size]


@dataclass(frozen=True)
class Splits:
    """What to fit, what to choose by, and what to report on: no picture is in two of them."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
