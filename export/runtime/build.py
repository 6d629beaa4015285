"""Build the engines of a bundle on this machine: verified first, then put in their place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.base.errors import ExportError
from export.base.private_cache import private_folder
from export.base.progress import Progress, silent
from export.runtime.artefacts import built_artefact
from export.runtime.bundle.contents import Bundle, open_bundle
from export.runtime.bundle.folder import staged
from export.runtime.engine_store import (
    ENGINES_FOLDER,
    BuiltEngine,
    engine_key,
    engine_place,
    read_place,
    why_not_usable,
    write_place,
)
from export.runtime.engines.engine import FLAVOURS, Flavour, build_engine
from export.runtime.engines.options import DEFAULT_ENGINE, EngineConfig
from export.runtime.onnx_session import ONNX_FILE
from export.runtime.parity.ladder import References
from export.runtime.parity.rungs import Rung
from export.runtime.verify import exported_rungs, golden_references, run_artefact


@dataclass(frozen=True)
class DeviceBuild:
    """What became of the engine of one flavour. True when it is in its place and computes what was exported.

    Attributes:
        rung: what it computes.
        file: where the engine is, or would be.
        origin: `built`, `kept` for one that was there already, or `restored` for the one before it.
        size: in bytes.
    """

    rung: Rung
    file: Path
    origin: str
    size: int

    def __bool__(self) -> bool:
        return bool(self.rung)


def build_on_device(
    bundle: str | Path, config: EngineConfig = DEFAULT_ENGINE, progress: Progress = silent
) -> tuple[list[Rung], list[DeviceBuild]]:
    """Build an engine of each flavour that runs here from a bundle's ONNX file and hold it to the golden outputs.

    Only an engine that passes takes the place of the one before it, which is kept beside it. Where one of the two was
    built from the same file for the same machine, nothing is built.

    Args:
        bundle: its folder; every file is checked first.
        config: how to build.
        progress: called with the name of each step as it begins.

    Returns:
        Rungs for what rounding alone made of the model when it was exported, with one that fails where that was
        without a verdict, and what became of each engine.

    Raises:
        ExportError: the bundle or what was built before is not what was written; there is no GPU or no TensorRT; an
            engine cannot be built, or another process is building it. What was in its place still is.
    """
    progress("check the files")
    opened = open_bundle(bundle)
    references = golden_references(opened)
    obstacles = {
        flavour: why_not_usable(flavour) or config.why_not(name, opened.precision.name, opened.batch)
        for name, flavour in FLAVOURS.items()
    }
    usable = [flavour for flavour, obstacle in obstacles.items() if not obstacle]
    if not usable:
        raise ExportError("; ".join(f"no {flavour.name} engine: {reason}" for flavour, reason in obstacles.items()))
    private_folder(ENGINES_FOLDER)
    builds = [_build(opened, flavour, config, references, progress) for flavour in usable]
    return exported_rungs(opened, references), builds


def _build(
    bundle: Bundle, flavour: Flavour, config: EngineConfig, references: References, progress: Progress
) -> DeviceBuild:
    place = engine_place(bundle.path, flavour)
    key = engine_key(bundle.onnx_sha256, bundle.precision, bundle.batch, flavour, config)
    held = read_place(place)
    if held and held[0].key == key:
        return _verified(bundle, held[0], "kept", references, progress)
    with staged(place) as staging:
        held = read_place(place)  # another process may have built since
        found = next((built for built in held if built.key == key), None)
        origin = "built" if found is None else "kept" if found is held[0] else "restored"
        if found is None:
            found = _built(bundle, flavour, config, key, progress)
        build = _verified(bundle, found, origin, references, progress)
        if not build and origin == "restored":
            found, origin = _built(bundle, flavour, config, key, progress), "built"
            build = _verified(bundle, found, origin, references, progress)
        if build and origin != "kept":
            progress(f"put it in {place}")
            write_place(staging, place, [found, *held[:1]])
        return build


def _built(
    bundle: Bundle, flavour: Flavour, config: EngineConfig, key: dict[str, Any], progress: Progress
) -> BuiltEngine:
    progress(f"build the {flavour.name} engine")
    content = bundle.contents[ONNX_FILE]
    engine = build_engine(content, flavour, bundle.precision, bundle.batch, bundle.inputs, config, bundle.kept)
    return BuiltEngine(engine, key)


def _verified(
    bundle: Bundle, built: BuiltEngine, origin: str, references: References, progress: Progress
) -> DeviceBuild:
    """Hold an engine to the golden outputs.

    Raises:
        ExportError: it cannot be run at all, so nothing is known of it.
    """
    artefact = built_artefact(bundle, built)
    if artefact.obstacle:
        raise ExportError(f"the {built.engine.flavour.name} engine does not run here: {artefact.obstacle}")
    rung = run_artefact(bundle, artefact, references, progress)
    return DeviceBuild(rung, Path(artefact.file), origin, len(built.engine.plan))
