"""From a model to a verified bundle: capture, fuse, lower, run every form, compare, write."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.base.batch import UINT8, count_of
from export.base.errors import ExportError
from export.base.memory import give_back
from export.base.precision import INT8, PRECISIONS, Precision
from export.base.progress import Progress, silent
from export.config import ExportConfig, choose_flavours
from export.criteria.batches import check_batches
from export.criteria.evidence import check_evidence
from export.criteria.normalised import with_normalised
from export.criteria.outputs import output_kinds
from export.criteria.references import run_references, run_simulations
from export.engines import build_engines, build_kernels, choose_targets, kernel_runner, prove_kernels
from export.forms import Form, Forms, floating_forms
from export.fusion.capture import Example
from export.fusion.description import describe_graph
from export.fusion.features import strides
from export.fusion.passes import DEFAULT_LEVEL, QUANTISED_LEVEL
from export.fusion.program import Coverage, FusedProgram, fuse, output_names, output_nodes
from export.golden_picture import PicturePreprocessing
from export.job import Job
from export.lowering.runners import EagerRunner, ProgramRunner, cast
from export.manifest import describe
from export.mixed_precision import keep_float32, quantise_network
from export.quantisation.calibration import NormalisedPictures, Pictures
from export.report.page import REPORT_FILE, render
from export.runtime.bundle.folder import file_entries, publish, staged
from export.runtime.bundle.golden import GOLDEN_FILE, save_golden
from export.runtime.engines.engine import Engine, why_not_runnable
from export.runtime.engines.runner import TensorRTRunner
from export.runtime.onnx_session import ONNX_FILE, import_onnxruntime
from export.runtime.parity.accuracy import Labelled, Meter, lost_accuracy
from export.runtime.parity.checks import OperatorChecks
from export.runtime.parity.ladder import (
    ENGINE_FACTOR,
    Execution,
    References,
    attempt,
    execute,
    judge,
    judge_attempt,
    operator_inputs,
    reference_rungs,
)
from export.runtime.parity.network import OutputKind
from export.runtime.parity.rungs import ParityReport

if TYPE_CHECKING:
    from export.lowering.kernel_engine import KernelEngine


@dataclass(frozen=True)
class ExportResult:
    """What an export did. True when every form equals the eager model and the bundle is in place.

    Attributes:
        output: the bundle's folder.
        report: every comparison.
        coverage: what was fused and what was left.
        skipped: engine flavour, or `sm_87 kernel` -> why it was not built.
        files: name -> size in bytes of each file built.
        seconds: what the whole export took.
        strides: name of an output that is a map -> pixels of the input from one cell to the next, (height, width).
    """

    output: Path
    report: ParityReport
    coverage: Coverage
    skipped: Mapping[str, str]
    files: Mapping[str, int]
    seconds: float
    strides: Mapping[str, tuple[int, int]]

    def __bool__(self) -> bool:
        return bool(self.report)

    @property
    def written(self) -> bool:
        """Whether the bundle is in place: where this is true, or was asked for without a verdict."""
        return self.report.written


def export_bundle(
    model: nn.Module,
    example: Example,
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    images: Example | None = None,
    labelled: Labelled | None = None,
    calibration: Pictures | None = None,
    preprocessing: PicturePreprocessing | None = None,
    metadata: Mapping[str, Any] | None = None,
    command: str = "",
    progress: Progress = silent,
) -> ExportResult:
    """Export `model` into a bundle at `output`, provided every form of it equals the eager model.

    With `ExportConfig.unverified` also where nothing is wrong but the evidence is too weak to say so: the bundle, its
    report and `verify` then say that there is no verdict, and the result is false.

    Args:
        model: any nn.Module in eval mode with one image input, or several inputs; left as it was.
        example: [N, C, H, W], floating point; gives channels and image size; left as it was. Of several inputs, images
            or vectors, the examples by the names of forward's parameters, all of one batch size:
            {"left": [N, C, H, W], "state": [N, D]}. The files call them so; a single input is called `input`.
        output: the bundle's folder; an older bundle there is replaced in one step, or left as it was.
        config: precision, batch sizes and engines.
        images: [N, C, H, W], what to compare on, as the model expects it; with `ExportConfig.input="uint8"` bytes
            [N, H, W, C], as are the inputs of `labelled` and `calibration`, while `example` stays as it is. Default:
            crops of the two photographs that come with scikit-learn. Of several inputs as many of each, by name; there
            is no default. Outputs have to vary from image to image by far more than rounding.
        labelled: what to measure accuracy on, before the export and after it; default: it is not measured. Every
            form must keep 99 % of the eager model's. Only for a model with one input.
        calibration: int8 only; inputs whose activations set the scales, none of which accuracy is measured on; of
            several inputs its batches have them by name, as `InMemory` of a dictionary does.
        preprocessing: from a picture to an input, as `resnet.data.preprocessing.Preprocessing` is; for the manifest,
            and for a golden picture that applications can test theirs on. `ExportConfig.input="uint8"` writes its
            `mean` and `std` into the files, and wants one that makes bytes. Of several inputs it is that of each.
        metadata: JSON-serialisable facts for the manifest, such as the model's name and its weights. `classes`, if
            given, are the names of the logits, by which the classes of `labelled` are found.
        command: that made the bundle, for its report.
        progress: called with the name of each step as it begins.

    Raises:
        ExportError: the model, an argument or the folder is refused, or a file cannot be built; one line.
    """
    started, output = time.perf_counter(), Path(output)
    job = Job.of(
        model,
        example,
        config or ExportConfig(),
        images,
        labelled=labelled,
        calibration=calibration,
        preprocessing=preprocessing,
        metadata=metadata or {},
        command=command,
        progress=progress,
    )
    flavours, skipped = choose_flavours(job.config)
    targets = choose_targets(job.config, skipped)
    import_onnxruntime()  # a missing package is known before any work is done
    with staged(output) as staging:
        progress("capture and fuse")
        program = fuse(job.model, example, job.batch, DEFAULT_LEVEL if calibration is None else QUANTISED_LEVEL)
        check_batches(program, job.inputs)
        names, classes = output_names(program.master), job.metadata.get("classes")
        kinds = output_kinds(program.source, names, job.config.outputs, labelled is not None, classes)
        job, left_out = job.quickened(program)
        meter = _meter(job, program)
        program, forms = _lower(job, program, meter)
        gc.collect()  # the graphs of torch.export and of the ONNX exporter, with weights of their own
        files = {name: onnx_file.serialize() for name, onnx_file in forms.files.items()}
        inputs = forms.files[ONNX_FILE].inputs
        engines = build_engines(flavours, files[ONNX_FILE], job.config, inputs, forms.kept, progress)
        for engine in engines:
            files[engine.flavour.file_name] = engine.plan
            files[engine.flavour.layers_name] = (json.dumps(engine.layers, indent=1) + "\n").encode()
        kernels = build_kernels(targets, program, job.config, skipped, progress, job.normalisation)
        files |= {engine.name: engine.content for engine in kernels}
        report, references = _compare(job, program, forms, engines, kernels, kinds)
        report = replace(report, quick=left_out)
        if meter is not None:
            _measure(meter, forms, engines, kernels, report, job.precision)
            report = _with_costs(replace(report, accuracy=tuple(meter.measured)), forms)
        if report.written:
            progress("write the bundle")
            manifest = describe(program, forms, engines, job.precision, job.metadata, report, kernels)
            files["parity.json"] = (json.dumps(report.to_json(), indent=2) + "\n").encode()
            files |= {GOLDEN_FILE: save_golden(replace(references, inputs=job.given)), **job.picture}
            graph = describe_graph(program.master)
            files[REPORT_FILE] = render(manifest, report.to_json(), file_entries(files), graph, command, skipped)
            publish(staging, output, files, manifest)
    sizes, seconds = {name: len(content) for name, content in files.items()}, time.perf_counter() - started
    return ExportResult(output, report, program.coverage, skipped, sizes, seconds, strides(program.source))


def _meter(job: Job, program: FusedProgram) -> Meter | None:
    """What measures accuracy, and has measured the eager model's; None without labelled pictures."""
    if job.labelled is None:
        return None
    logits: list[int | str] = ["batch", *(int(n) for n in output_nodes(program.source)[0].meta["val"].shape[1:])]
    if job.config.features and len(logits) != 2:
        raise ExportError(
            f"labelled pictures are for class scores, got ExportConfig.features={job.config.features[0]!r} first, of "
            f"shape {logits}: name the module that makes the scores before the others, or leave out the pictures"
        )
    meter = Meter(job.labelled, job.metadata.get("classes"), logits, job.batch, job.progress, job.normalisation)
    names = output_names(program.master)
    meter.measure(EagerRunner(job.model, torch.float32, names, program.inputs), "fp32")
    return meter


