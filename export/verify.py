"""Check a bundle again, on the machine it is on: first that it is whole, then that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from export.bundle import ONNX_FORMS
from export.errors import ExportError
from export.golden import GOLDEN_FILE, load_golden
from export.inference import open_bundle
from export.lowering.onnx_file import OnnxFile
from export.lowering.tensorrt_engine import why_not_runnable
from export.parity.ladder import execute, judge, reference_rungs, unexecuted_rung
from export.parity.report import Rung
from export.pipeline import ENGINE_FACTOR
from export.runners import OnnxRuntimeRunner
from export.tensorrt_runner import TensorRTRunner


def verify_bundle(bundle: str | Path, progress: Callable[[str], None] = lambda step: None) -> list[Rung]:
    """Check every file of a bundle, then run its golden inputs through each artefact this machine can run.

    Returns:
        Two rungs for the eager model that was exported and one for each artefact. The bundle passes when every
        executed rung is true; there is at least the ONNX file's.

    Raises:
        ExportError: not a bundle, or a file is missing, changed, unlisted or a link; names the file.
        MissingDependency: ONNX Runtime is not installed.
    """
    progress("check the files")
    opened = open_bundle(bundle)
    precision, batch, names = opened.precision, opened.batch, tuple(opened.outputs)
    if GOLDEN_FILE not in opened.contents:
        raise ExportError(f"{bundle}: expected {GOLDEN_FILE}, which is not listed in its manifest")
    references = load_golden(opened.contents[GOLDEN_FILE])
    rungs = reference_rungs(references, precision)
    for file in ONNX_FORMS:
        if file in opened.contents:
            progress(f"run {file}")
            runner = OnnxRuntimeRunner(OnnxFile(opened.onnx_model(file), names, {}), precision, file)
            execution = execute(runner, references.images, batch)
            rungs.append(judge(execution, references, precision, precision.network_factor))
    for engine in opened.engines:
        progress(f"run {engine.flavour.file_name}")
        reason = why_not_runnable(engine)
        if reason:
            rungs.append(unexecuted_rung(engine, reason))
        else:
            execution = execute(TensorRTRunner(engine, names), references.images, batch)
            rungs.append(judge(execution, references, precision, ENGINE_FACTOR))
    return rungs
