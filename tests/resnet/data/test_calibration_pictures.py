"""Pictures to calibrate on: which are taken, which are left out, and that they become what the network takes."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnet.data.calibration_pictures import PictureInputs, open_calibration
from resnet.data.labelled import DataError
from resnet.data.preprocessing import Preprocessing
from resnet.data.sources import open_splits
from tests.resnet.data.test_sources import cifar_members, cifar_pictures, write_archive, write_folder, write_pictures

PLAIN = Preprocessing((6, 6), (6, 6), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
GREY = Preprocessing((8, 8), (8, 8), (0.5,), (0.5,))


def names(inputs: PictureInputs, root: Path) -> list[str]:
    assert isinstance(inputs.pictures, tuple)
    return [str(path.relative_to(root)) for path in inputs.pictures]


def refusal(source: Path | str, **arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        open_calibration(str(source), PLAIN, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# folders


def test_pictures_at_any_depth_are_taken_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path / "cat" / "small" / "brown", 2)
    write_pictures(tmp_path / "dog", 1)
    write_pictures(tmp_path, 1)
    found = names(open_calibration(str(tmp_path), PLAIN), tmp_path)
    assert found == ["000.png", "cat/small/brown/000.png", "cat/small/brown/001.png", "dog/000.png"]
    assert not said(caplog)


def test_only_what_is_a_picture_by_its_name_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, 1)
    picture = Image.open(tmp_path / "000.png")
    for name in ("b.JPG", "c.webp", "d.tiff"):
        picture.save(tmp_path / name)
    for name in ("notes.txt", "labels.csv", "png", "model.onnx"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert names(open_calibration(str(tmp_path), PLAIN), tmp_path) == ["000.png", "b.JPG", "c.webp", "d.tiff"]
    assert not said(caplog)


def test_hidden_files_and_folders_are_left_out_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / ".hidden above" / "pictures"
    write_pictures(root, 1)
    write_pictures(root / ".thumbnails", 1)
    write_pictures(root / "a" / ".cache" / "b", 1)
    (root / "._000.png").write_text("resource fork")
    assert names(open_calibration(str(root), PLAIN), root) == ["000.png"]
    assert not said(caplog)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BROKEN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("<html>"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": cut,
    "a mode without a range": lambda path: Image.new("F", (8, 8)).save(path, "tiff"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_left_out_by_name(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, 4, size=(40, 40))
    BROKEN[case](tmp_path / "002.png")
    found = open_calibration(str(tmp_path), PLAIN)
    assert names(found, tmp_path) == ["000.png", "001.png", "003.png"] and len(found) == 3
    first, last = said(caplog)
    assert first.startswith(f"left out: {tmp_path / '002.png'}: expected a picture (") and "\n" not in first
    assert last == f"{tmp_path}: left out 1 of 4 pictures"
    assert np.isfinite(np.concatenate(list(found.batches(2)))).all()


def test_a_picture_of_extreme_proportions_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, 2)
    Image.new("RGB", (1, 2000)).save(tmp_path / "line.png")
    assert names(open_calibration(str(tmp_path), PLAIN), tmp_path) == ["000.png", "001.png"]
    assert said(caplog)[-1] == f"{tmp_path}: left out 1 of 3 pictures"


def test_a_picture_of_extreme_proportions_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, 2)
    Image.new("RGB", (1, 2000)).save(tmp_path / "line.png")
    open_calibration(str(tmp_path), PLAIN)
    assert str(tmp_path / "line.png") in said(caplog)[0]


def test_a_pipe_called_a_picture_is_not_waited_for(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    os.mkfifo(tmp_path / "x.png")
    assert names(open_calibration(str(tmp_path), PLAIN), tmp_path) == ["000.png"]


def test_a_link_to_nowhere_is_no_picture(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "x.png").symlink_to(tmp_path / "gone.png")
    assert names(open_calibration(str(tmp_path), PLAIN), tmp_path) == ["000.png"]


def test_of_many_pictures_some_from_all_over_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sorted by class, the first 512 would be of a few classes only."""
    content = (write_pictures(tmp_path / "source", 1) / "000.png").read_bytes()
    for i in range(1100):
        folder = tmp_path / "pictures" / f"class{i // 110}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04}.png").write_bytes(content)
    with caplog.at_level(logging.INFO, logger="resnet.data.calibration_pictures"):
        found = open_calibration(str(tmp_path / "pictures"), PLAIN)
    assert isinstance(found.pictures, tuple) and len(found) == len(set(found.pictures)) == 512
    numbers = [int(path.stem) for path in found.pictures]
    assert numbers[0] == 0 and numbers[-1] == 1099
    assert {after - before for before, after in itertools.pairwise(numbers)} == {2, 3}
    assert said(caplog, logging.INFO) == [f"{tmp_path / 'pictures'}: calibrating on 512 of 1100 pictures"]
    assert not said(caplog)