def _lower(job: Job, program: FusedProgram, meter: Meter | None) -> tuple[FusedProgram, Forms]:
    """Decide what is kept in a wider type, and write the ONNX files; with the program that they were written from."""
    config, progress = job.config, job.progress
    if job.calibration is None:
        precision = PRECISIONS[config.precision]
        if config.keep_fp32:
            program = keep_float32(job.model, program, precision, config.keep_fp32, job.inputs, progress)
        return program, floating_forms(program, precision, progress, job.normalisation)

    retains, calibration = None if meter is None else partial(_retains, meter), job.calibration
    if job.normalisation is not None:
        calibration = NormalisedPictures(calibration, job.normalisation)
    return program, quantise_network(program, config, calibration, job.inputs, retains, progress, job.normalisation)


def _retains(meter: Meter, quantised: FusedProgram) -> bool:
    """Whether a network of 8 bits keeps the accuracy."""
    names = output_names(quantised.master)
    return meter.retained(ProgramRunner(quantised, PRECISIONS["fp32"], names), INT8.name)


def _measure(
    meter: Meter,
    forms: Forms,
    engines: Sequence[Engine],
    kernels: Sequence[KernelEngine],
    report: ParityReport,
    precision: Precision,
) -> None:
    """Measure each form that ran."""
    ran = {rung.name for rung in report.rungs if rung.seconds}
    file = forms.files[ONNX_FILE]
    for candidate in forms.candidates:
        if candidate.measured:
            meter.measure(candidate.runner, precision.name)
    for engine in engines:
        if engine.flavour.name in ran:
            meter.measure(TensorRTRunner(engine, file.interface), precision.name)
    for kernel_engine in kernels:
        runner = kernel_runner(kernel_engine, file.interface)
        if runner.name in ran:
            meter.measure(runner, precision.name)


