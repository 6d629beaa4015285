"""Files that appear whole or not at all, and what is in a folder and not hidden."""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from resnet.errors import ResNetError

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file in place of an older one, in one step.

    Raises:
        OSError: with nothing left behind. A process that is killed may leave `.<name>.<random>.partial` beside it.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # of its own: another may write too
    with beside.open("xb") as stream:
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink()
            raise


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, and of each folder the pictures in it.

    Raises:
        ResNetError: a folder without a picture, or a path of nothing.
    """
    found: list[Path] = []
    for path in paths:
        inside = pictures_in(path) if path.is_dir() else [path]
        if not inside:
            raise ResNetError(f"{path}: expected pictures ({', '.join(PICTURE_SUFFIXES)}), got a folder without any")
        if not inside[0].is_file():
            raise ResNetError(f"{path}: expected a picture (no such file)")
        found += inside
    return found


def pictures_in(folder: Path) -> list[Path]:
    """The files in a folder, at whatever depth, that are pictures by their names; in the order of their names."""
    found = (path for path in folder.rglob("*") if is_picture(path) and not is_hidden(path.relative_to(folder)))
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether a path is a file that is a picture by its name."""
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder it is in, has a name that begins with a dot; `path` is relative to what is shown."""
    return any(part.startswith(".") for part in path.parts)


def visible_folders(root: Path) -> list[Path]:
    """The folders in a folder, sorted, without those whose names begin with a dot."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
