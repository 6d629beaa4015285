"""Labelled pictures to train on and to measure with. No PyTorch.

A source is `digits`, the archive of CIFAR-10 or CIFAR-100 (as downloaded or unpacked), or a folder of class folders.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnet.preprocessing import Preprocessing, imagenet_preprocessing, open_picture

_LOG = logging.getLogger(__name__)

_TEST_SHARE = 0.2  # of a source that comes without a test part
_VALIDATION_SHARE = 0.1  # of what there is to train on, where the source has no validation part
_SPLIT_SEED = 0
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
_PARTS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_STATISTICS_PICTURES = 2000
_SMALL = 64  # pixels; pictures from here on are photographs to `suggest_size` and `suggest_preprocessing`


class DataError(ValueError):
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
        except ValueError as error:
            raise DataError(str(error)) from error

    def subset(self, indices: NDArray[np.int64]) -> LabelledImages:
        pictures = self.pictures
        chosen = pictures[indices] if isinstance(pictures, np.ndarray) else tuple(pictures[i] for i in indices)
        return replace(self, labels=self.labels[indices], pictures=chosen)

    def inputs(self, indices: Sequence[int], preprocessing: Preprocessing) -> NDArray[np.float32]:
        """The network's inputs for some of the pictures, [n, C, H, W]."""
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

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.float32], NDArray]]:
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
    if path.is_dir():
        files = _cifar_files(path)
        parts = _cifar(path, files) if files else _class_folders(path)
    elif path.is_file():
        parts = _cifar(path, _archive_members(path))
    else:
        raise DataError(f"{source}: expected digits, a folder of class folders or an archive of CIFAR, got no file")
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
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)
    classes = tuple(str(digit) for digit in digits.target_names)
    return LabelledImages("digits", classes, digits.target.astype(np.int64), pictures, mirrored=False)


def _class_folders(root: Path) -> dict[str, LabelledImages]:
    folders = _folders(root)
    parts = {_PARTS[folder.name]: folder for folder in folders if folder.name in _PARTS}
    if not parts:
        return {"train": _labelled_folder(root, folders, None)}
    if len(parts) != len(folders) or "train" not in parts:
        names = ", ".join(folder.name for folder in folders[:5])
        raise DataError(f"{root}: expected class folders, or train/ with val/ or test/ and nothing else, got {names}")
    train = replace(_labelled_folder(parts["train"], _folders(parts["train"]), None), name=_name(root))
    others = {
        name: _labelled_folder(folder, _folders(folder), train.classes)
        for name, folder in parts.items()
        if name != "train"
    }
    return {part: replace(data, name=train.name) for part, data in {"train": train, **others}.items()}


def _name(root: Path) -> str:
    """Of a folder as a data set; never that of a data set everybody knows."""
    name = root.resolve().name
    return f"{name}-folder" if name in ("digits", "cifar10", "cifar100") else name


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


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
        found = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
        pictures = [path for path in found if path.suffix.lower() in _SUFFIXES]
        ignored += [path for path in found if path.suffix.lower() not in _SUFFIXES]
        if not pictures:
            raise DataError(f"{folder}: expected pictures ({', '.join(sorted(_SUFFIXES))}), got {len(found)} files")
        for path in pictures:
            _check_header(path)
        files += pictures
        labels += [names.index(folder.name)] * len(pictures)
    if ignored:
        _LOG.warning(
            "%s: left out %d files that are no pictures by their names: %s ...", root, len(ignored), ignored[0]
        )
    return LabelledImages(_name(root), names, np.array(labels, np.int64), tuple(files), mirrored=False)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_header(path: Path) -> None:
    """Before hours of training, not after."""
    try:
        with Image.open(path):
            pass
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected a picture ({error})") from error


_CIFAR_PICTURE = 3 * 32 * 32
_CIFAR_LARGEST_MEMBER = 200 << 20  # the largest, CIFAR-100's train, has 155 MB


