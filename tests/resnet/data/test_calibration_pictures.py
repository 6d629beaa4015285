"""Pictures to calibrate on: which are taken, which are left out, and that they become what the network takes."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnet.data import calibration_pictures
from resnet.data.calibration_pictures import PictureInputs, open_calibration
from resnet.data.labelled import DataError
from resnet.data.preprocessing import Preprocessing, open_picture
from resnet.data.sources import open_splits
from tests.resnet import checks
from tests.resnet.data.test_sources import (
    cifar_members,
    cifar_pictures,
    pixels,
    write_archive,
    write_folder,
    write_pictures,
)

PLAIN = Preprocessing((6, 6), (6, 6), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = Preprocessing((8, 8), (8, 8), (0.5,), (0.5,))


def names(inputs: PictureInputs, root: Path) -> list[str]:
    assert isinstance(inputs.pictures, tuple)
    return [str(path.relative_to(root)) for path in inputs.pictures]


def refusal(source: Path | str, measured: Collection[Path] = ()) -> str:
    return checks.refusal(DataError, open_calibration, str(source), PLAIN, measured)


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_of_a_folder_what_is_a_picture_by_its_name_is_taken_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At any depth, and without a word on what else there is: hidden, no file, no picture."""
    root = write_pictures(tmp_path / ".hidden above" / "pictures", 1)
    write_pictures(root / "cat" / "small" / "brown", 2)
    for name in ("b.JPG", "c.webp", "d.tiff"):
        Image.open(root / "000.png").save(root / "cat" / name)
    write_pictures(root / ".thumbnails", 1)
    write_pictures(root / "a" / ".cache" / "b", 1)
    for name in ("._000.png", "notes.txt", "labels.csv", "png", "model.onnx"):
        (root / name).write_text("x")
    (root / "folder.png").mkdir()
    (root / "link.png").symlink_to(root / "gone.png")
    os.mkfifo(root / "pipe.png")  # which must not be waited for
    brown = [f"cat/small/brown/{name}" for name in ("000.png", "001.png")]
    found = names(open_calibration(str(root), PLAIN), root)
    assert found == ["000.png", "cat/b.JPG", "cat/c.webp", "cat/d.tiff", *brown] and not said(caplog)


def test_what_cannot_be_read_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, 5, size=(40, 40))
    os.truncate(tmp_path / "001.png", 99)
    Image.new("RGB", (1, 2000)).save(tmp_path / "003.png")
    found = open_calibration(str(tmp_path), PLAIN)
    assert names(found, tmp_path) == ["000.png", "002.png", "004.png"] and len(found) == 3
    truncated, extreme, last = said(caplog)
    assert truncated.startswith(f"left out: {tmp_path / '001.png'}: expected a picture (") and "\n" not in truncated
    assert extreme.startswith(f"left out: {tmp_path / '003.png'}: expected a picture at most 200")
    assert last == f"{tmp_path}: left out 2 of 5 pictures"


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_pictures_are_read_once_where_there_is_room_for_them(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, 3, size=(40, 40))
    for preprocessing in (PLAIN, GREY, replace(PLAIN, as_bytes=True)):
        expected = preprocessing([Image.open(tmp_path / f"{i:03}.png") for i in range(3)])
        monkeypatch.setattr(calibration_pictures, "_MOST_KEPT", kept * math.prod(preprocessing.shape))
        inputs = open_calibration(str(tmp_path), preprocessing)
        read = Mock(side_effect=open_picture)
        with monkeypatch.context() as patch:
            patch.setattr(calibration_pictures, "open_picture", read)
            for _ in range(2):  # the same in every call
                first, second = inputs.batches(2)
                np.testing.assert_array_equal(first, expected[:2], strict=True)
                np.testing.assert_array_equal(second, expected[2:], strict=True)
        assert read.call_count == 2 * (3 - kept)


