"""From a model to a verified bundle: capture, fuse, lower, run every form, compare, write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export.accuracy import Accuracy, Labelled, class_count, class_indices, lost_accuracy, measure
from export.batch import DEFAULT_BATCH, Arrays, Batch, as_batch, run_in_batches
from export.bundle import ONNX_FILE, publish, staged
from export.capture import check_model, describe_value
from export.errors import ExportError
from export.forms import Forms, floating_forms, quantised_forms, quantised_programs
from export.golden import GOLDEN_FILE, save_golden
from export.graph import module_path
from export.images import crops, photographs
from export.lowering.engine_config import DEFAULT_ENGINE, EngineConfig
from export.lowering.onnx_file import output_names
from export.lowering.tensorrt_engine import FLAVOURS, Engine, build_engine, why_not_buildable, why_not_runnable
from export.manifest import describe
from export.onnx_session import import_onnxruntime
from export.parity.evidence import check_evidence
from export.parity.ladder import (
    ENGINE_FACTOR,
    References,
    attempt,
    execute,
    judge,
    judge_attempt,
    operator_images,
    reference_rungs,
)
from export.parity.references import run_references, run_simulations
from export.parity.report import ParityReport
from export.passes import DEFAULT_LEVEL, QUANTISED_LEVEL
from export.passes.quantise import quantisable
from export.passes.split_addition import split_addition
from export.precision import FORMATS, INT8, PRECISIONS, Precision
from export.program import Coverage, FusedProgram, fuse
from export.progress import Progress, silent, sparsely
from export.quantisation.calibration import DEFAULT_METHOD, METHODS, Pictures, calibrate
from export.quantisation.sensitivity import choose, fewest_kept, layer_costs
from export.runner import Runner
from export.runners import EagerRunner, ProgramRunner
from export.tensorrt_runner import TensorRTRunner

PARITY_IMAGES = 16
AUTO = "auto"


@dataclass(frozen=True)
class ExportConfig:
    """What to export.

    Attributes:
        precision: `fp32`, `fp16`, `bf16` or `int8`.
        batch: the batch sizes the artefacts accept; also (minimum, optimum, maximum) or one static size.
        engine: `none`, `tensorrt`, `tensorrt-rtx`, or `auto` for each that can be built here.
        engine_config: how engines are built.
        calibration_method: int8 only; one of `export.quantisation.calibration.METHODS`.
        keep_fp16: int8 only; layers, or modules that hold them, to keep in floating point: float16 for TensorRT,
            float32 for CPUs. `auto` finds the fewest with which the accuracy is retained.
    """

    precision: str = "fp32"
    batch: Batch | tuple[int, int, int] | int = DEFAULT_BATCH
    engine: str = "auto"
    engine_config: EngineConfig = DEFAULT_ENGINE
    calibration_method: str = DEFAULT_METHOD
    keep_fp16: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        if self.precision not in FORMATS:
            raise ExportError(f"expected a precision of {', '.join(FORMATS)}, got {self.precision!r}")
        if self.calibration_method not in METHODS:
            expected = ", ".join(METHODS)
            raise ExportError(f"expected a calibration method of {expected}, got {self.calibration_method!r}")
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
    calibration: Pictures | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = silent,
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
        calibration: int8 only; inputs whose activations set the scales, none of which accuracy is measured on.
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
    _check_calibration(config, calibration, labelled)
    precision = FORMATS[config.precision]
    flavours, skipped = _flavours(config, batch)
    import_onnxruntime()  # a missing package is known before any work is done
    with staged(output) as staging:
        progress("capture and fuse")
        program = fuse(model, example, batch, DEFAULT_LEVEL if calibration is None else QUANTISED_LEVEL)
        names, accuracy = output_names(program.graph_module), []
        if labelled is not None:
            indices = class_indices(labelled.classes, (metadata or {}).get("classes"), class_count(_logits(program)))
            accuracy.append(
                _measure(EagerRunner(model, torch.float32, names), "fp32", labelled, indices, batch, progress)
            )
        if calibration is not None:

            def retains(quantised: FusedProgram) -> bool:
                assert labelled is not None
                runner = ProgramRunner(quantised, PRECISIONS["fp32"], names)
                return not lost_accuracy(
                    (accuracy[0], _measure(runner, INT8.name, labelled, indices, batch, sparsely(progress)))
                )

            forms = _quantised(program, example, config, calibration, images, retains, progress)
        else:
            forms = floating_forms(program, example, PRECISIONS[config.precision], progress)
        files = {name: onnx_file.serialize() for name, onnx_file in forms.files.items()}
        engines = _build_engines(flavours, files[ONNX_FILE], precision, program, config.engine_config, forms, progress)
        for engine in engines:
            files[engine.flavour.file_name] = engine.plan
            files[engine.flavour.layers_name] = (json.dumps(engine.layers, indent=1) + "\n").encode()
        inputs = images.detach().cpu().float().numpy()
        report, references = _compare(model, program, forms, engines, precision, inputs, progress)
        if labelled is not None:
            executed = {rung.name for rung in report.rungs if not rung.not_run}
            runners = [candidate.runner for candidate in forms.candidates if candidate.measured]
            runners += [TensorRTRunner(engine, names) for engine in engines if engine.flavour.name in executed]
            for runner in runners:
                accuracy.append(_measure(runner, precision.name, labelled, indices, batch, progress))
            report = replace(report, accuracy=tuple(accuracy))
        if report:
            progress("write the bundle")
            files["parity.json"] = (json.dumps(report.to_json(), indent=2) + "\n").encode()
            files[GOLDEN_FILE] = save_golden(references)
            onnx_file, found = forms.files[ONNX_FILE], (report.accuracy, report.quantisation)
            publish(staging, output, files, describe(program, onnx_file, engines, precision, metadata or {}, *found))
    sizes = {name: len(content) for name, content in files.items()}
    return ExportResult(output, report, program.coverage, skipped, sizes, time.perf_counter() - started)


def _quantised(
    program: FusedProgram,
    example: Tensor,
    config: ExportConfig,
    calibration: Pictures,
    images: Tensor,
    retains: Callable[[FusedProgram], bool],
    progress: Progress,
) -> Forms:
    """Calibrate, find what each layer costs and which are kept, and write the quantised files.

    `retains` says whether a quantised program keeps the accuracy.
    """
    layers = [module_path(layer) for layer in quantisable(program.master)]
    kept = frozenset() if config.keep_fp16 == AUTO else choose(layers, config.keep_fp16)
    progress(f"calibrate on {len(calibration)} images")
    calibrated = calibrate(
        split_addition(program.master), calibration, config.calibration_method, program.batch, progress
    )
    progress("quantise one layer at a time")
    shown = torch.from_numpy(operator_images(images.detach().cpu().float().numpy(), program.batch))
    costs = layer_costs(program.master, calibrated.ranges, shown, progress)
    if config.keep_fp16 == AUTO:
        progress("look for the fewest layers to keep in fp16")
        kept = fewest_kept(
            costs, lambda kept: all(map(retains, quantised_programs(program, calibrated, kept).values()))
        )
    if kept >= set(layers):
        raise ExportError(f"all {len(layers)} layers would be kept in fp16, nothing is left to quantise: use --fp16")
    return quantised_forms(program, example, calibrated, kept, tuple(costs), progress)


def _flavours(config: ExportConfig, batch: Batch) -> tuple[list[str], dict[str, str]]:
    """Which engines to build, and why the others are not."""
    asked = config.engine_config
    if config.engine == "none":
        if asked.flags:
            raise ExportError(f"{', '.join(asked.flags)}: expected an engine to build, got --engine none")
        return [], {}
    reasons = {}
    for name, flavour in FLAVOURS.items():
        if config.engine in ("auto", name):
            why_not = asked.why_not(name, config.precision, batch)
            reasons[name] = why_not or why_not_buildable(flavour, asked.dla_core)
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if config.engine in skipped or (asked.flags and skipped.keys() == reasons.keys()):
        raise ExportError("; ".join(f"--engine {name}: {reason}" for name, reason in skipped.items()))
    return [name for name in reasons if name not in skipped], skipped


def _build_engines(
    flavours: list[str],
    onnx_bytes: bytes,
    precision: Precision,
    program: FusedProgram,
    config: EngineConfig,
    forms: Forms,
    progress: Progress,
) -> list[Engine]:
    engines = []
    for name in flavours:
        progress(f"build the {name} engine")
        shape = program.image_shape
        engines.append(build_engine(onnx_bytes, FLAVOURS[name], precision, program.batch, shape, config, forms.kept))
    return engines


def _compare(
    model: nn.Module,
    program: FusedProgram,
    forms: Forms,
    engines: list[Engine],
    precision: Precision,
    images: NDArray,
    progress: Progress,
) -> tuple[ParityReport, References]:
    """Run every candidate first and the references after, so that none can see the other's results.

    Returns:
        The report, and the references of the precision that is exported.
    """
    names, executions = forms.files[ONNX_FILE].output_names, []
    for candidate in forms.candidates:
        progress(f"run the {candidate.runner.name} form")
        executions.append(execute(candidate.runner, images, program.batch))
    outcomes = [
        attempt(TensorRTRunner(engine, names), why_not_runnable(engine), precision, images, program.batch)
        for engine in engines
    ]
    progress("run the eager model")
    references = run_references(model, program, names, images, forms.arithmetic)
    outputs = [torch.from_numpy(values) for values in references.oracle.values()]
    progress("compare")
    shown = torch.from_numpy(operator_images(images, program.batch))
    evidence = check_evidence(program.source, shown, torch.from_numpy(images), outputs)
    rungs = reference_rungs(references, forms.arithmetic)
    by_precision = {forms.arithmetic: references}
    if forms.simulations:
        by_precision[precision] = run_simulations(references, forms.simulations)
        rungs += reference_rungs(by_precision[precision], precision)
    for candidate, execution in zip(forms.candidates, executions, strict=True):
        held, operators = candidate.precision, candidate.check(execution.trace)
        rungs.append(judge(execution, by_precision[held], held, held.network_factor, operators))
    rungs += [judge_attempt(outcome, by_precision[precision], precision, ENGINE_FACTOR) for outcome in outcomes]
    report = ParityReport(precision.name, len(images), evidence, tuple(rungs), quantisation=forms.quantisation)
    return report, by_precision[precision]


def _check_labelled(labelled: Labelled, example: Tensor) -> None:
    """Refuse what cannot be measured on before any work is done."""
    if len(labelled) == 0:
        raise ExportError("expected labelled pictures to measure accuracy on, got none")
    inputs, _ = next(iter(labelled.batches(1)))
    if inputs.shape != (1, *example.shape[1:]) or inputs.dtype != np.float32:
        expected = f"[N, *{list(example.shape[1:])}] float32"
        raise ExportError(f"expected labelled inputs of shape {expected}, got {list(inputs.shape)} {inputs.dtype}")


def _check_calibration(config: ExportConfig, calibration: Pictures | None, labelled: Labelled | None) -> None:
    """Refuse what cannot be calibrated or decided before any work is done."""
    if config.precision != INT8.name:
        if calibration is not None or config.keep_fp16:
            raise ExportError(f"--calibration and --keep-fp16 are for --int8, got --{config.precision}")
        return
    if calibration is None or not len(calibration):
        raise ExportError("int8 needs pictures to calibrate on, got none; give --calibration DIR")
    if config.keep_fp16 == AUTO and labelled is None:
        raise ExportError("--keep-fp16 auto needs labelled pictures to decide by, got none; give --data")


def _logits(program: FusedProgram) -> list[int | str]:
    """The shape of the first output."""
    (output,) = (node for node in program.source.graph.nodes if node.op == "output")
    first = next(node for node in pytree.tree_leaves(output.args) if isinstance(node, fx.Node))
    return ["batch", *(int(size) for size in first.meta["val"].shape[1:])]


def _measure(
    runner: Runner,
    precision: str,
    labelled: Labelled,
    indices: NDArray[np.int64],
    batch: Batch,
    progress: Progress,
) -> Accuracy:
    def infer(images: NDArray) -> Arrays:
        return run_in_batches(runner.infer, images, batch, batch.maximum)

    say = sparsely(progress)

    def report(images: int) -> None:
        say(f"measure accuracy: {runner.name}, {images} of {len(labelled)} images done")

    progress(f"measure accuracy: {runner.name}")
    with runner:
        return measure(runner.name, runner.runtime, precision, infer, labelled, indices, batch.maximum, report)
