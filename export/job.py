"""What an export is asked for: the arguments of `export_bundle`, put together and checked before any work is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.base.batch import FLOAT32, INPUT, UINT8, Arrays, Batch, Inputs, count_of, named, rows_of
from export.base.errors import ExportError
from export.base.normalisation import CHANNELS, Normalisation
from export.base.precision import FORMATS, INT8, Precision
from export.base.progress import Progress
from export.config import AUTO, ExportConfig
from export.fusion.capture import Example, check_model, describe_value
from export.fusion.features import with_features
from export.fusion.program import FusedProgram, output_nodes
from export.fusion.unwrapping import with_softmax
from export.golden_picture import PicturePreprocessing, golden_picture
from export.quantisation.calibration import Pictures
from export.runtime.parity.accuracy import Labelled
from export.runtime.parity.network import PROBABILITIES, VALUES
from export.sample_inputs import byte_crops, crops, photographs

PARITY_IMAGES = 16
_FEWEST_IMAGES = 2  # one cannot show that an output depends on its input
_FEWEST_VALUES = 100  # of an output: the ratio of two relative errors of so many is within a few percent of that of all


@dataclass(frozen=True)
class Job:
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

    @property
    def tested(self) -> Batch:
        """The batch sizes that forms are run in: all that matter, or of a quick export those that the images fill."""
        if not self.config.quick:
            return self.batch
        minimum, most = self.batch.minimum, max(self.batch.minimum, count_of(self.inputs))
        return Batch(minimum, min(self.batch.optimum, most), min(self.batch.maximum, most))

    def quickened(self, program: FusedProgram) -> tuple[Job, tuple[str, ...]]:
        """A quick export's on the fewest images that the evidence allows, and what that leaves out, a line each.

        An error is only told from rounding by many values: the smallest output of the program says how many there are.
        """
        if not self.config.quick:
            return self, ()
        values = int(min(node.meta["val"].shape[1:].numel() for node in output_nodes(program.source)))
        given, fewest = count_of(self.inputs), max(_FEWEST_IMAGES, -(-_FEWEST_VALUES // max(1, values)))
        count = min(given, fewest)
        shown, inputs = rows_of(self.given, slice(count)), rows_of(self.inputs, slice(count))
        job = replace(self, given=shown, inputs=inputs)
        left_out = [f"compared on {count} of {given} images"] if count < given else []
        sizes = {self.batch.minimum, self.batch.optimum, self.batch.maximum}
        if larger := [str(size) for size in sorted(sizes) if size > job.tested.maximum]:
            left_out.append(f"no batch of {' or '.join(larger)} was run")
        return job, tuple(left_out)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Example,
        config: ExportConfig,
        images: Example | None,
        *,
        labelled: Labelled | None,
        calibration: Pictures | None,
        preprocessing: PicturePreprocessing | None,
        metadata: Mapping[str, Any],
        command: str,
        progress: Progress,
    ) -> Job:
        """Check the arguments of `export_bundle`, which describes them, and put them together; raises ExportError."""
        named_example = check_model(model, example)
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
        job = cls(
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
        return job


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


def _check(job: Job) -> None:
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


def _check_pictures(job: Job, kind: str, given: NDArray | Inputs) -> None:
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