@dataclass(frozen=True)
class _CifarForm:
    """One of the four ways CIFAR is published: its files, and where the names of its classes are."""

    name: str
    train: tuple[str, ...]
    test: str
    names: str
    names_key: str = ""  # of the Python version's dictionary

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.names)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFAR_FORMS = (
    _CifarForm("cifar10", tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin", "batches.meta.txt"),
    _CifarForm("cifar10", _BATCHES, "test_batch", "batches.meta", "label_names"),
    _CifarForm("cifar100", ("train.bin",), "test.bin", "fine_label_names.txt"),
    _CifarForm("cifar100", ("train",), "test", "meta", "fine_label_names"),
)
_CIFAR_FILES = {file for form in _CIFAR_FORMS for file in form.files}


def _cifar_files(path: Path) -> dict[str, bytes]:
    """The files of an unpacked archive, in the folder or one below it; none where this is another kind of folder."""
    places = (path, *_folders(path))
    found = {f.name: f for place in places for f in place.iterdir() if f.is_file() and f.name in _CIFAR_FILES}
    return {name: file.read_bytes() for name, file in found.items()}


def _archive_members(path: Path) -> dict[str, bytes]:
    members = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in _CIFAR_FILES and member.isfile() and member.size <= _CIFAR_LARGEST_MEMBER:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    members[name] = stream.read()
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass  # gzip's checksum comes after the last member
    except Exception as error:  # tarfile, zlib and lzma: a damaged archive can raise anything
        raise DataError(
            f"{path}: expected an archive of CIFAR-10 or CIFAR-100 as .tar.gz ({_first_line(error)})"
        ) from error
    return members


def _cifar(path: Path, files: Mapping[str, bytes]) -> dict[str, LabelledImages]:
    """CIFAR-10 or CIFAR-100, in the binary or the Python version.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    form = max(_CIFAR_FORMS, key=lambda form: sum(file in files for file in form.files))
    missing = [file for file in form.files if file not in files]
    if missing:
        raise DataError(f"{path}: expected CIFAR-10 or CIFAR-100 as published, {missing[0]} is missing")
    classes = _cifar_classes(path, files[form.names], form)
    return {
        part: _cifar_part(path, files, form, members, classes)
        for part, members in (("train", form.train), ("test", (form.test,)))
    }


def _cifar_classes(path: Path, content: bytes, form: _CifarForm) -> tuple[str, ...]:
    if form.names_key:
        names = _unpickle(path, form.names, content).get(form.names_key)
        classes = tuple(_text(value) for value in names) if isinstance(names, list) else ()
    else:
        classes = tuple(line.strip() for line in content.decode("ascii", "replace").splitlines() if line.strip())
    count = int(form.name.removeprefix("cifar"))
    if len(classes) != count:
        raise DataError(f"{path}: expected {count} names of classes in {form.names}, got {len(classes)}")
    return classes


def _cifar_part(
    path: Path, files: Mapping[str, bytes], form: _CifarForm, members: Sequence[str], classes: tuple[str, ...]
) -> LabelledImages:
    read = _read_pickled if form.names_key else _read_binary
    pairs = [read(path, member, files[member], form.name) for member in members]
    labels = np.concatenate([labels for labels, _ in pairs]).astype(np.int64)
    pictures = np.concatenate([pixels for _, pixels in pairs]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(classes):
        raise DataError(f"{path}: expected labels of {len(classes)} classes, got {labels.min()} to {labels.max()}")
    return LabelledImages(form.name, classes, labels, np.ascontiguousarray(pictures), mirrored=True)


def _read_binary(path: Path, member: str, content: bytes, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Records of one label (CIFAR-100: two, the fine one last) and the planes of one picture."""
    labels = 1 if name == "cifar10" else 2
    if not content or len(content) % (labels + _CIFAR_PICTURE):
        raise DataError(f"{path}: expected {member} to hold records of {labels + _CIFAR_PICTURE} bytes,"
                        f" got {len(content)} bytes")  # fmt: skip
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + _CIFAR_PICTURE)
    return records[:, labels - 1], records[:, labels:]


def _read_pickled(path: Path, member: str, content: bytes, name: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    batch = _unpickle(path, member, content)
    labels, pixels = batch.get("labels" if name == "cifar10" else "fine_labels"), batch.get("data")
    if not isinstance(labels, list) or not labels or not all(type(x) is int and abs(x) < 1 << 31 for x in labels):
        raise DataError(f"{path}: expected {member} to hold a list of integers as labels, got {type(labels).__name__}")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(labels), _CIFAR_PICTURE):
        shape = getattr(pixels, "shape", type(pixels).__name__)
        raise DataError(f"{path}: expected {member} to hold pictures [N, {_CIFAR_PICTURE}] and N labels,"
                        f" got {shape} and {len(labels)}")  # fmt: skip
    return np.array(labels, np.int64), pixels


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays of numbers and plain containers; whatever else a pickle asks for is refused."""

    _ALLOWED = re.compile(r"numpy(\.core|\._core)?(\.multiarray)? (_reconstruct|ndarray|dtype)|_codecs encode")

    def find_class(self, module: str, name: str) -> Any:
        if not self._ALLOWED.fullmatch(f"{module} {name}"):
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r:.80}")
        return super().find_class(module, name)


def _unpickle(path: Path, member: str, content: bytes) -> dict[str, Any]:
    """A dictionary of the Python version of CIFAR, whose keys are bytes or text."""
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a malformed pickle can raise anything; all of it is a refusal
        raise DataError(f"{path}: expected {member} as CIFAR publishes it ({_first_line(error)})") from error
    if not isinstance(batch, dict):
        raise DataError(f"{path}: expected {member} to hold a dictionary, got {type(batch).__name__}")
    return {_text(key): value for key, value in batch.items()}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(":")


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
