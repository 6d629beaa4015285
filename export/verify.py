"""Check a bundle again, on the machine it is on: first that it is whole, then that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError

from export.bundle import read_verified
from export.capture import Batch
from export.errors import ExportError, MissingDependency
from export.golden import GOLDEN_FILE, load_golden
from export.lowering.onnx_file import ONNX_FILE, OnnxFile
from export.lowering.tensorrt_engine import FLAVOURS, Engine, import_flavour
from export.manifest import FORMAT
from export.parity.ladder import execute, judge, reference_rungs, unexecuted_rung
from export.parity.report import Rung
from export.pipeline import ENGINE_FACTOR
from export.precision import PRECISIONS, Precision
from export.runners import OnnxRuntimeRunner, TensorRTRunner


def verify_bundle(bundle: str | Path, progress: Callable[[str], None] = lambda step: None) -> list[Rung]:
    """Check every file of a bundle, then run its golden inputs through each artefact this machine can run.

    Returns:
        Two rungs for the eager model that was exported and one for each artefact. The bundle passes when every
        executed rung is true; there is at least the ONNX file's.

    Raises:
        ExportError: not a bundle, or a file is missing, changed, unlisted or a link; names the file.
        MissingDependency: ONNX Runtime is not installed.
    """
    bundle = Path(bundle)
    progress("check the files")
    manifest, contents = read_verified(bundle)
    if manifest.get("format") != FORMAT:
        raise ExportError(f"{bundle} has format {manifest.get('format')}: this version reads format {FORMAT}")
    try:
        precision = PRECISIONS[manifest["precision"]]
        batch = Batch(*(manifest["batch"][key] for key in ("min", "opt", "max")))
        names = tuple(output["name"] for output in manifest["outputs"])
        engines = [_engine(name, facts, contents, precision) for name, facts in manifest["engines"].items()]
        references = load_golden(contents[GOLDEN_FILE])
        model = onnx.load_model_from_string(contents[ONNX_FILE])
    except (KeyError, TypeError, AttributeError, StopIteration, DecodeError) as error:
        raise ExportError(f"{bundle}: not a bundle of this project ({type(error).__name__}: {error})") from error
    rungs = reference_rungs(references, precision)
    progress(f"run {ONNX_FILE}")
    execution = execute(OnnxRuntimeRunner(OnnxFile(model, names, {}), precision), references.images, batch)
    rungs.append(judge(execution, references, precision, precision.network_factor))
    for engine in engines:
        progress(f"run {engine.flavour.file_name}")
        reason = _why_not_runnable(engine)
        if reason:
            rungs.append(unexecuted_rung(engine, reason))
        else:
            execution = execute(TensorRTRunner(engine, names), references.images, batch)
            rungs.append(judge(execution, references, precision, ENGINE_FACTOR))
    return rungs


def _engine(name: str, facts: dict[str, Any], contents: dict[str, bytes], precision: Precision) -> Engine:
    """An engine from the bytes that were checked: only under the name its flavour has in a bundle."""
    flavour = next(f for f in FLAVOURS.values() if f.file_name == name and f.name == facts["flavour"])
    return Engine(flavour, contents[name], facts["version"], precision, facts["convolutions"], facts["build_seconds"])


def _why_not_runnable(engine: Engine) -> str:
    """Why this machine cannot run an engine: asked before the engine, which is code, is deserialised."""
    try:
        installed = import_flavour(engine.flavour).__version__
    except MissingDependency as error:
        return str(error)
    if installed != engine.version:
        return f"built by {engine.flavour.name} {engine.version}, {installed} is installed: export again with it"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU here"
