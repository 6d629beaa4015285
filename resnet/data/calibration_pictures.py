"""Pictures to calibrate an 8-bit network on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet.data.cifar import open_cifar
from resnet.data.files import PICTURE_SUFFIXES, pictures_in
from resnet.data.labelled import DataError
from resnet.data.preprocessing import Preprocessing, open_picture
from resnet.data.sources import open_splits
from resnet.errors import ResNetError

_MOST = 512  # more cost time and change little
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureInputs:
    """Pictures as one network takes them.

    Attributes:
        pictures: [N, H, W] or [N, H, W, 3], uint8; or the files they are read from when asked for.
        preprocessing: from a picture to an input.
    """

    pictures: NDArray[np.uint8] | tuple[Path, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, size: int) -> Iterator[NDArray]:
        """All inputs in order, `size` at a time; no more than that is held in memory."""
        for start in range(0, len(self), size):
            chosen = self.pictures[start : start + size]
            yield self.preprocessing([open_picture(p) if isinstance(p, Path) else Image.fromarray(p) for p in chosen])


def open_calibration(source: str, preprocessing: Preprocessing, measured: Collection[Path] = ()) -> PictureInputs:
    """Up to 512 pictures from all over a source.

    Of the digits and of CIFAR they are from what there is to train on; of a folder, from all files in it, at whatever
    depth, that are pictures by their names. Those that cannot be read are left out and named in the log.

    Args:
        source: `digits`, an archive of CIFAR, packed or unpacked, or a folder.
        preprocessing: of the network.
        measured: files that accuracy is measured on; they are left out.

    Raises:
        DataError: not such a source, or without a picture that can be read.
    """
    path = Path(source)
    if source == "digits" or path.is_file() or (path.is_dir() and open_cifar(path)):
        pictures = open_splits(source).train.pictures
        assert isinstance(pictures, np.ndarray)
        return PictureInputs(pictures[_spread(len(pictures))], preprocessing)
    if not path.is_dir():
        raise DataError(f"{source}: expected a folder of pictures to calibrate on (no such folder)")
    found = pictures_in(path)
    excluded = {file.resolve() for file in measured}
    files = [file for file in found if file.resolve() not in excluded]
    if len(files) < len(found):
        _LOG.warning("%s: left out %d pictures that accuracy is measured on", path, len(found) - len(files))
    chosen = [files[index] for index in _spread(len(files))]
    readable = [file for file in chosen if _readable(file, preprocessing)]
    if not readable:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise DataError(f"{path}: expected pictures to calibrate on ({suffixes}), got {len(chosen)}, none readable")
    if len(readable) < len(chosen):
        _LOG.warning("%s: left out %d of %d pictures", path, len(chosen) - len(readable), len(chosen))
    if len(chosen) < len(files):
        _LOG.info("%s: calibrating on %d of %d pictures", path, len(readable), len(files))
    return PictureInputs(tuple(readable), preprocessing)


def _spread(count: int) -> list[int]:
    """Indices from all over a source, which may be sorted by class."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, _MOST))] if count else []


def _readable(file: Path, preprocessing: Preprocessing) -> bool:
    try:
        picture = open_picture(file)
    except ResNetError as error:  # which names the file
        _LOG.warning("left out: %s", error)
        return False
    try:
        preprocessing.pixels(picture)
    except ValueError as error:
        _LOG.warning("left out: %s: %s", file, error)
        return False
    return True
