"""Files that appear whole or not at all, and the folders that are not hidden."""

import os
import secrets
from pathlib import Path


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


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder it is in, has a name that begins with a dot; `path` is relative to what is shown."""
    return any(part.startswith(".") for part in path.parts)


def visible_folders(root: Path) -> list[Path]:
    """The folders in a folder, sorted, without those whose names begin with a dot."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
