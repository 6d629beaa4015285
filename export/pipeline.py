"""From a model to a verified bundle: capture, fuse, lower, run every form, compare, write."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.base.batch import FLOAT32, INPUT, UINT8, Arrays, Batch, Inputs, count_of, named
from export.base.errors import ExportError, MissingDependency
from export.base.memory import give_back
from export.base.normalisation import CHANNELS, Normalisation
from export.base.precision import FORMATS, INT8, PRECISIONS, Precision
from export.base.progress import Progress, silent
from export.config import AUTO, ExportConfig, choose_flavours
from export.criteria.batches import check_batches
from export.criteria.evidence import check_evidence
from export.criteria.normalised import with_normalised
from export.criteria.outputs import output_kinds
from export.criteria.references import run_references, run_simulations
from export.forms import Form, Forms, floating_forms
from export.fusion.capture import Example, check_model, describe_value
from export.fusion.description import describe_graph
from export.fusion.features import strides, with_features
from export.fusion.passes import DEFAULT_LEVEL, QUANTISED_LEVEL
from export.fusion.program import Coverage, FusedProgram, fuse, output_names, output_nodes
from export.fusion.unwrapping import with_softmax
from export.golden_picture import PicturePreprocessing, golden_picture
from export.lowering.runners import EagerRunner, ProgramRunner, cast
from export.manifest import describe
from export.mixed_precision import keep_float32, quantise_network
from export.quantisation.calibration import NormalisedPictures, Pictures
from export.report.page import REPORT_FILE, render
from export.runtime.bundle.folder import file_entries, publish, staged
from export.runtime.bundle.golden import GOLDEN_FILE, save_golden
from export.runtime.engines.engine import Engine, Flavour, build_engine, why_not_runnable
from export.runtime.engines.kernel_engine import why_not_here
from export.runtime.engines.runner import KernelRunner, TensorRTRunner
from export.runtime.onnx_session import ONNX_FILE, import_onnxruntime
from export.runtime.parity.accuracy import Labelled, Meter
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
from export.runtime.parity.network import PROBABILITIES, VALUES, OutputKind
from export.runtime.parity.rungs import ParityReport, Rung
from export.runtime.runner import Interface
from export.sample_inputs import byte_crops, crops, photographs
from kernels.configs.targets import TARGETS, Target

if TYPE_CHECKING:
    from export.lowering.kernel_engine import KernelEngine

PARITY_IMAGES = 16


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


@dataclass(frozen=True)
class _Job:
    """The arguments of an export, checked.

    Attributes:
        given: what is compared on, as the artefacts take it, on the CPU; `labelled` and `calibration` are alike.
        normalisation: what the artefacts do to it; None where it is what the network computes with.
        picture: the files of the golden picture; none where nobody said how a picture becomes an input.
        inputs: what the network computes with, float32.
    """

    model: nn.Module
    config: ExportConfig
    given: Arrays
    normalisation: Normalisation | None
    picture: Mapping[str, bytes]
    inputs: Inputs
    labelled: Labelled | None
    calibration: Pictures | None
    metadata: Mapping[str, Any]
    command: str
    progress: Progress

    @property
    def batch(self) -> Batch:
        return self.config.batch

    @property
    def precision(self) -> Precision:
        return FORMATS[self.config.precision]


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
    config, metadata, named_example = config or ExportConfig(), metadata or {}, check_model(model, example)
    if config.features:
        model = with_features(model, config.features)
    if config.outputs == PROBABILITIES:
        model = with_softmax(model)
    if "preprocessing" in metadata:
        raise ExportError("metadata['preprocessing']: expected it as export_bundle(preprocessing=...)")
    record = None if preprocessing is None else preprocessing.to_json()
    normalisation = _normalisation(config, named_example, record)
    given = _given(named_example, images, config.input)
    picture = golden_picture(preprocessing, given[INPUT]) if preprocessing and list(given) == [INPUT] else {}
    job = _Job(
        model=model,
        config=config,
        given=given,
        normalisation=normalisation,
        picture=picture,
        inputs=given if normalisation is None else normalisation.of(given),
        labelled=labelled,
        calibration=calibration,
        metadata=metadata if record is None else {**metadata, "preprocessing": record},
        command=command,
        progress=progress,
    )
    _check(job)
    flavours, skipped = choose_flavours(job.config)
    targets = choose_targets(job.config, skipped)
    import_onnxruntime()  # a missing package is known before any work is done
    with staged(output) as staging:
        progress("capture and fuse")
        program = fuse(model, example, job.batch, DEFAULT_LEVEL if calibration is None else QUANTISED_LEVEL)
        check_batches(program, job.inputs)
        names, classes = output_names(program.master), job.metadata.get("classes")
        kinds = output_kinds(program.source, names, job.config.outputs, labelled is not None, classes)
        meter = _meter(job, program)
        program, forms = _lower(job, program, meter)
        gc.collect()  # the graphs of torch.export and of the ONNX exporter, with weights of their own
        files = {name: onnx_file.serialize() for name, onnx_file in forms.files.items()}
        inputs = forms.files[ONNX_FILE].inputs
        engines = build_engines(flavours, files[ONNX_FILE], job.config, inputs, forms.kept, progress)
        for engine in engines:
            files[engine.flavour.file_name] = engine.plan
            files[engine.flavour.layers_name] = (json.dumps(engine.layers, indent=1) + "\n").encode()
        kernels = build_kernels(targets, program, job.config, skipped, progress, normalisation)
        files |= {engine.name: engine.content for engine in kernels}
        report, references = _compare(job, program, forms, engines, kernels, kinds)
        if meter is not None:
            _measure(meter, forms, engines, kernels, report, job.precision)
            report = replace(report, accuracy=tuple(meter.measured))
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


def _normalisation(
    config: ExportConfig, example: Mapping[str, Tensor], record: Mapping[str, Any] | None
) -> Normalisation | None:
    """What the artefacts are to do to bytes; None where they take what the model does.

    Raises:
        ExportError: an input is no image of 1 or 3 channels, or its mean and std are not known.
    """
    if config.input == FLOAT32:
        return None
    asked = f"ExportConfig.input={config.input!r}"
    for name, x in example.items():
        if x.dim() != 4 or x.shape[1] not in CHANNELS:
            raise ExportError(f"{asked}: expected images of 1 or 3 channels, got {name} [N, *{list(x.shape[1:])}]")
    if record is None:
        wanted = "export_bundle(preprocessing=...)"
        raise ExportError(f"{asked}: expected the mean and std that pictures are normalised by, give {wanted}")
    normalisation = Normalisation.from_json(record)
    for name, x in example.items():
        if x.shape[1] != len(normalisation.mean):
            raise ExportError(
                f"{asked}: expected mean and std of {x.shape[1]} channels for {name}, got {record!r:.200}"
            )
    return normalisation


def _given(example: Mapping[str, Tensor], images: Example | None, dtype: str) -> Arrays:
    """What to compare on as the artefacts take it, by the names of the example, and a check that it fits."""
    several = len(example) > 1
    shapes = {name: list(x.shape[1:]) for name, x in example.items()}
    if dtype == UINT8:
        shapes = {name: [*size, channels] for name, (channels, *size) in shapes.items()}
    if images is None and several:
        words = ", ".join(f"{name!r}: [N, {', '.join(map(str, shape))}]" for name, shape in shapes.items())
        raise ExportError(f"no default images for several inputs: give examples of each by name, images={{{words}}}")
    if images is None:
        _, channels, height, width = example[INPUT].shape
        cut = byte_crops if dtype == UINT8 else crops
        images = cut(photographs(), PARITY_IMAGES, channels, (height, width))
    by_name: Mapping[str, object] = images if isinstance(images, Mapping) else {INPUT: images}
    if not several and len(by_name) == 1:
        by_name = dict(zip(example, by_name.values(), strict=True))
    if by_name.keys() != example.keys():
        given = ", ".join(map(str, by_name)) or "none"
        raise ExportError(
            f"expected images by name, {', '.join(example)}: got "
            + (given if isinstance(images, Mapping) else describe_value(images))
        )
    arrays: Arrays = {}
    for name, shape in shapes.items():
        tensor, right = by_name[name], f"[N, *{shape}]{' of torch.uint8' if dtype == UINT8 else ''}"
        fits = isinstance(tensor, Tensor) and list(tensor.shape[1:]) == shape and len(tensor) > 0
        if not isinstance(tensor, Tensor) or not fits or (dtype == UINT8 and tensor.dtype != torch.uint8):
            what = f"images of {name}" if several else "images"
            raise ExportError(f"expected {what} of shape {right}, got {describe_value(tensor)}")
        tensor = tensor.detach().cpu()
        arrays[name] = (tensor if dtype == UINT8 else tensor.float()).contiguous().numpy()
    if len({len(values) for values in arrays.values()}) > 1:
        counts = ", ".join(f"{len(values)} of {name}" for name, values in arrays.items())
        raise ExportError(f"expected as many images of each input, got {counts}")
    return arrays


def _check(job: _Job) -> None:
    """Refuse what cannot be recorded, measured, calibrated or decided before any work is done."""
    try:
        json.dumps(dict(job.metadata))
    except (TypeError, ValueError) as error:
        raise ExportError(f"expected metadata that JSON can hold: {error}") from error
    if job.labelled is not None:
        if job.config.outputs == VALUES:
            raise ExportError(
                "labelled pictures are for class scores, got ExportConfig.outputs='values': leave out one of the two"
            )
        if len(job.inputs) > 1:
            raise ExportError(
                f"labelled pictures are for a model of one picture, got one that takes {', '.join(job.inputs)}"
            )
        if len(job.labelled) == 0:
            raise ExportError("expected labelled pictures to measure accuracy on, got none")
        inputs, _ = next(iter(job.labelled.batches(1)))
        _check_pictures(job, "labelled", inputs)
    if job.precision is not INT8:
        if job.calibration is not None:
            raise ExportError(
                "export_bundle(calibration=...) is for ExportConfig.precision='int8', "
                f"got ExportConfig.precision={job.config.precision!r}"
            )
    elif job.calibration is None or not len(job.calibration):
        raise ExportError("int8 needs pictures to calibrate on, got none; give export_bundle(calibration=...)")
    else:
        _check_pictures(job, "calibration", next(iter(job.calibration.batches(1))))
    if job.precision is INT8 and job.config.keep_fp16 == AUTO and job.labelled is None:
        raise ExportError(
            "ExportConfig.keep_fp16='auto' needs labelled pictures to decide by, got none; "
            "give export_bundle(labelled=...)"
        )


def _check_pictures(job: _Job, kind: str, given: NDArray | Inputs) -> None:
    """Raises ExportError where a batch of one picture is not what the model takes."""
    inputs = named(given, job.inputs)
    right, dtype = {name: (1, *values.shape[1:]) for name, values in job.given.items()}, job.config.input
    if {name: x.shape for name, x in inputs.items()} == right and {x.dtype.name for x in inputs.values()} == {dtype}:
        return

    def words(facts: Mapping[str, str]) -> str:
        return ", ".join(fact if len(right) == 1 else f"{name} {fact}" for name, fact in facts.items())

    expected = words({name: f"[N, *{list(shape[1:])}] {dtype}" for name, shape in right.items()})
    found = words({name: f"{list(x.shape)} {x.dtype}" for name, x in inputs.items()})
    raise ExportError(f"expected {kind} inputs of shape {expected}, got {found}")


def _meter(job: _Job, program: FusedProgram) -> Meter | None:
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


def _lower(job: _Job, program: FusedProgram, meter: Meter | None) -> tuple[FusedProgram, Forms]:
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
        runner = _runner(kernel_engine, file.interface)
        if runner.name in ran:
            meter.measure(runner, precision.name)


def _compare(
    job: _Job,
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
    shown = cast(operator_inputs(inputs, program.batch), torch.float32)
    executed = [_executed(job, program, candidate, shown) for candidate in forms.candidates]
    outcomes = [
        attempt(TensorRTRunner(engine, interface), why_not_runnable(engine), precision, job.given, program.batch)
        for engine in engines
    ]
    proved = [_prove(kernel_engine, job, interface, progress) for kernel_engine in kernels]
    give_back()
    progress("run the eager model")
    references = replace(run_references(job.model, program, names, inputs, forms.arithmetic), kinds=kinds)
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
    job: _Job, program: FusedProgram, form: Form, shown: Mapping[str, Tensor]
) -> tuple[Execution, OperatorChecks]:
    """What a form computes but for its intermediate tensors, and what was found of these; `shown` is their input."""
    runner, progress = form.runner, job.progress
    give_back()
    progress(f"run the {runner.name} form")
    execution = execute(runner, runner.interface.fed(job.given, job.normalisation), program.batch)
    give_back()
    progress(f"check the operators of the {runner.name} form")
    operators = form.check(execution.trace)
    if runner.interface.dtype == UINT8:
        operators = with_normalised(operators, program, form.precision, shown, execution.trace)
    return replace(execution, trace={}), operators


def _prove(engine: KernelEngine, job: _Job, interface: Interface, progress: Progress) -> Execution | Rung:
    """What a kernel engine computes where the GPU here is its own, else what the emulator finds of some blocks."""
    if why_not_here(engine.content, engine.target.name):
        from export.criteria.kernel_blocks import emulated_rung  # imports Triton, as whatever made the engine has

        progress(f"emulate blocks of {engine.name}")
        return emulated_rung(engine, job.given, job.batch)
    progress(f"run {engine.name}")
    return attempt(_runner(engine, interface), "", job.precision, job.given, job.batch)


def _runner(engine: KernelEngine, interface: Interface) -> KernelRunner:
    runner = KernelRunner(engine.content, interface)
    runner.name, runner.file = f"kernels {engine.target.name}", engine.name
    return runner


def choose_targets(config: ExportConfig, skipped: dict[str, str]) -> list[Target]:
    """The architectures to make kernel engines for; why there is none is added to `skipped`.

    Raises:
        ExportError: Triton is not installed, or not one that compiles for an architecture that was asked for.
    """
    if not config.kernels:
        return []
    try:
        from kernels.compile import version_reason
        from kernels.launch import target_of
    except ModuleNotFoundError as error:
        raise MissingDependency("triton", "export", error) from error
    if config.kernels == AUTO:
        if not torch.cuda.is_available():
            skipped["kernel"] = "there is no GPU here: name architectures, such as ExportConfig.kernels=('sm_87',)"
            return []
        try:
            return [target_of(torch.device("cuda"))]
        except ValueError as error:
            skipped["kernel"] = str(error)
            return []
    targets = [TARGETS[name] for name in config.kernels]
    if reasons := [reason for target in targets if (reason := version_reason(target))]:
        raise ExportError(f"ExportConfig.kernels: {'; '.join(reasons)}")
    return targets


def build_kernels(
    targets: Sequence[Target],
    program: FusedProgram,
    config: ExportConfig,
    skipped: dict[str, str],
    progress: Progress,
    normalisation: Normalisation | None = None,
) -> list[KernelEngine]:
    """A kernel engine for each architecture for which the network can have one; `skipped` gets why one cannot."""
    engines = []
    for target in targets:
        from export.lowering.kernel_engine import lower_kernels  # imports Triton, which `choose_targets` has found

        progress(f"compile the kernels for {target.name}")
        try:
            precision = PRECISIONS[config.precision]
            engines.append(lower_kernels(program, precision, target, config.batch, normalisation))
        except ExportError as error:
            skipped[f"{target.name} kernel"] = str(error)
    return engines


def build_engines(
    flavours: Sequence[Flavour],
    onnx_bytes: bytes,
    config: ExportConfig,
    inputs: Mapping[str, tuple[int, ...]],
    kept: Collection[str],
    progress: Progress,
) -> list[Engine]:
    """Build an engine of each flavour; `kept` as in `build_engine`, which raises what this raises."""
    engines = []
    for flavour in flavours:
        progress(f"build the {flavour.name} engine")
        precision, options = FORMATS[config.precision], config.engine_config
        levers, otherwise = ("ExportConfig.batch",), "export with ExportConfig.engine='none'"
        engines.append(
            build_engine(onnx_bytes, flavour, precision, config.batch, inputs, options, kept, levers, otherwise)
        )
    return engines
