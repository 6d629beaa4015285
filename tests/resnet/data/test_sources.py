"""Sources of labelled pictures: every layout with known pixels and labels, and everything that must be refused."""

from __future__ import annotations

import io
import logging
import os
import pickle
import pickletools
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from resnet.data.labelled import DataError, LabelledImages, LabelledInputs, Splits
from resnet.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from resnet.data.sources import open_splits, open_test, suggest_preprocessing, suggest_size
from tests.faults.weights_inputs import Payload
from tests.resnet import checks

PLAIN = Preprocessing((4, 4), (4, 4), (0.0,) * 3, (1.0,) * 3)


def refusal(source: Path | str, opener: Callable[[str], object] = open_splits) -> str:
    """The one-line message with which the source is refused."""
    return checks.refusal(DataError, opener, str(source))


def pixels(data: LabelledImages) -> NDArray[np.uint8]:
    assert isinstance(data.pictures, np.ndarray)
    return data.pictures


def parts(splits: Splits) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    return splits.train, splits.validation, splits.test


def contents(*data: LabelledImages) -> Counter[tuple[int, bytes]]:
    """Every picture with its label, in no order."""
    return Counter((int(part.labels[i]), part.picture(i).tobytes()) for part in data for i in range(len(part)))


def test_digits_are_scikit_learns_split_the_same_way_every_time() -> None:
    data, again, expected = parts(open_splits("digits")), parts(open_splits("digits")), load_digits()
    pictures = (expected.images / 16 * 255).round().astype(np.uint8)
    pairs = zip(expected.target, pictures, strict=True)
    assert contents(*data) == Counter((int(label), image.tobytes()) for label, image in pairs)
    for part, other in zip((*data, data[2]), (*again, open_test("digits")), strict=True):
        assert (part.name, part.classes, part.mirrored) == ("digits", tuple("0123456789"), False)
        assert part.labels.dtype == np.int64 and part.picture(0).size == (8, 8) and part.picture(0).mode == "L"
        assert np.array_equal(part.labels, other.labels) and np.array_equal(pixels(part), pixels(other))
    assert [len(part) for part in data] == [1295, 143, 359]
    assert not contents(data[0]) & contents(data[1]) | contents(data[0], data[1]) & contents(data[2])
    counts = np.array([np.bincount(part.labels, minlength=10) for part in data])  # each class in the same proportion
    assert np.abs(counts - [[0.72], [0.08], [0.2]] * counts.sum(axis=0)).max() <= 1 and counts.min() > 0


FOLDERS = {
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "binary"): "cifar-100-binary",
    ("cifar100", "python"): "cifar-100-python",
}
CLASSES = {name: tuple(f"{name} {i}" for i in range(count)) for name, count in (("cifar10", 10), ("cifar100", 100))}