@pytest.mark.parametrize("count", [1, 2, 511, 512])
def test_up_to_512_pictures_are_all_taken(count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = (write_pictures(tmp_path / "source", 1) / "000.png").read_bytes()
    (tmp_path / "pictures").mkdir()
    for i in range(count):
        (tmp_path / "pictures" / f"{i:04}.png").write_bytes(content)
    assert len(open_calibration(str(tmp_path / "pictures"), PLAIN)) == count and not said(caplog)


def test_pictures_that_accuracy_is_measured_on_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However they are called: by another path, or by a link."""
    write_pictures(tmp_path / "a", 4)
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "a" / "001.png")
    measured = [tmp_path / "a" / ".." / "a" / "001.png", tmp_path / "a" / "003.png", tmp_path / "elsewhere.png"]
    found = open_calibration(str(tmp_path), PLAIN, measured)
    assert names(found, tmp_path) == ["a/000.png", "a/002.png"]
    assert said(caplog) == [f"{tmp_path}: left out 3 pictures that accuracy is measured on"]


# what is refused


def test_a_folder_without_a_readable_picture_is_refused(tmp_path: Path) -> None:
    assert "expected pictures to calibrate on (.bmp, " in refusal(tmp_path)
    assert refusal(tmp_path).endswith("got 0, none readable")
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("x")
    assert refusal(tmp_path).startswith(f"{tmp_path}: ") and refusal(tmp_path).endswith("got 3, none readable")


def test_a_folder_of_measured_pictures_alone_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    message = refusal(tmp_path, measured=list(tmp_path.iterdir()))
    assert message.startswith(f"{tmp_path}: expected pictures to calibrate on")


@pytest.mark.parametrize("name", ["nowhere", "digit", "cifar10"])
def test_a_missing_folder_is_refused(name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    assert refusal(source) == f"{source}: expected a folder of pictures to calibrate on (no such folder)"


def test_a_single_picture_is_refused(tmp_path: Path) -> None:
    path = write_pictures(tmp_path, 1) / "000.png"
    assert refusal(path).startswith(f"{path}: expected ")


# data sets


def rows(pictures: NDArray[np.uint8]) -> set[bytes]:
    return {picture.tobytes() for picture in pictures}


def test_of_the_digits_only_those_to_train_on_are_taken() -> None:
    found = open_calibration("digits", GREY)
    splits = open_splits("digits")
    assert isinstance(found.pictures, np.ndarray) and len(found) == 512
    assert np.array_equal(found.pictures, splits.train.pictures[np.linspace(0, 1294, 512).astype(int)])
    assert not rows(found.pictures) & (rows(splits.test.pictures) | rows(splits.validation.pictures))


@pytest.mark.parametrize("layout", ["archive", "folder", "folder around"])
def test_of_cifar_only_pictures_to_train_on_are_taken(layout: str, tmp_path: Path) -> None:
    members = cifar_members("cifar10", "binary")
    if layout == "archive":
        source = write_archive(tmp_path / "cifar-10-binary.tar.gz", members)
    else:
        source = write_folder(tmp_path / "data" / "cifar-10-batches-bin", members)
        source = source.parent if layout == "folder around" else source
        write_pictures(source, 1)  # beside them, and none of them
    found = open_calibration(str(source), PLAIN)
    _, pictures = cifar_pictures("cifar10")
    assert isinstance(found.pictures, np.ndarray) and len(found) == 20  # of 30, one of each class validates
    assert rows(found.pictures) < rows(pictures[:30]) and not rows(found.pictures) & rows(pictures[30:])


# batches


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_are_what_the_preprocessing_makes(size: int, tmp_path: Path) -> None:
    write_pictures(tmp_path, 7, size=(9, 7))
    found = open_calibration(str(tmp_path), PLAIN)
    expected = PLAIN([Image.open(path) for path in sorted(tmp_path.iterdir())])
    batches = list(found.batches(size))
    assert [len(batch) for batch in batches] == [min(size, 7 - start) for start in range(0, 7, size)]
    assert batches[0].dtype == np.float32 and batches[0].shape[1:] == (3, 6, 6)
    np.testing.assert_array_equal(np.concatenate(batches), expected)
    np.testing.assert_array_equal(np.concatenate(list(found.batches(size))), expected)  # the same in every call


def test_batches_of_arrays_are_what_the_preprocessing_makes() -> None:
    found = open_calibration("digits", GREY)
    assert isinstance(found.pictures, np.ndarray)
    expected = GREY([Image.fromarray(picture) for picture in found.pictures])
    np.testing.assert_array_equal(np.concatenate(list(found.batches(100))), expected)


def test_grey_and_colour_pictures_become_what_the_network_takes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "grey", 2, mode="L")
    write_pictures(tmp_path / "colour", 2)
    for preprocessing, channels in ((PLAIN, 3), (GREY, 1)):
        (batch,) = open_calibration(str(tmp_path), preprocessing).batches(8)
        assert batch.shape == (4, channels, *preprocessing.size) and np.isfinite(batch).all()
