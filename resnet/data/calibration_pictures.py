"""Pictures to calibrate an 8-bit network on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
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
_MOST_KEPT = 2**26  # bytes: 445 pictures of 224x224, each of which would be read and scaled three times
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureInputs:
    """Pictures as one network takes them.

    Attributes:
        pictures: [N, H, W] or [N, H, W, 3], uint8; or the files they are read from when asked for.
        preprocessing: from a picture to an input.
        kept: file -> what `preprocessing` scaled and cut of it, of those that need not be read again.
    """

    pictures: NDArray[np.uint8] | tuple[Path, ...]
    preprocessing: Preprocessing
    kept: Mapping[Path, NDArray[np.uint8]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, size: int) -> Iterator[NDArray]:
        """All inputs in order, `size` at a time; no more than that is held in memory."""
        for start in range(0, len(self), size):
            yield self.preprocessing.of_pixels([self._pixels(p) for p in self.pictures[start : start + size]])

    def _pixels(self, picture: Path | NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not isinstance(picture, Path):
            return self.preprocessing.pixels(Image.fromarray(picture))
        return self.kept[picture] if picture in self.kept else self.preprocessing.pixels(open_picture(picture))


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
    readable, kept, held = list[Path](), dict[Path, NDArray[np.uint8]](), 0
    for file in chosen:
        pixels = _read(file, preprocessing)
        if pixels is None:
            continue
        readable.append(file)
        held += pixels.nbytes
        if held <= _MOST_KEPT:
            kept[file] = pixels
    if not readable:
        suffixes = ", ".join(PICTURE_SUFFIXES)
        raise DataError(f"{path}: expected pictures to calibrate on ({suffixes}), got {len(chosen)}, none readable")
    if len(readable) < len(chosen):
        _LOG.warning("%s: left out %d of %d pictures", path, len(chosen) - len(readable), len(chosen))
    if len(chosen) < len(files):
        _LOG.info("%s: calibrating on %d of %d pictures", path, len(readable), len(files))
    return PictureInputs(tuple(readable), preprocessing, kept)


def _spread(count: int) -> list[int]:
    """Indices from all over a source, which may be sorted by class."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, _MOST))] if count else []


def _read(file: Path, preprocessing: Preprocessing) -> NDArray[np.uint8] | None:
    """A picture, scaled and cut; None where it is none."""
    try:
        picture = open_picture(file)
    except ResNetError as error:  # which names the file
        _LOG.warning("left out: %s", error)
        return None
    try:
        return preprocessing.pixels(picture).copy()  # not a view of all that was scaled
    except ValueError as error:
        _LOG.warning("left out: %s: %s", file, error)
        return None
