"""From a model to a verified bundle: capture, fuse, lower, run every form, compare, write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.accuracy import Accuracy, Labelled, class_count, class_indices, measure
from export.batch import DEFAULT_BATCH, Arrays, Batch, as_batch, run_in_batches
from export.bundle import ONNX_FILE, publish, staged
from export.capture import check_model, describe_value
from export.errors import ExportError
from export.golden import GOLDEN_FILE, save_golden
from export.images import crops, photographs
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.tensorrt_engine import FLAVOURS, Engine, build_engine, why_not_buildable, why_not_runnable
from export.manifest import describe, value_facts
from export.onnx_session import import_onnxruntime
from export.parity.evidence import check_evidence
from export.parity.ladder import (
    Execution,
    References,
    execute,
    judge,
    operator_images,
    reference_rungs,
    run_references,
    unexecuted_rung,
)
from export.parity.operators import check_operators
from export.parity.report import ParityReport
from export.precision import PRECISIONS, Precision
from export.program import Coverage, FusedProgram, fuse
from export.runners import EagerRunner, OnnxRuntimeRunner, ProgramRunner, Runner, TensorRTRunner

PARITY_IMAGES = 16
_SECONDS_BETWEEN_REPORTS = 15.0
ENGINE_FACTOR = 3.0  # k for TensorRT, which chooses its own fusions and accumulation orders


@dataclass(frozen=True)
class ExportConfig:
    """What to export.

    Attributes:
        precision: `fp32`, `fp16` or `bf16`.
        batch: the batch sizes the artefacts accept; also (minimum, optimum, maximum) or one static size.
        engine: `none`, `tensorrt`, `tensorrt-rtx`, or `auto` for each that can be built here.
    """

    precision: str = "fp32"
    batch: Batch | tuple[int, int, int] | int = DEFAULT_BATCH
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ExportError(f"expected a precision of {', '.join(PRECISIONS)}, got {self.precision!r}")
        object.__setattr__(self, "batch", as_batch(self.batch))
        if self.engine not in ("auto", "none", *FLAVOURS):
            raise ExportError(f"expected an engine of auto, none, {', '.join(FLAVOURS)}, got {self.engine!r}")


@dataclass(frozen=True)
class ExportResult:
    """What an export did. True when every form equals the eager model and the bundle is in place.

    Attributes:
        output: the bundle's folder; written only when true.
        report: every comparison.
        coverage: what was fused and what was left.
        skipped: engine flavour -> why it was not built.
        files: name -> size in bytes of each file built.
        seconds: what the whole export took.
    """

    output: Path
    report: ParityReport
    coverage: Coverage
    skipped: Mapping[str, str]
    files: Mapping[str, int]
    seconds: float

    def __bool__(self) -> bool:
        return bool(self.report)


def export_bundle(
    model: nn.Module,
    example: Tensor,
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    images: Tensor | None = None,
    labelled: Labelled | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> ExportResult:
    """Export `model` into a bundle at `output`, provided every form of it equals the eager model.

    Args:
        model: any nn.Module in eval mode with one image input; left as it was.
        example: [N, C, H, W], floating point; gives channels and image size; left as it was.
        output: the bundle's folder; an older bundle there is replaced in one step, or left as it was.
        config: precision, batch sizes and engines.
        images: [N, C, H, W], what to compare on, as the model expects it; default: crops of the two
            photographs that come with scikit-learn.
        labelled: what to measure accuracy on, before the export and after it; default: it is not measured. Every
            form must keep 99 % of the eager model's.
        metadata: JSON-serialisable facts for the manifest, such as the model's name and its weights. `classes`, if
            given, are the names of the logits, by which the classes of `labelled` are found.
        progress: called with the name of each step as it begins.

    Raises:
        ExportError: the model, an argument or the folder is refused, or a file cannot be built; one line.
    """
    started, output, config = time.perf_counter(), Path(output), config or ExportConfig()
    check_model(model, example)
    batch = as_batch(config.batch)
    try:
        json.dumps(dict(metadata or {}))
    except (TypeError, ValueError) as error:
        raise ExportError(f"expected metadata that JSON can hold: {error}") from error
    if images is None:
        _, channels, *size = example.shape
        images = crops(photographs(), PARITY_IMAGES, channels, (size[0], size[1]))
    if not isinstance(images, Tensor) or images.shape[1:] != example.shape[1:] or len(images) == 0:
        raise ExportError(f"expected images of shape [N, *{list(example.shape[1:])}], got {describe_value(images)}")
    if labelled is not None:
        _check_labelled(labelled, example)
    precision = PRECISIONS[config.precision]
    flavours, skipped = _flavours(config.engine)
    import_onnxruntime()  # a missing package is known before any work is done
    with staged(output) as staging:
        progress("capture and fuse")
        program = fuse(model, example, batch)
        progress("write ONNX")
        onnx_file = lower_onnx(program, example, precision, {"precision": precision.name, "batch": str(batch)})
        files = {ONNX_FILE: onnx_file.serialize()}
        accuracy = []
        if labelled is not None:
            indices = _class_indices(labelled, onnx_file, metadata or {})
            eager = EagerRunner(model, torch.float32, onnx_file.output_names)
            accuracy.append(_measure(eager, "fp32", labelled, indices, batch, progress))
        engines = _build_engines(flavours, files[ONNX_FILE], precision, program, progress)
        files |= {engine.flavour.file_name: engine.plan for engine in engines}
        inputs = images.detach().cpu().float().numpy()
        report, references = _compare(model, program, onnx_file, engines, precision, inputs, progress)
        if labelled is not None:
            executed = {rung.name for rung in report.rungs if not rung.not_run}
            runnable = [engine for engine in engines if engine.flavour.name in executed]
            for runner in _exported_forms(program, onnx_file, runnable, precision):
                accuracy.append(_measure(runner, precision.name, labelled, indices, batch, progress))
            report = replace(report, accuracy=tuple(accuracy))
        if report:
            progress("write the bundle")
            files["parity.json"] = (json.dumps(report.to_json(), indent=2) + "\n").encode()
            files[GOLDEN_FILE] = save_golden(references)
            facts = describe(program, onnx_file, engines, precision, metadata or {}, report.accuracy)
            publish(staging, output, files, facts)
    sizes = {name: len(content) for name, content in files.items()}
    return ExportResult(output, report, program.coverage, skipped, sizes, time.perf_counter() - started)


def _flavours(engine: str) -> tuple[list[str], dict[str, str]]:
    """Which engines to build, and why the others are not."""
    if engine == "none":
        return [], {}
    reasons = {name: why_not_buildable(flavour) for name, flavour in FLAVOURS.items() if engine in ("auto", name)}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if engine in skipped:
        raise ExportError(f"--engine {engine}: {skipped[engine]}")
    return [name for name in reasons if name not in skipped], skipped


def _build_engines(
    flavours: list[str], onnx_bytes: bytes, precision: Precision, program: FusedProgram, progress: Callable[[str], None]
) -> list[Engine]:
    engines = []
    for name in flavours:
        progress(f"build the {name} engine")
        engines.append(build_engine(onnx_bytes, FLAVOURS[name], precision, program.batch, program.image_shape))
    return engines


def _compare(
    model: nn.Module,
    program: FusedProgram,
    onnx_file: OnnxFile,
    engines: list[Engine],
    precision: Precision,
    images: NDArray,
    progress: Callable[[str], None],
) -> tuple[ParityReport, References]:
    """Run every candidate first and the references after, so that none can see the other's results."""
    names, factor = onnx_file.output_names, precision.network_factor
    runners: list[Runner] = [ProgramRunner(program, precision, names), OnnxRuntimeRunner(onnx_file, precision)]
    if torch.cuda.is_available():
        runners.insert(1, ProgramRunner(program, precision, names, device="cuda"))
    executions = []
    for runner in runners:
        progress(f"run the {runner.name} form")
        executions.append(execute(runner, images, program.batch))
    engine_executions = [_execute_engine(engine, names, images, program.batch) for engine in engines]
    progress("run the eager model")
    references = run_references(model, program, names, images, precision)
    outputs = [torch.from_numpy(values) for values in references.oracle.values()]
    progress("compare")
    evidence = check_evidence(program.source, torch.from_numpy(operator_images(images, program.batch)), outputs)
    rungs = reference_rungs(references, precision)
    for execution in executions:
        separate = execution.name == OnnxRuntimeRunner.name  # standard ONNX adds in a node of its own
        operators = check_operators(program, precision, execution.trace, separate)
        rungs.append(judge(execution, references, precision, factor, operators))
    for engine, outcome in zip(engines, engine_executions, strict=True):
        if isinstance(outcome, str):
            rungs.append(unexecuted_rung(engine, outcome))
        else:
            rungs.append(judge(outcome, references, precision, ENGINE_FACTOR))
    return ParityReport(precision.name, len(images), evidence, tuple(rungs)), references


