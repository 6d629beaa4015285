"""The ladder: run each form of a network on the same images, then hold it against the float64 model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.batch import Arrays, Batch, run_in_batches
from export.lowering.tensorrt_engine import Engine
from export.parity.checks import OperatorChecks
from export.parity.network import NetworkCheck, compare
from export.parity.report import Rung
from export.precision import PRECISIONS, Precision
from export.program import FusedProgram
from export.runner import Runner
from export.runners import EagerRunner, FoldedRunner, ProgramRunner

# Two draws of rounding the weights, which were seen to differ by up to 2.5; a broken fold is off by far more.
_FOLDED_FACTOR = 4.0
_OPERATOR_IMAGES = 4  # the operator criterion looks at every element: more images add time, not evidence


@dataclass(frozen=True)
class References:
    """What every form is compared with.

    Attributes:
        images: [N, C, H, W], float32.
        rounded: what rounding alone makes of the outputs: name of an unfused network in the precision under test ->
            its outputs by name. `eager` is the user's model, `folded` the same with BatchNorm folded.
        oracle: outputs of the user's model in float64, by name.
        seconds: per image of the eager model in the precision under test.
    """

    images: NDArray
    rounded: Mapping[str, Arrays]
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
        straight = run_in_batches(runner.infer, images, batch, len(images))
        seconds = (time.perf_counter() - started) / len(images)
        backwards = run_in_batches(runner.infer, images[::-1].copy(), batch, max(1, len(images) // 2 - 1))
    put_back = {name: values[::-1] for name, values in backwards.items()}
    changed = not np.array_equal(images, untouched)
    return Execution(runner.name, runner.runtime, runner.file, straight, put_back, trace, changed, seconds)


def operator_images(images: NDArray, batch: Batch) -> NDArray:
    """The images the operator criterion looks at: about four, repeated up to the smallest batch allowed."""
    size = max(batch.minimum, min(_OPERATOR_IMAGES, batch.maximum))
    return np.resize(images, (size, *images.shape[1:]))


def run_references(
    model: nn.Module, program: FusedProgram, names: tuple[str, ...], images: NDArray, precision: Precision
) -> References:
    """Run the user's model in the precision under test, with BatchNorm folded, and in float64."""
    batch, outputs = program.batch, []
    seconds = 0.0
    for runner in (
        EagerRunner(model, torch.float64, names),
        FoldedRunner(program, precision, names),
        EagerRunner(model, precision.dtype, names),
    ):
        with runner:
            started = time.perf_counter()
            outputs.append(run_in_batches(runner.infer, images, batch, len(images)))
            seconds = (time.perf_counter() - started) / len(images)
    oracle, folded, eager = outputs
    return References(images, {EagerRunner.name: eager, FoldedRunner.name: folded}, oracle, seconds)


def run_simulations(references: References, simulations: Mapping[str, FusedProgram]) -> References:
    """The same images and oracle, with quantised programs run in float32 as what rounding alone makes of them."""
    rounded, single, names = {}, PRECISIONS["fp32"], tuple(references.oracle)
    seconds = 0.0
    for name, program in simulations.items():
        with ProgramRunner(program, single, names) as runner:
            started = time.perf_counter()
            rounded[name] = run_in_batches(runner.infer, references.images, program.batch, len(references.images))
            seconds = (time.perf_counter() - started) / len(references.images)
    return References(references.images, rounded, references.oracle, seconds)


def reference_rungs(references: References, precision: Precision) -> list[Rung]:
    """What rounding alone costs: the first unfused network, and the others, which may not differ much from it."""
    rungs: list[Rung] = []
    first = next(iter(references.rounded.values()))
    for name, outputs in references.rounded.items():
        factor = _FOLDED_FACTOR if rungs else precision.network_factor
        checks = compare(outputs, [first], references.oracle, factor, precision.network_floor)
        seconds = 0.0 if rungs else references.seconds
        rungs.append(Rung(name, EagerRunner.runtime, precision.name, outputs=checks, seconds=seconds))
    return rungs


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
    rounded = list(references.rounded.values())
    runs = [
        compare(outputs, rounded, references.oracle, factor, precision.network_floor)
        for outputs in (execution.straight, execution.reversed)
    ]
    names = {name: None for run in runs for name in run}
    outputs = {name: max((run[name] for run in runs if name in run), key=_severity) for name in names}
    if execution.changed_input:
        outputs["(input)"] = NetworkCheck.refused(factor, "the input was written to")
    return Rung(
        execution.name, execution.runtime, precision.name, execution.file, outputs, operators, seconds=execution.seconds
    )


def _severity(check: NetworkCheck) -> tuple[bool, float]:
    return (not check, check.ratio if math.isfinite(check.ratio) else math.inf)
