"""The user's private cache: folders that nobody else can read or write, and records that are kept in one."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from export.base.errors import ExportError

_LOG = logging.getLogger(__name__)


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


class Records:
    """JSON by key in the private folder of a name. A cache that cannot be had or written is not worth an error."""

    def __init__(self, name: str) -> None:
        self._name, self._folder = name, None
        try:
            self._folder = private_folder(name)
        except ExportError as error:
            _LOG.warning("%s: %s not cached", error, name)
        except (OSError, RuntimeError) as error:
            _LOG.debug("%s not cached: %s", name, error)

    def read(self, key: str) -> Any:
        """What was kept under a key; None where there is nothing that is JSON."""
        try:
            return None if self._folder is None else json.loads((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def write(self, key: str, record: Any) -> None:
        """Keep a record, whole or not at all."""
        if self._folder is None:
            return
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False) as stream:
                try:
                    json.dump(record, stream)
                    stream.flush()
                    os.replace(stream.name, self._folder / f"{key}.json")
                except BaseException:
                    os.unlink(stream.name)
                    raise
        except OSError as error:
            _LOG.debug("%s not cached: %s", self._name, error)