def cifar_pictures(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Labels and pictures [N, H, W, 3] of three rounds of all classes to train on and one to test with."""
    count = len(CLASSES[name])
    pictures = np.random.default_rng(count).integers(0, 256, (4 * count, 32, 32, 3), np.uint8)
    return np.tile(np.arange(count, dtype=np.uint8), 4), pictures


def cifar_members(name: str, version: str) -> dict[str, bytes]:
    """The files of a published archive. A picture is its red, its green and its blue plane."""
    labels, pictures = cifar_pictures(name)
    planes = np.concatenate([pictures[..., channel].reshape(-1, 1024) for channel in range(3)], axis=1)
    training = len(labels) * 3 // 4
    if name == "cifar10":
        pieces = {f"data_batch_{i + 1}": slice(6 * i, 6 * i + 6) for i in range(5)}
        pieces["test_batch"] = slice(training, None)
    else:
        pieces = {"train": slice(training), "test": slice(training, None)}
    if version == "binary":
        coarse = [] if name == "cifar10" else [labels[:, None] // 5]
        records = np.concatenate([*coarse, labels[:, None], planes], axis=1)
        members = {f"{member}.bin": records[piece].tobytes() for member, piece in pieces.items()}
        names = "batches.meta.txt" if name == "cifar10" else "fine_label_names.txt"
        return {**members, names: ("\n".join(CLASSES[name]) + "\n\n").encode()}
    prefix, names = (b"", "batches.meta") if name == "cifar10" else (b"fine_", "meta")
    members = {}
    for member, piece in pieces.items():
        record = {b"data": planes[piece], b"coarse_labels": (labels[piece] // 5).tolist()}
        members[member] = python2_pickle({**record, prefix + b"labels": labels[piece].tolist()})
    classes = [text.encode() for text in CLASSES[name]]
    return {**members, names: python2_pickle({b"coarse_label_names": [b"fish"], prefix + b"label_names": classes})}


def python2_pickle(content: object) -> bytes:
    """Bytes are written as Python 2 wrote its strings."""
    pickled = bytearray(pickle.dumps(content, protocol=3))
    strings = {"BINBYTES": pickle.BINSTRING, "SHORT_BINBYTES": pickle.SHORT_BINSTRING}
    for opcode, _, place in pickletools.genops(bytes(pickled)):
        if opcode.name in strings and place is not None:
            pickled[place : place + 1] = strings[opcode.name]
    return bytes(pickled).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_folder(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    (folder / "readme.html").write_text("<html>")
    for name, content in members.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w:gz") as archive:
        for name, content in {"readme.html": b"<html>", **members}.items():
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


LAYOUTS: dict[str, Callable[[Path, dict[str, bytes], str], Path]] = {
    "archive": lambda path, members, folder: write_archive(path / f"{folder}.tar.gz", members),
    "folder": lambda path, members, folder: write_folder(path / folder, members),
    "folder-around": lambda path, members, folder: write_folder(path / folder, members).parent,
}


# each way it is published as an archive, and one way in each layout
CIFAR = [*((form, "archive") for form in FOLDERS), *((("cifar10", "python"), layout) for layout in [*LAYOUTS][1:])]


@pytest.mark.parametrize(("form", "layout"), CIFAR, ids=["-".join((*form, layout)) for form, layout in CIFAR])
def test_cifar(form: tuple[str, str], layout: str, tmp_path: Path) -> None:
    name, _ = form
    source = str(LAYOUTS[layout](tmp_path, cifar_members(*form), FOLDERS[form]))
    splits = open_splits(source)
    labels, pictures = cifar_pictures(name)
    for part in parts(splits):
        assert (part.name, part.classes, part.mirrored) == (name, CLASSES[name], True)
        assert part.labels.dtype == np.int64 and isinstance(part.pictures, np.ndarray)
    training = len(labels) * 3 // 4
    for test in (splits.test, open_test(source)):
        assert np.array_equal(test.labels, labels[training:]) and np.array_equal(pixels(test), pictures[training:])
    assert splits.test.picture(3).mode == "RGB"
    assert np.array_equal(np.asarray(splits.test.picture(3)), pictures[training + 3])
    pairs = zip(labels[:training], pictures[:training], strict=True)
    expected = Counter((int(label), picture.tobytes()) for label, picture in pairs)
    assert contents(splits.train, splits.validation) == expected
    assert np.bincount(splits.validation.labels).tolist() == [1] * len(CLASSES[name])


Change = Callable[[dict[str, bytes]], object]


def repickled(member: str, **changes: Any) -> Change:
    """Changes entries of one of the Python version's dictionaries; None removes one."""

    def change(members: dict[str, bytes]) -> None:
        entries = {key.decode(): value for key, value in pickle.loads(members[member], encoding="bytes").items()}
        entries |= {key: value(entries[key]) if callable(value) else value for key, value in changes.items()}
        members[member] = python2_pickle({k.encode(): v for k, v in entries.items() if v is not None})

    return change


batch = partial(repickled, "test_batch")


def replaced(member: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda members: members.update({member: change(members[member])})


def with_byte(at: int, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([value]) + content[at + 1 :]


def asking_for(module: str, name: str) -> Change:
    """A pickle that loads one name and does nothing with it."""
    texts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    content = b"\x80\x04" + b"".join(texts) + b"\x93."
    return replaced("test_batch", lambda _: content)


# what is wrong with the files: a change to those of a sound CIFAR, and the words that must say so
FAULTS: dict[str, tuple[str, str, Change, str]] = {
    f"{version}-{name}-{case}": (version, name, change, expected)
    for version, name, case, change, expected in (
        ("binary", "cifar10", "missing-batch", lambda m: m.pop("data_batch_3.bin"), "data_batch_3.bin is missing"),
        ("binary", "cifar10", "truncated", replaced("test_batch.bin", lambda c: c[:-1]), "bytes, got 30729 bytes"),
        ("binary", "cifar100", "empty", replaced("train.bin", lambda c: b""), "train.bin to hold records of 3074"),
        ("binary", "cifar10", "label", replaced("data_batch_2.bin", with_byte(3073, 10)), "10 classes, got 0 to 10"),
        ("binary", "cifar10", "names", replaced("batches.meta.txt", lambda c: b"a\n" * 9), "batches.meta.txt, got 9"),
        ("python", "cifar10", "truncated", replaced("test_batch", lambda c: c[:-9]), "test_batch as CIFAR publishes"),
        ("python", "cifar10", "list", replaced("test_batch", lambda c: pickle.dumps([1])), "a dictionary, got list"),
        ("python", "cifar100", "label-low", repickled("test", fine_labels=[-1] * 100), "100 classes, got -1 to -1"),
        ("python", "cifar10", "label-huge", batch(labels=[1 << 70] * 10), "test_batch to hold a list of integers"),
        ("python", "cifar100", "coarse-only", repickled("train", fine_labels=None), "as labels, got NoneType"),
        ("python", "cifar10", "label-text", batch(labels=["cat"] * 10), "test_batch to hold a list of integers"),
        ("python", "cifar10", "label-array", batch(labels=np.arange(10)), "as labels, got ndarray"),
        ("python", "cifar10", "fewer-labels", batch(labels=[1] * 9), "got (10, 3072) and 9"),
        ("python", "cifar10", "data-list", batch(data=[[0] * 3072] * 10), "got list and 10"),
        ("python", "cifar10", "data-float", batch(data=lambda data: data / 255), "pictures [N, 3072] and N labels"),
        ("python", "cifar100", "names", repickled("meta", fine_label_names=[b"a"] * 90), "in meta, got 90"),
        ("python", "cifar10", "dtype", asking_for("numpy", "dtype.__class__"), "asks for 'numpy.dtype.__class__'"),
        ("python", "cifar10", "two-lines", asking_for("a\nb", "c"), r"asks for 'a\nb.c'"),
    )
}


@pytest.mark.parametrize("case", FAULTS)
def test_malformed_cifar_is_refused(case: str, tmp_path: Path) -> None:
    version, name, change, expected = FAULTS[case]
    members = cifar_members(name, version)
    change(members)
    for source in (write_folder(tmp_path / "cifar", members), write_archive(tmp_path / "cifar.tar.gz", members)):
        message = refusal(source, open_test)
        assert message.startswith(f"{source}: ") and expected in message


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(("name", "member"), [("cifar10", "data_batch_5"), ("cifar100", "meta")])
def test_code_in_a_pickle_is_refused_and_not_run(name: str, member: str, protocol: int, tmp_path: Path) -> None:
    members, marker = cifar_members(name, "python"), tmp_path / "executed"
    members[member] = pickle.dumps({"data": Payload(os.system, (f"mkdir '{marker}'",))}, protocol)
    message = refusal(write_folder(tmp_path / "cifar", members))
    assert f"expected {member} as CIFAR" in message and f"asks for '{os.system.__module__}.system'" in message
    assert not marker.exists()
    pickle.loads(members[member])  # the payload was live: an unguarded load runs it
    assert marker.exists()


def flipped(share: float) -> Callable[[bytes], bytes]:
    """One bit, so far from the beginning."""
    return lambda content: with_byte(at := int(share * len(content)), content[at] ^ 0x10)(content)


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty": ("gz", lambda content: b""),
    "text": ("gz", lambda content: b"not found\n" * 1000),
    "all-but-a-byte": ("gz", lambda content: content[:-1]),
    **{f"flipped-at-{share}": ("gz", flipped(share)) for share in (0, 0.2, 0.6, 0.95)},
    "checksum": ("gz", lambda content: with_byte(len(content) - 8, content[-8] ^ 1)(content)),
    "flipped-xz": ("xz", flipped(0.5)),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_archives_are_refused(case: str, tmp_path: Path) -> None:
    compression, damage = DAMAGES[case]
    path = write_archive(tmp_path / f"cifar.tar.{compression}", cifar_members("cifar10", "python"))
    open_test(str(path))
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(path).startswith(f"{path}: expected an archive of CIFAR-10 or CIFAR-100")
    path = write_archive(tmp_path / "other.tar.gz", {"cat.png": b"\x89PNG"})
    assert refusal(path).startswith(f"{path}: expected CIFAR-10 or CIFAR-100 as published")


def write_pictures(folder: Path, count: int, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Path:
    """Random pictures, other ones in each folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(list(str(folder).encode()))
    for i in range(count):
        values = generator.integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
        Image.fromarray(values.squeeze()).save(folder / f"{i:03}.png")
    return folder


def write_classes(root: Path, **counts: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        write_pictures(root / name, count)
    return root


def files(*data: LabelledImages) -> list[Path]:
    return sorted(path for part in data for path in part.pictures)


def assert_labelled_by_folder(data: LabelledImages) -> None:
    assert [data.classes[label] for label in data.labels] == [path.parent.name for path in data.pictures]


def test_plain_class_folders(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "pets", dog=10, cat=20, bird=5)
    everything = open_test(str(root))
    assert (everything.name, everything.classes, everything.mirrored) == ("pets", ("bird", "cat", "dog"), False)
    assert files(everything) == sorted(root.glob("*/*.png"))
    assert everything.labels.tolist() == [0] * 5 + [1] * 20 + [2] * 10
    splits = open_splits(str(root))
    assert files(*parts(splits)) == files(everything)
    counts = [np.bincount(part.labels).tolist() for part in parts(splits)]
    assert counts == [[3, 14, 7], [1, 2, 1], [1, 4, 2]]
    for part, again in zip(parts(splits), parts(open_splits(str(root))), strict=True):
        assert_labelled_by_folder(part)
        assert part.name == "pets" and part.pictures == again.pictures
    assert open_test(str(root), {"pets"}).pictures == splits.test.pictures  # for a network trained on the others
    assert everything.picture(3).tobytes() == Image.open(root / "bird" / "003.png").tobytes()
    assert open_test(str(root.rename(tmp_path / "digits"))).name == "digits-folder"


# folders of a divided source, and which of them its parts to train on, to validate and to test with are taken from
DIVIDED: dict[tuple[str, ...], tuple[str, str, str]] = {
    ("train", "val", "test"): ("train", "val", "test"),
    ("train", "validation", "test"): ("train", "validation", "test"),
    ("train", "test"): ("train", "train", "test"),
    ("train", "val"): ("train", "val", "train"),
}


@pytest.mark.parametrize("folders", DIVIDED, ids="-".join)
def test_divided_class_folders(folders: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "cifar10"  # by that name everybody knows another data set
    for folder in folders:
        write_classes(root / folder, cat=5, dog=5)
    splits = open_splits(str(root))
    for part, origin in zip(parts(splits), DIVIDED[folders], strict=True):
        assert {path.parent.parent.name for path in part.pictures} == {origin}
        assert (part.name, part.classes) == ("cifar10-folder", ("cat", "dog"))
        assert_labelled_by_folder(part)
    assert files(*parts(splits)) == sorted(tmp_path.rglob("*.png"))
    held_out = open_test(str(root), {"cifar10-folder"})
    assert held_out.pictures == splits.test.pictures  # of what a network was trained on, only that
    shown = splits.test if "test" in folders else splits.validation
    assert open_test(str(root), {"birds"}).pictures == shown.pictures


def test_test_part_may_lack_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", bird=1, cat=1, dog=1)  # too few to take some to validate with
    write_classes(tmp_path / "test", dog=2)
    test = open_test(str(tmp_path))
    assert test.classes == ("bird", "cat", "dog") and test.labels.tolist() == [2, 2]


def test_of_a_class_folder_all_pictures_are_taken_and_nothing_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_classes(tmp_path / ".cache" / "pets", cat=2, dog=1)  # hidden above the source hides nothing
    write_pictures(root / "dog" / "small" / "brown", 1)
    shutil.copytree(root / "dog", root / "cat" / ".checkpoints")
    shutil.copytree(root / "dog", root / ".thumbnails")
    (root / "cat" / "._000.png").write_text("x")
    for suffix in (".jpg", ".JPEG", ".bmp", ".webp", ".tif", ".ppm", ".gif"):
        Image.open(root / "cat" / "000.png").save(root / "cat" / f"picture{suffix}")
    assert open_test(str(root)).labels.tolist() == [0] * 9 + [1, 1] and not caplog.messages
    for name in ("notes.txt", "labels.csv"):
        (root / "cat" / name).write_text("x")
    with caplog.at_level(logging.WARNING, logger="resnet.data.sources"):
        assert len(open_test(str(root))) == 11
    (message,) = caplog.messages
    assert "left out 2 files" in message and str(root / "cat" / "labels.csv") in message


def divided(**counts: dict[str, int]) -> Callable[[Path], object]:
    return lambda root: [write_classes(root / part, **classes) for part, classes in counts.items()]


PETS, FOX = {"cat": 5, "dog": 5}, {"cat": 2, "fox": 2}
# folders that are no source: what is in them, and the words that must say so
NO_CLASSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (Path.rmdir, "root: expected digits, a folder of class folders or an archive of CIFAR, got no file"),
    "pictures-without-folders": (lambda root: write_pictures(root, 3), "got one without folders"),
    "one-class": (lambda root: write_classes(root, cat=9), "root: expected pictures of at least two classes, got only"),
    "empty-class": (lambda root: write_classes(root, cat=9, dog=0), "root/dog: expected pictures (.bmp, "),
    "text-as-picture": (
        lambda root: (write_classes(root, **PETS) / "cat/page.jpg").touch(),
        "root/cat/page.jpg: expected a picture (",
    ),
    "foreign-in-val": (divided(train=PETS, val=FOX), "val/fox: expected one of the classes in train/: cat, dog"),
    "empty-part": (divided(train=PETS, test={}), "root/test: expected a folder of class folders"),
    "no-train": (divided(val=PETS, test=PETS), "train/ with val/ or test/ and nothing else, got test, val"),
    "part-beside-classes": (lambda root: write_classes(root, train=5, **PETS), "nothing else, got cat, dog, train"),
}


@pytest.mark.parametrize("opener", [open_splits, open_test], ids=["splits", "test"])
@pytest.mark.parametrize("case", NO_CLASSES)
def test_folders_that_are_no_source_are_refused(case: str, opener: Callable[[str], object], tmp_path: Path) -> None:
    make, expected = NO_CLASSES[case]
    (tmp_path / "root").mkdir()
    make(tmp_path / "root")
    message = refusal(tmp_path / "root", opener)
    assert message.startswith(str(tmp_path / "root")) and expected in message


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pictures_of_a_class_to_split_are_refused(count: int, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "pets", cat=9, dog=count)
    message = refusal(root)
    assert message.startswith("pets: ") and "got 1 of 'dog' to take 1 from" in message
    assert len(open_test(str(root))) == 9 + count
    write_classes(root, dog=3)
    assert [part.labels.tolist().count(1) for part in parts(open_splits(str(root)))] == [1, 1, 1]


# what happened to pets/dog/000.tiff, and the words that must say so when it is read
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut-off": (lambda path: os.truncate(path, path.stat().st_size // 2), "dog/000.tiff: expected a picture ("),
    "gone": (Path.unlink, "dog/000.tiff: expected a picture (no such file)"),
    "without-range": (lambda path: Image.new("F", (4, 4)).save(path), "8 or 16 bits per channel"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_file_is_named_when_it_is_its_turn(case: str, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "pets", cat=2, dog=2)
    (root / "dog" / "000.png").unlink()
    Image.new("RGB", (64, 64)).save(root / "dog" / "000.tiff")
    data, (change, expected) = open_test(str(root)), UNREADABLE[case]
    change(root / "dog" / "000.tiff")
    batches = LabelledInputs(data, PLAIN).batches(2)
    assert next(batches)[0].shape == (2, 3, 4, 4)
    for read in (lambda: next(batches), lambda: data.picture(2)):
        message = checks.refusal(DataError, read)
        assert message.startswith(str(root / "dog" / "000.tiff")) and expected in message


def images(count: int, height: int, width: int, channels: int = 3, low: int = 0, high: int = 256) -> LabelledImages:
    shape = (count, height, width, 3) if channels == 3 else (count, height, width)
    pictures = np.random.default_rng(count).integers(low, high, shape, np.uint8)
    return LabelledImages("noise", ("a", "b"), np.arange(count) % 2, pictures, mirrored=True)


def test_batches_are_everything_in_order() -> None:
    data = images(7, 5, 6)
    batches = list(LabelledInputs(data, PLAIN).batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), data.labels)
    expected = PLAIN([Image.fromarray(picture) for picture in pixels(data)])
    assert np.array_equal(np.concatenate([inputs for inputs, _ in batches]), expected)


# height and width of the pictures, what the network was designed for, and the suggestion
SIZES = [((8, 8), 32, 16), ((8, 8), 12, 12), ((50, 20), 224, 40), ((63, 200), 224, 126), ((64, 64), 224, 224)]


@pytest.mark.parametrize(("shape", "designed", "expected"), SIZES)
def test_suggested_size(shape: tuple[int, int], designed: int, expected: int) -> None:
    assert suggest_size(images(1, *shape), designed) == expected


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_suggested_statistics_are_those_of_the_inputs(channels: int) -> None:
    data = images(40, 8, 8, channels, low=20, high=120)
    suggested = suggest_preprocessing(data, (20, 16))
    assert (suggested.size, suggested.resize, suggested.channels) == ((20, 16), (20, 16), channels)
    inputs = data.inputs(range(len(data)), suggested).astype(np.float64)
    half = 0.5e-4 / min(suggested.std) + (inputs.size / channels) ** 0.5 * 2**-24  # of four decimals; sums in float32
    assert abs(inputs.mean(axis=(0, 2, 3))).max() < half and abs(inputs.std(axis=(0, 2, 3)) - 1).max() < half


def test_suggestion_for_large_pictures_and_those_of_one_colour() -> None:
    expected = Preprocessing((224, 224), (256, 256), IMAGENET_MEAN, IMAGENET_STD)
    assert suggest_preprocessing(images(2, 70, 80), (224, 224)) == expected
    assert suggest_preprocessing(images(2, 70, 80), (63, 63)).mean != IMAGENET_MEAN
    grey = suggest_preprocessing(images(2, 70, 80, channels=1), (64, 64))
    assert (grey.channels, grey.resize) == (1, (64, 64))
    assert suggest_preprocessing(images(2, 8, 8, channels=1, low=51, high=52), (8, 8)).mean == (0.2,)
    assert min(suggest_preprocessing(images(2, 8, 8, low=51, high=52), (8, 8)).std) > 0


@pytest.mark.parametrize(("modes", "channels"), [("LL", 1), ("DL", 1), ("LC", 3)], ids=["grey", "16-bit", "mixed"])
def test_suggested_colours_of_files(modes: str, channels: int, tmp_path: Path) -> None:
    for mode, name in zip(modes, ("cat", "dog"), strict=True):
        folder = write_pictures(tmp_path / "pets" / name, 2, mode="RGB" if mode == "C" else "L")
        if mode == "D":
            Image.fromarray(np.full((5, 6), 40000, np.uint16)).save(folder / "deep.png")
    assert suggest_preprocessing(open_test(str(tmp_path / "pets")), (6, 6)).channels == channels
