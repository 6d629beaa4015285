"""CIFAR-10 and CIFAR-100 from the archives their author publishes."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet.data.files import visible_folders
from resnet.data.labelled import DataError, LabelledImages

_PICTURE = 3 * 32 * 32
_LARGEST_MEMBER = 200 << 20  # the largest, CIFAR-100's train, has 155 MB


@dataclass(frozen=True)
class _Form:
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
_FORMS = (
    _Form("cifar10", tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin", "batches.meta.txt"),
    _Form("cifar10", _BATCHES, "test_batch", "batches.meta", "label_names"),
    _Form("cifar100", ("train.bin",), "test.bin", "fine_label_names.txt"),
    _Form("cifar100", ("train",), "test", "meta", "fine_label_names"),
)
_FILES = {file for form in _FORMS for file in form.files}


def open_cifar(path: Path) -> dict[str, LabelledImages] | None:
    """CIFAR-10 or CIFAR-100 as its `train` and `test`, in the binary or the Python version.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Args:
        path: the archive, or a folder it was unpacked in; of a folder that holds nothing of it the result is None.

    Raises:
        DataError: a file that is no such archive; missing or malformed files.
    """
    files = _unpacked_files(path) if path.is_dir() else _packed_files(path)
    if path.is_dir() and not files:
        return None
    form = max(_FORMS, key=lambda form: sum(file in files for file in form.files))
    missing = [file for file in form.files if file not in files]
    if missing:
        raise DataError(f"{path}: expected CIFAR-10 or CIFAR-100 as published, {missing[0]} is missing")
    classes = _classes(path, files[form.names], form)
    return {
        part: _part(path, files, form, members, classes)
        for part, members in (("train", form.train), ("test", (form.test,)))
    }


def _unpacked_files(path: Path) -> dict[str, bytes]:
    """The files of an unpacked archive, in the folder or one below it; none where this is another kind of folder."""
    places = (path, *visible_folders(path))
    found = {f.name: f for place in places for f in place.iterdir() if f.is_file() and f.name in _FILES}
    return {name: file.read_bytes() for name, file in found.items()}


def _packed_files(path: Path) -> dict[str, bytes]:
    members = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in _FILES and member.isfile() and member.size <= _LARGEST_MEMBER:
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


def _classes(path: Path, content: bytes, form: _Form) -> tuple[str, ...]:
    if form.names_key:
        names = _unpickle(path, form.names, content).get(form.names_key)
        classes = tuple(_text(value) for value in names) if isinstance(names, list) else ()
    else:
        classes = tuple(line.strip() for line in content.decode("ascii", "replace").splitlines() if line.strip())
    count = int(form.name.removeprefix("cifar"))
    if len(classes) != count:
        raise DataError(f"{path}: expected {count} names of classes in {form.names}, got {len(classes)}")
    return classes


def _part(
    path: Path, files: Mapping[str, bytes], form: _Form, members: Sequence[str], classes: tuple[str, ...]
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
    if not content or len(content) % (labels + _PICTURE):
        raise DataError(f"{path}: expected {member} to hold records of {labels + _PICTURE} bytes,"
                        f" got {len(content)} bytes")  # fmt: skip
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + _PICTURE)
    return records[:, labels - 1], records[:, labels:]


def _read_pickled(path: Path, member: str, content: bytes, name: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    batch = _unpickle(path, member, content)
    labels, pixels = batch.get("labels" if name == "cifar10" else "fine_labels"), batch.get("data")
    if not isinstance(labels, list) or not labels or not all(type(x) is int and abs(x) < 1 << 31 for x in labels):
        raise DataError(f"{path}: expected {member} to hold a list of integers as labels, got {type(labels).__name__}")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PICTURE):
        shape = getattr(pixels, "shape", type(pixels).__name__)
        raise DataError(f"{path}: expected {member} to hold pictures [N, {_PICTURE}] and N labels,"
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
