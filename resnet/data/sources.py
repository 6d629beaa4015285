"""Labelled pictures to train on and to measure with.

A source is `digits`, the archive of CIFAR-10 or CIFAR-100 (as downloaded or unpacked), or a folder of class folders.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from resnet.data.cifar import open_cifar
from resnet.data.files import PICTURE_SUFFIXES, is_hidden, is_picture, visible_folders
from resnet.data.labelled import DataError, LabelledImages, Splits
from resnet.data.preprocessing import Preprocessing, imagenet_preprocessing

_LOG = logging.getLogger(__name__)

_TEST_SHARE = 0.2  # of a source that comes without a test part
_VALIDATION_SHARE = 0.1  # of what there is to train on, where the source has no validation part
_SPLIT_SEED = 0
_PARTS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_STATISTICS_PICTURES = 2000
_SMALL = 64  # pixels; pictures from here on are photographs to `suggest_size` and `suggest_preprocessing`


def open_splits(source: str) -> Splits:
    """The parts of a source, always the same ones.

    CIFAR has its own test part. A folder may hold train/, and val/ or test/, each with class folders. What is missing
    is taken from each class in the same proportion: a fifth of a source without a test part, then a tenth of the
    rest for validation.

    Args:
        source: see the module.

    Raises:
        DataError: not such a source; no pictures, one class, or too few of one to split; unreadable or malformed
            files.
    """
    parts = _open_parts(source)
    train = parts["train"]
    if "test" not in parts:
        train, parts["test"] = _split(train, _TEST_SHARE)
    if "validation" not in parts:
        train, parts["validation"] = _split(train, _VALIDATION_SHARE)
    return Splits(train, parts["validation"], parts["test"])


def open_test(source: str, trained_on: Collection[str] = ()) -> LabelledImages:
    """What to measure accuracy on: the test part of a source, else its validation part, else all of it.

    Of what a network was trained on, it is what `open_splits` keeps for testing, and so of the digits always.

    Args:
        source: see the module.
        trained_on: names of the data sets that the networks to be measured were trained on.

    Raises:
        DataError: as for `open_splits`.
    """
    parts = _open_parts(source)
    if "test" in parts:
        return parts["test"]
    if source == "digits" or parts["train"].name in trained_on:
        return open_splits(source).test
    return parts.get("validation", parts["train"])


def suggest_size(data: LabelledImages, designed: int) -> int:
    """Height and width of a network's input in pixels: what it was designed for, but of small pictures no more than
    twice their size, since enlarging adds cost and no detail."""
    smaller = min(data.picture(0).size)
    return min(designed, 2 * smaller) if smaller < _SMALL else designed


def suggest_preprocessing(data: LabelledImages, size: tuple[int, int]) -> Preprocessing:
    """Grey where all pictures are grey; as much of a picture as fits `size`, with these pictures' mean and deviation.

    Colour inputs from 64 pixels on get ImageNet's statistics and the part of the picture that it uses instead.

    Args:
        data: what will be trained on.
        size: height and width of the input in pixels.
    """
    chosen = np.linspace(0, len(data) - 1, min(len(data), _STATISTICS_PICTURES)).astype(int)
    grey = isinstance(data.pictures, np.ndarray) and data.pictures.ndim == 3
    if not isinstance(data.pictures, np.ndarray):
        grey = all(data.picture(i).mode in ("1", "L") for i in chosen)
    if not grey and min(size) >= _SMALL:
        photograph = imagenet_preprocessing(3)
        assert photograph is not None
        return photograph.at(size)
    plain = Preprocessing(size, size, (0.0,), (1.0,)) if grey else Preprocessing(size, size, (0.0,) * 3, (1.0,) * 3)
    inputs = data.inputs([int(i) for i in chosen], plain)
    mean, std = inputs.mean(axis=(0, 2, 3)), inputs.std(axis=(0, 2, 3))
    return replace(
        plain,
        mean=tuple(round(float(value), 4) for value in mean),
        std=tuple(max(round(float(value), 4), 1e-4) for value in std),
    )


def _open_parts(source: str) -> dict[str, LabelledImages]:
    """What the source is divided into: `train` and perhaps `validation` and `test`."""
    if source == "digits":
        return {"train": _digits()}
    path = Path(source)
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{source}: expected digits, a folder of class folders or an archive of CIFAR, got no file")
    parts = open_cifar(path) or _class_folders(path)
    for part in parts.values():
        _check(path, part)
    return parts


def _check(path: Path, data: LabelledImages) -> None:
    if len(data.classes) < 2:
        raise DataError(f"{path}: expected pictures of at least two classes, got only {data.classes[0]!r}")


def _split(data: LabelledImages, share: float) -> tuple[LabelledImages, LabelledImages]:
    """What stays, and `share` of each class."""
    generator = np.random.default_rng(_SPLIT_SEED)
    kept, taken = [], []
    for label, name in enumerate(data.classes):
        members = generator.permutation(np.flatnonzero(data.labels == label))
        count = max(1, round(share * len(members)))
        if count >= len(members):
            raise DataError(f"{data.name}: expected enough pictures of each class to hold some out, got {len(members)}"
                            f" of {name!r} to take {count} from")  # fmt: skip
        taken.append(members[:count])
        kept.append(members[count:])
    return data.subset(np.sort(np.concatenate(kept))), data.subset(np.sort(np.concatenate(taken)))


def _digits() -> LabelledImages:
    """1797 handwritten digits of 8x8 pixels, which come with scikit-learn.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
    """
    spec = importlib.util.find_spec("sklearn")  # its files without its modules, which take a second to import
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, not installed here: pip install scikit-learn", name="sklearn"
        )
    rows = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pictures = np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in range(10))
    return LabelledImages("digits", classes, rows[:, -1].astype(np.int64), pictures, mirrored=False)


def _class_folders(root: Path) -> dict[str, LabelledImages]:
    folders = visible_folders(root)
    parts = {_PARTS[folder.name]: folder for folder in folders if folder.name in _PARTS}
    if not parts:
        return {"train": _labelled_folder(root, folders, None)}
    if len(parts) != len(folders) or "train" not in parts:
        names = ", ".join(folder.name for folder in folders[:5])
        raise DataError(f"{root}: expected class folders, or train/ with val/ or test/ and nothing else, got {names}")
    train = replace(_labelled_folder(parts["train"], visible_folders(parts["train"]), None), name=_name(root))
    others = {
        name: _labelled_folder(folder, visible_folders(folder), train.classes)
        for name, folder in parts.items()
        if name != "train"
    }
    return {part: replace(data, name=train.name) for part, data in {"train": train, **others}.items()}


def _name(root: Path) -> str:
    """Of a folder as a data set; never that of a data set everybody knows."""
    name = root.resolve().name
    return f"{name}-folder" if name in ("digits", "cifar10", "cifar100") else name


def _labelled_folder(root: Path, folders: list[Path], classes: tuple[str, ...] | None) -> LabelledImages:
    """Each folder is a class; `classes` are those it may be, by default those that are there."""
    if not folders:
        raise DataError(f"{root}: expected a folder of class folders, got one without folders")
    names = classes or tuple(folder.name for folder in folders)
    files: list[Path] = []
    labels: list[int] = []
    ignored: list[Path] = []
    for folder in folders:
        if folder.name not in names:
            raise DataError(f"{folder}: expected one of the classes in train/: {', '.join(names[:5])}")
        found = sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path.relative_to(folder)))
        pictures = [path for path in found if is_picture(path)]
        ignored += [path for path in found if not is_picture(path)]
        if not pictures:
            raise DataError(f"{folder}: expected pictures ({', '.join(PICTURE_SUFFIXES)}), got {len(found)} files")
        for path in pictures:
            _check_header(path)
        files += pictures
        labels += [names.index(folder.name)] * len(pictures)
    if ignored:
        _LOG.warning(
            "%s: left out %d files that are no pictures by their names: %s ...", root, len(ignored), ignored[0]
        )
    return LabelledImages(_name(root), names, np.array(labels, np.int64), tuple(files), mirrored=False)


def _check_header(path: Path) -> None:
    """Before hours of training, not after."""
    try:
        with Image.open(path):
            pass
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected a picture ({error})") from error


def folder_classes(source: str, count: int) -> tuple[str, ...] | None:
    """The names of the folders in a folder of pictures where there are as many as classes, each with pictures; of its
    folder train/ where it has parts. In their alphabetical order, which is how training tools number them."""
    root = Path(source)
    if not root.is_dir():
        return None
    folders = visible_folders(root)
    train = next((folder for folder in folders if _PARTS.get(folder.name) == "train"), None)
    folders = folders if train is None else visible_folders(train)
    if len(folders) != count or count < 2 or not all(map(_holds_pictures, folders)):
        return None
    return tuple(folder.name for folder in folders)


def _holds_pictures(folder: Path) -> bool:
    """Whether a file in it, at whatever depth, is a picture by its name."""
    return any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.rglob("*"))