@pytest.mark.parametrize("count", [1, 511, 512, 1100])
def test_of_many_pictures_some_from_all_over_are_taken(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sorted by class, the first 512 would be of a few classes only."""
    source, folder = write_pictures(tmp_path / "source", 1) / "000.png", tmp_path / "pictures"
    folder.mkdir()
    for i in range(count):
        os.link(source, folder / f"{i:04}.png")
    with caplog.at_level(logging.INFO, logger="resnet.data.calibration_pictures"):
        found = open_calibration(str(folder), PLAIN)
    numbers = [int(Path(name).stem) for name in names(found, folder)]
    assert len(found) == len(numbers) == min(count, 512) and (numbers[0], numbers[-1]) == (0, count - 1)
    assert {after - before for before, after in itertools.pairwise(numbers)} <= ({2, 3} if count > 512 else {1})
    less = [f"{folder}: calibrating on 512 of 1100 pictures"] if count > 512 else []
    assert said(caplog, logging.INFO) == less and not said(caplog)


def test_pictures_that_accuracy_is_measured_on_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However they are called: by another path, or by a link."""
    write_pictures(tmp_path / "a", 4)
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "a" / "001.png")
    measured = [tmp_path / "a" / ".." / "a" / "001.png", tmp_path / "a" / "003.png", tmp_path / "elsewhere.png"]
    found = open_calibration(str(tmp_path), PLAIN, measured)
    assert names(found, tmp_path) == ["a/000.png", "a/002.png"]
    assert said(caplog) == [f"{tmp_path}: left out 3 pictures that accuracy is measured on"]
    message = refusal(tmp_path, measured=list((tmp_path / "a").iterdir()))
    assert message.startswith(f"{tmp_path}: expected pictures to calibrate on")


def test_a_source_without_a_readable_picture_is_refused(tmp_path: Path) -> None:
    assert "expected pictures to calibrate on (.bmp, " in refusal(tmp_path)
    assert refusal(tmp_path).endswith("got 0, none readable")
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("x")
    assert refusal(tmp_path).startswith(f"{tmp_path}: ") and refusal(tmp_path).endswith("got 3, none readable")
    for name in ("nowhere", "digit", "cifar10"):
        expected = f"{tmp_path / name}: expected a folder of pictures to calibrate on (no such folder)"
        assert refusal(tmp_path / name) == expected
    picture = write_pictures(tmp_path / "sound", 1) / "000.png"
    assert refusal(picture).startswith(f"{picture}: expected ")


def rows(pictures: NDArray[np.uint8]) -> set[bytes]:
    return {picture.tobytes() for picture in pictures}


def test_of_the_digits_only_those_to_train_on_are_taken() -> None:
    found, splits = open_calibration("digits", GREY), open_splits("digits")
    assert isinstance(found.pictures, np.ndarray) and len(found) == 512
    assert np.array_equal(found.pictures, pixels(splits.train)[np.linspace(0, 1294, 512).astype(int)])
    assert not rows(found.pictures) & (rows(pixels(splits.test)) | rows(pixels(splits.validation)))
    expected = GREY([Image.fromarray(picture) for picture in found.pictures])
    np.testing.assert_array_equal(np.concatenate(list(found.batches(100))), expected)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "folder"])
def test_of_cifar_only_pictures_to_train_on_are_taken(archive: bool, tmp_path: Path) -> None:
    members = cifar_members("cifar10", "binary")
    if archive:
        source = write_archive(tmp_path / "cifar-10-binary.tar.gz", members)
    else:
        source = write_folder(tmp_path / "data" / "cifar-10-batches-bin", members).parent
        write_pictures(source, 1)  # beside them, and none of them
    found = open_calibration(str(source), PLAIN)
    _, pictures = cifar_pictures("cifar10")
    assert isinstance(found.pictures, np.ndarray) and len(found) == 20  # of 30, one of each class validates
    assert rows(found.pictures) < rows(pictures[:30]) and not rows(found.pictures) & rows(pictures[30:])
