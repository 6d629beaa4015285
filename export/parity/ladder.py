"""The ladder: run each form of a network on the same images, then hold it against the float64 model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.capture import Batch
from export.lowering.tensorrt_engine import Engine
from export.parity.network import NetworkCheck, compare
from export.parity.operators import OperatorChecks
from export.parity.report import Rung
from export.precision import Precision
from export.runners import Arrays, EagerRunner, Runner

_OPERATOR_IMAGES = 4  # the operator criterion looks at every element: more images add time, not evidence


@dataclass(frozen=True)
class References:
    """What every form is compared with.

    Attributes:
        images: [N, C, H, W], float32.
        eager: outputs of the user's model in the precision under test, by name.
        oracle: outputs of the user's model in float64, by name.
        seconds: per image of the eager model in the precision under test.
    """

    images: NDArray
    eager: Arrays
    oracle: Arrays
    seconds: float = 0.0


@dataclass(frozen=True)
class Execution:
    """What one form computed.

    Attributes:
        straight: its outputs for the images in order.
        reversed: its outputs for the images in reverse order and batches of another size, put back in
            order: a stale output or one that depends on its neighbours differs.
        trace: its intermediate tensors for the first images, empty where it does not show them.
        changed_input: whether it wrote to its input.
        seconds: per image of the first run after a warm-up.
    """

    name: str
    runtime: str
    file: str
    straight: Arrays
    reversed: Arrays
    trace: dict[str, Tensor]
    changed_input: bool
    seconds: float


def execute(runner: Runner, images: NDArray, batch: Batch) -> Execution:
    """Run a form twice over the images, the second time backwards and in smaller batches."""
    untouched = images.copy()
    with runner:
        trace = runner.trace({"input": operator_images(images, batch)})
        started = time.perf_counter()
        straight = infer(runner, images, batch, len(images))
        seconds = (time.perf_counter() - started) / len(images)
        backwards = infer(runner, np.ascontiguousarray(images[::-1]), batch, max(1, len(images) // 2 - 1))
    put_back = {name: values[::-1] for name, values in backwards.items()}
    changed = not np.array_equal(images, untouched)
    return Execution(runner.name, runner.runtime, runner.file, straight, put_back, trace, changed, seconds)


def operator_images(images: NDArray, batch: Batch) -> NDArray:
    """The images the operator criterion looks at: about four, repeated up to the smallest batch allowed."""
    size = max(batch.minimum, min(_OPERATOR_IMAGES, batch.maximum))
    return np.resize(images, (size, *images.shape[1:]))


def infer(runner: Runner, images: NDArray, batch: Batch, size: int) -> Arrays:
    """The outputs for all images, in batches of about `size` that `batch` allows.

    A batch that would be smaller than the minimum is filled up with images that are dropped again.
    """
    size = min(max(size, batch.minimum), batch.maximum)
    chunks = []
    for chunk in _chunks(images, size):
        filled = chunk
        if len(chunk) < batch.minimum:
            filled = np.resize(chunk, (batch.minimum, *chunk.shape[1:]))
        outputs = runner.infer({"input": filled})
        chunks.append({name: values[: len(chunk)] for name, values in outputs.items()})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def run_references(
    model: nn.Module, names: tuple[str, ...], images: NDArray, batch: Batch, precision: Precision
) -> References:
    """Run the user's model, unfused, in the precision under test and in float64."""
    with EagerRunner(model, precision.dtype, names) as runner:
        started = time.perf_counter()
        eager = infer(runner, images, batch, len(images))
        seconds = (time.perf_counter() - started) / len(images)
    with EagerRunner(model, torch.float64, names) as runner:
        oracle = infer(runner, images, batch, len(images))
    return References(images, eager, oracle, seconds)


def eager_rung(references: References, precision: Precision) -> Rung:
    """The eager model in the precision under test: what rounding alone costs, and the measure of the others."""
    factor, roundoff = precision.network_factor, precision.roundoff
    outputs = compare(references.eager, references.eager, references.oracle, factor, roundoff)
    return Rung(EagerRunner.name, EagerRunner.runtime, precision.name, outputs=outputs, seconds=references.seconds)


def unexecuted_rung(engine: Engine, reason: str) -> Rung:
    """An engine that was built, and why it could not be run here."""
    runtime = f"{engine.flavour.name} {engine.version}"
    return Rung(engine.flavour.name, runtime, engine.precision.name, engine.flavour.file_name, not_run=reason)


def judge(
    execution: Execution,
    references: References,
    precision: Precision,
    factor: float,
    operators: OperatorChecks | None = None,
) -> Rung:
    """Compare what a form computed with the references; `factor` is k of the network criterion."""
    runs = [
        compare(outputs, references.eager, references.oracle, factor, precision.roundoff)
        for outputs in (execution.straight, execution.reversed)
    ]
    outputs = {name: max((run[name] for run in runs if name in run), key=_severity) for name in runs[0]}
    if execution.changed_input:
        outputs["input"] = NetworkCheck.refused(factor, "the input was written to")
    return Rung(
        execution.name, execution.runtime, precision.name, execution.file, outputs, operators, seconds=execution.seconds
    )


def _severity(check: NetworkCheck) -> tuple[bool, float]:
    return (not check, check.ratio if math.isfinite(check.ratio) else math.inf)


def _chunks(images: NDArray, size: int) -> Iterator[NDArray]:
    for start in range(0, len(images), size):
        yield images[start : start + size]