def _with_costs(report: ParityReport, forms: Forms) -> ParityReport:
    """With what each layer costs where 8 bits cost too much."""
    if report.quantisation is None or not lost_accuracy(report.accuracy):
        return report
    return replace(report, quantisation=replace(report.quantisation, costs=forms.costs()))


def _compare(
    job: Job,
    program: FusedProgram,
    forms: Forms,
    engines: list[Engine],
    kernels: list[KernelEngine],
    kinds: Mapping[str, OutputKind],
) -> tuple[ParityReport, References]:
    """Run every candidate first and the references after, so that none can see the other's results.

    The intermediate tensors of one are judged, and dropped, before the next one runs.

    Returns:
        The report, and the references of the precision that is exported.
    """
    progress, precision, inputs = job.progress, job.precision, job.inputs
    interface, names = forms.files[ONNX_FILE].interface, forms.files[ONNX_FILE].output_names
    shown = cast(operator_inputs(inputs, job.tested), torch.float32)
    executed = [_executed(job, program, candidate, shown) for candidate in forms.candidates]
    outcomes = [
        attempt(TensorRTRunner(engine, interface), why_not_runnable(engine), precision, job.given, job.tested)
        for engine in engines
    ]
    proved = [prove_kernels(engine, interface, precision, job.given, job.batch, progress) for engine in kernels]
    give_back()
    progress("run the eager model")
    references = replace(run_references(job.model, program, names, inputs, forms.arithmetic), kinds=kinds)
    give_back()
    progress("compare")
    evidence = check_evidence(program.source, shown, references, precision)
    rungs = reference_rungs(references, forms.arithmetic)
    by_precision = {forms.arithmetic: references}
    if forms.simulations:
        by_precision[precision] = run_simulations(references, forms.simulations)
        rungs += reference_rungs(by_precision[precision], precision)
    for candidate, (execution, operators) in zip(forms.candidates, executed, strict=True):
        held = candidate.precision
        rungs.append(judge(execution, by_precision[held], held, held.network_factor, operators))
    rungs += [judge_attempt(outcome, by_precision[precision], precision, ENGINE_FACTOR) for outcome in outcomes]
    factor = precision.network_factor
    rungs += [judge_attempt(outcome, by_precision[precision], precision, factor) for outcome in proved]
    report = ParityReport(
        precision.name,
        count_of(inputs),
        evidence,
        tuple(rungs),
        quantisation=forms.quantisation,
        kept=tuple(sorted(program.kept)),
        unverified=job.config.unverified,
    )
    return report, by_precision[precision]


def _executed(
    job: Job, program: FusedProgram, form: Form, shown: Mapping[str, Tensor]
) -> tuple[Execution, OperatorChecks]:
    """What a form computes but for its intermediate tensors, and what was found of these; `shown` is their input."""
    runner, progress = form.runner, job.progress
    give_back()
    progress(f"run the {runner.name} form")
    execution = execute(runner, runner.interface.fed(job.given, job.normalisation), job.tested)
    give_back()
    progress(f"check the operators of the {runner.name} form")
    operators = form.check(execution.trace)
    if runner.interface.dtype == UINT8:
        operators = with_normalised(operators, program, form.precision, shown, execution.trace)
    return replace(execution, trace={}), operators
