"""From a model to a verified bundle: capture, fuse, lower, run every form, compare, write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.bundle import publish, staged
from export.capture import DEFAULT_BATCH, Batch, as_batch, check_model, describe_value
from export.errors import ExportError
from export.golden import GOLDEN_FILE, save_golden
from export.images import crops, photographs
from export.lowering.onnx_file import ONNX_FILE, OnnxFile, lower_onnx
from export.lowering.tensorrt_engine import FLAVOURS, Engine, build_engine, why_not_buildable
from export.manifest import describe
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
from export.runners import OnnxRuntimeRunner, ProgramRunner, Runner, TensorRTRunner, import_onnxruntime

PARITY_IMAGES = 16
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
        metadata: JSON-serialisable facts for the manifest, such as the model's name and its weights.
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
    precision = PRECISIONS[config.precision]
    flavours, skipped = _flavours(config.engine)
    import_onnxruntime()  # a missing package is known before any work is done
    with staged(output) as staging:
        progress("capture and fuse")
        program = fuse(model, example, batch)
        progress("write ONNX")
        facts = {"precision": precision.name, "batch": str(batch)}
        onnx_file = lower_onnx(program, example, precision, facts)
        files = {ONNX_FILE: onnx_file.serialize()}
        engines = _build_engines(flavours, files[ONNX_FILE], precision, program, progress)
        files |= {engine.flavour.file_name: engine.plan for engine in engines}
        inputs = images.detach().cpu().float().numpy()
        report, references = _compare(model, program, onnx_file, engines, precision, inputs, progress)
        if report:
            progress("write the bundle")
            files["parity.json"] = (json.dumps(report.to_json(), indent=2) + "\n").encode()
            files[GOLDEN_FILE] = save_golden(references)
            publish(staging, output, files, describe(program, onnx_file, engines, precision, metadata or {}))
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
    if not torch.cuda.is_available():
        return "no NVIDIA GPU here"
    try:
        return execute(TensorRTRunner(engine, names), images, batch)
    except ExportError as error:
        return str(error)
