"""A folder that a server reads: written whole or not at all, and replaced only where it was written by this."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from export.base.errors import ExportError
from export.runtime.artefacts import artefacts
from export.runtime.bundle.contents import Bundle
from export.runtime.bundle.folder import names_in, place, staged
from export.runtime.engines.engine import FLAVOURS, Engine
from export.runtime.parity.network import VALUES, OutputKind

MARK = "# Written by resnet-deploy serve-config, which may replace this folder with all that is in it."
_TENSORRT = FLAVOURS["tensorrt"]


@dataclass(frozen=True)
class Served:
    """What a server reads of one model.

    Attributes:
        path: its folder.
        config: the name of the file that configures it.
        files: name, which may lie in a folder of one level -> content; the config among them.
        own: a pattern of the names of what may be there and be replaced.
        summary: what it is, in one line.
    """

    path: Path
    config: str
    files: Mapping[str, bytes] = field(repr=False)
    own: str = field(repr=False)
    summary: str

    def write(self) -> None:
        """Put it in its place, or in that of one that was written before.

        Raises:
            ExportError: the folder holds something else, or cannot be written; it is as it was.
        """
        check = partial(_check_ours, config=self.config, own=self.own)
        with staged(self.path, check) as staging:
            place(staging, self.path, self.files, check)


def _check_ours(folder: Path, config: str, own: str) -> None:
    if not names_in(folder):
        return
    paths = sorted(folder.rglob("*"))
    found = {path.relative_to(folder).as_posix(): path for path in paths if path.is_symlink() or not path.is_dir()}
    foreign = [name for name in found if not re.fullmatch(own, name)]
    if foreign:
        raise ExportError(f"{folder} holds {foreign[0]}, which was not written by this: choose another folder")
    if config not in found or found[config].is_symlink() or MARK not in found[config].read_text(errors="replace"):
        raise ExportError(f"{folder} exists and was not written by this: choose another folder")


def tensorrt_engine(bundle: Bundle) -> tuple[Engine | None, list[str]]:
    """The engine to serve: the one this machine built, else the bundle's; and a line for each that is not.

    Raises:
        ExportError: what was built here is not what was written.
    """
    notes, chosen = [], None
    for artefact in artefacts(bundle):
        if artefact.engine is None or chosen is not None:
            continue
        if artefact.engine.flavour != _TENSORRT:
            notes.append(f"{artefact.file} is left out: it is for {artefact.engine.flavour.name}, not for TensorRT")
        elif Path(artefact.file).is_absolute() and artefact.obstacle:
            notes.append(f"{artefact.file} is left out: {artefact.obstacle}")
        else:
            chosen = artefact.engine
    return chosen, notes


def labels(bundle: Bundle) -> list[str] | None:
    """What the first output's scores stand for; None where they have no names, or it is no scores.

    Raises:
        ExportError: the names do not fit the output.
    """
    first, shape = next(iter(bundle.outputs.items()))
    scores = len(shape) == 2 and bundle.kinds.get(first, OutputKind()).kind != VALUES
    return bundle.classes if scores else None
