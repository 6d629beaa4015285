"""The user's private cache: folders that nobody else can read or write."""

from __future__ import annotations

import os
from pathlib import Path

from export.base.errors import ExportError


def cache_path(name: str) -> Path:
    """resnet-deploy/<name> in $XDG_CACHE_HOME or ~/.cache; raises RuntimeError where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # which does not count where it is relative
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "resnet-deploy" / name


def check_private(folder: Path) -> None:
    """Raises ExportError where a folder is not this user's own and closed to others, OSError where there is none."""
    facts = folder.lstat()
    if folder.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ExportError(f"{folder} is not private to this user (expected mode 0700)")


def private_folder(name: str) -> Path:
    """The folder at `cache_path`, made where it is missing.

    Raises:
        ExportError: it is not private to this user.
        OSError, RuntimeError: it cannot be made.
    """
    folder = cache_path(name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_private(folder)
    return folder