def _execute_engine(engine: Engine, names: tuple[str, ...], images: NDArray, batch: Batch) -> Execution | str:
    """What the engine computes, or why this machine cannot run it."""
    obstacle = why_not_runnable(engine)
    if obstacle:
        return obstacle
    try:
        return execute(TensorRTRunner(engine, names), images, batch)
    except ExportError as error:
        return str(error)


def _check_labelled(labelled: Labelled, example: Tensor) -> None:
    """Refuse what cannot be measured on before any work is done."""
    if len(labelled) == 0:
        raise ExportError("expected labelled pictures to measure accuracy on, got none")
    inputs, _ = next(iter(labelled.batches(1)))
    if inputs.shape != (1, *example.shape[1:]) or inputs.dtype != np.float32:
        expected = f"[N, *{list(example.shape[1:])}] float32"
        raise ExportError(f"expected labelled inputs of shape {expected}, got {list(inputs.shape)} {inputs.dtype}")


def _class_indices(labelled: Labelled, onnx_file: OnnxFile, metadata: Mapping[str, Any]) -> NDArray[np.int64]:
    count = class_count(value_facts(onnx_file.model.graph.output[0])["shape"])
    return class_indices(labelled.classes, metadata.get("classes"), count)


def _exported_forms(
    program: FusedProgram, onnx_file: OnnxFile, engines: Sequence[Engine], precision: Precision
) -> list[Runner]:
    """What accuracy is measured of; of the fused program's two forms the one that takes less time."""
    names, device = onnx_file.output_names, "cuda" if torch.cuda.is_available() else "cpu"
    return [
        ProgramRunner(program, precision, names, device),
        OnnxRuntimeRunner(onnx_file, precision),
        *(TensorRTRunner(engine, names) for engine in engines),
    ]


def _measure(
    runner: Runner,
    precision: str,
    labelled: Labelled,
    indices: NDArray[np.int64],
    batch: Batch,
    progress: Callable[[str], None],
) -> Accuracy:
    def infer(images: NDArray) -> Arrays:
        return run_in_batches(runner.infer, images, batch, batch.maximum)

    reported = time.perf_counter()

    def report(images: int) -> None:
        nonlocal reported
        if time.perf_counter() - reported >= _SECONDS_BETWEEN_REPORTS:
            reported = time.perf_counter()
            progress(f"measure accuracy: {runner.name}, {images} of {len(labelled)} images done")

    progress(f"measure accuracy: {runner.name}")
    with runner:
        return measure(runner.name, runner.runtime, precision, infer, labelled, indices, batch.maximum, report)
