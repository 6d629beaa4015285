"""Where engines built on this machine are kept, and what each was built for.

A place is a folder of the user's private cache, one for each bundle and flavour. Like a bundle it appears whole or not
at all and says when it was changed. It holds the engine in use and the one before it, to which there is a way back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.base.batch import Batch
from export.base.errors import ExportError, MissingDependency
from export.base.precision import FORMATS, Precision
from export.base.private_cache import cache_path, check_private
from export.runtime.bundle.folder import publish, read_verified
from export.runtime.engines.cuda_runtime import checked, gpu_name, import_cuda, why_no_gpu
from export.runtime.engines.engine import FLAVOURS, Engine, Flavour, import_flavour, why_not_served
from export.runtime.engines.options import EngineConfig

ENGINES_FOLDER = "engines"
_PREFIXES = ("", "previous.")  # of the files of the engine in use, and of those of the one before it
_NAME_LENGTH = 40  # characters of the bundle's own name in that of its place: file systems take 255 bytes


@dataclass(frozen=True)
class BuiltEngine:
    """An engine built on this machine.

    Attributes:
        engine: with its layers.
        key: all that it was built from and for, as `engine_key` says it.
    """

    engine: Engine
    key: Mapping[str, Any] = field(repr=False)


def engine_place(bundle: Path, flavour: Flavour) -> Path:
    """Where the engine of a bundle is kept; raises RuntimeError where the user has no home."""
    folder = bundle.resolve()
    short = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    return cache_path(ENGINES_FOLDER) / f"{folder.name[:_NAME_LENGTH]}-{flavour.name}-{short}"


def why_not_usable(flavour: Flavour) -> str:
    """Why this machine cannot build and run engines of a flavour, empty where it can."""
    try:
        import_flavour(flavour)
    except MissingDependency as error:
        return str(error)
    no_gpu = why_no_gpu(flavour.name)
    return no_gpu if no_gpu or flavour.needs_gpu else why_not_served(flavour)


def engine_key(
    onnx_sha256: str, precision: Precision, batch: Batch, flavour: Flavour, config: EngineConfig
) -> dict[str, Any]:
    """All that an engine built here and now depends on; another key is another engine.

    Raises:
        ExportError: the flavour's package or the GPU is missing.
    """
    return {
        "onnx_sha256": onnx_sha256,
        "precision": precision.name,
        "batch": str(batch),
        "flavour": flavour.name,
        "options": json.loads(json.dumps(config.to_json())),  # as it is read back
        **_machine(flavour),
    }


def why_outdated(built: BuiltEngine, onnx_sha256: str) -> str:
    """Why an engine that was built here is not what building from an ONNX file would give now; empty where it is."""
    flavour = built.engine.flavour
    if built.key.get("onnx_sha256") != onnx_sha256:
        return "built from another model.onnx"
    reason = why_not_usable(flavour)
    if reason:
        return reason
    machines = (built.key, _machine(flavour))
    then, now = (f"{flavour.name} {machine['version']} for {machine['gpu']}" for machine in machines)
    return "" if then == now else f"built by {then}; here is {now}"


def _machine(flavour: Flavour) -> dict[str, str]:
    """What of this machine an engine is bound to."""
    version = checked(import_cuda(flavour.name).cudaDriverGetVersion())
    gpu = f"{gpu_name(flavour.name)}, driver for CUDA {version // 1000}.{version % 1000 // 10}"
    return {"version": str(import_flavour(flavour).__version__), "gpu": gpu}


def read_place(place: Path) -> list[BuiltEngine]:
    """The engine in use and the one before it, once every byte is checked; empty where none was built.

    Raises:
        ExportError: the place is open to others, or a file is missing, changed, unlisted or a link; names it.
    """
    if not os.path.lexists(place):
        return []
    try:
        check_private(place.parent)
        manifest, contents = read_verified(place)
        return [_read(prefix, facts, contents) for prefix, facts in zip(_PREFIXES, manifest["engines"], strict=False)]
    except ExportError as error:
        raise ExportError(f"{error}; remove {place} and build the engine again") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        foreign = f"not an engine of this project ({type(error).__name__}: {error})"
        raise ExportError(f"{place}: {foreign}; remove it and build the engine again") from error


def write_place(staging: Path, place: Path, engines: Sequence[BuiltEngine]) -> None:
    """Put the engine in use, and the one before it if there is one, in their place; `staging` is of `staged`.

    Raises:
        ExportError: the disk is full or the folder cannot be written; the place is as it was.
    """
    files: dict[str, bytes] = {}
    records = []
    for prefix, built in zip(_PREFIXES, engines, strict=False):
        engine, flavour = built.engine, built.engine.flavour
        files[prefix + flavour.file_name] = engine.plan
        files[prefix + flavour.layers_name] = (json.dumps(engine.layers, indent=1) + "\n").encode()
        record = {"key": dict(built.key), "convolutions": engine.convolutions}
        records.append(record | {"build_seconds": round(engine.seconds, 2)})
    publish(staging, place, files, {"engines": records})


def _read(prefix: str, facts: Mapping[str, Any], contents: Mapping[str, bytes]) -> BuiltEngine:
    key = facts["key"]
    flavour = FLAVOURS[key["flavour"]]
    engine = Engine(
        flavour=flavour,
        plan=contents[prefix + flavour.file_name],
        version=key["version"],
        precision=FORMATS[key["precision"]],
        convolutions=facts["convolutions"],
        seconds=facts["build_seconds"],
        config=EngineConfig.from_json(key["options"]),
        layers=tuple(json.loads(contents[prefix + flavour.layers_name])),
    )
    return BuiltEngine(engine, key)
