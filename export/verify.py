"""Check a bundle again, on the machine it is on: first that it is whole, then that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import torch

from export.bundle import read_verified
from export.capture import Batch
from export.errors import ExportError, MissingDependency
from export.golden import load_golden
from export.lowering.onnx_file import ONNX_FILE, OnnxFile
from export.lowering.tensorrt_engine import FLAVOURS, Engine, import_flavour
from export.parity.ladder import execute, judge, reference_rungs, unexecuted_rung
from export.parity.report import Rung
from export.pipeline import ENGINE_FACTOR
from export.precision import PRECISIONS
from export.runners import OnnxRuntimeRunner, TensorRTRunner


def verify_bundle(bundle: str | Path, progress: Callable[[str], None] = lambda step: None) -> list[Rung]:
    """Check every file of a bundle, then run its golden inputs through each artefact this machine can run.

    Returns:
        A rung for the eager model that exported it and one for each artefact. The bundle passes when every
        executed rung is true; there is at least the ONNX file's.

    Raises:
        ExportError: not a bundle, or a file is missing, changed, unlisted or a link; names the file.
        MissingDependency: ONNX Runtime is not installed.
    """
    bundle = Path(bundle)
    progress("check the files")
    manifest = read_verified(bundle)
    try:
        precision = PRECISIONS[manifest["precision"]]
        batch = Batch(*(manifest["batch"][key] for key in ("min", "opt", "max")))
        names = tuple(output["name"] for output in manifest["outputs"])
        engines = manifest["engines"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{bundle}: the manifest lacks {error}") from error
    references = load_golden(bundle / "golden.safetensors")
    rungs = reference_rungs(references, precision)
    progress(f"run {ONNX_FILE}")
    model = OnnxFile(onnx.load(bundle / ONNX_FILE, load_external_data=False), names, {})
    execution = execute(OnnxRuntimeRunner(model, precision), references.images, batch)
    rungs.append(judge(execution, references, precision, precision.network_factor))
    for file_name, facts in engines:
        progress(f"run {file_name}")
        flavour = FLAVOURS[facts["flavour"]]
        plan = (bundle / file_name).read_bytes()
        engine = Engine(flavour, plan, facts["version"], precision, facts["convolutions"], facts["build_seconds"])
        reason = _why_not_runnable(engine)
        if reason:
            rungs.append(unexecuted_rung(engine, reason))
        else:
            execution = execute(TensorRTRunner(engine, names), references.images, batch)
            rungs.append(judge(execution, references, precision, ENGINE_FACTOR))
    return rungs


def _why_not_runnable(engine: Engine) -> str:
    """Why this machine cannot run an engine: asked before the engine, which is code, is deserialised."""
    try:
        installed = import_flavour(engine.flavour).__version__
    except MissingDependency as error:
        return str(error)
    if installed != engine.version:
        return f"built by {engine.flavour.name} {engine.version}, {installed} is installed: export again with it"
    return "" if torch.cuda.is_available() else "there is no NVIDIA GPU here"
