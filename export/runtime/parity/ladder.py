"""The ladder: run each form of a network on the same images, then hold it against the float64 model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Batch, Inputs, at_once, count_of, pixels_of, resized, rows_of, run_in_batches
from export.base.errors import ExportError
from export.base.precision import Precision
from export.runtime.parity.checks import OperatorChecks
from export.runtime.parity.network import NetworkCheck, OutputKind, compare
from export.runtime.parity.rungs import Rung
from export.runtime.runner import Runner

ENGINE_FACTOR = 3.0  # k for TensorRT, which chooses its own fusions and accumulation orders
_OPERATOR_IMAGES = 4  # the operator criterion looks at every element: more images add time, not evidence
_OPERATOR_PIXELS = 2**20  # of all images whose intermediate tensors are kept


@dataclass(frozen=True)
class References:
    """What every form is compared with.

    Attributes:
        inputs: what all of them are run on.
        rounded: what rounding alone makes of the outputs: name of an unfused network in the precision under test ->
            its outputs by name. `eager` is the user's model, `folded` the same with BatchNorm folded.
        oracle: outputs of the user's model in float64, by name.
        runtime: what ran them.
        seconds: per image of the first of them.
        unusable: unfused network that is no reference -> why.
        wrong: unfused network that is not the model even without rounding -> how it differs.
        kinds: output name -> what it is; of those not named, [N, classes] are class scores.
    """

    inputs: Inputs
    rounded: Mapping[str, Arrays]
    oracle: Arrays
    runtime: str = "recorded"
    seconds: float = 0.0
    unusable: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, OutputKind] = field(default_factory=dict)


@dataclass(frozen=True)
class Execution:
    """What one form computed.

    Attributes:
        straight: its outputs for the images in order.
        again: its outputs for the images, once or several times more: at least half of them computed again, in reverse
            order, in batches of the smallest, the optimal and the largest size that it takes, put back in order among
            the others. A stale output or one that depends on its neighbours differs.
        trace: its intermediate tensors for the first images, empty where it does not show them.
        changed_input: whether it wrote to its input.
        seconds: per image of the first run after a warm-up.
    """

    name: str
    runtime: str
    file: str
    straight: Arrays
    again: tuple[Arrays, ...]
    trace: Mapping[str, Any]
    changed_input: bool
    seconds: float


def execute(runner: Runner, inputs: Inputs, batch: Batch) -> Execution:
    """Run a form backwards over half of the images or more, in batches of every size that matters, and over all."""
    untouched, count = {name: values.copy() for name, values in inputs.items()}, count_of(inputs)
    size = min(batch.maximum, at_once(inputs)) if runner.in_host_memory else batch.maximum
    with runner:
        parts, mixed = [], mixed_rows(count, batch, size)
        for rows in mixed:
            try:
                parts.append(runner.infer(rows_of(inputs, rows)))
            except ExportError as error:
                raise ExportError(f"in a batch of {len(rows)}, {error}") from error
        started = time.perf_counter()
        straight = run_in_batches(runner.infer, inputs, batch, size)
        seconds = (time.perf_counter() - started) / count
        trace = runner.trace(operator_inputs(inputs, batch))
    return Execution(
        name=runner.name,
        runtime=runner.runtime,
        file=runner.file,
        straight=straight,
        again=_rounds(straight, np.concatenate(mixed), parts),
        trace=trace,
        changed_input=not all(np.array_equal(values, untouched[name]) for name, values in inputs.items()),
        seconds=seconds,
    )


def mixed_rows(count: int, batch: Batch, largest: int) -> list[NDArray[np.intp]]:
    """Which of `count` images go into which batch: backwards, in each size that matters, until half were shown.

    Of more than `largest` a batch is made only where the form takes no fewer; of `largest` none where the images in
    order fill one.
    """
    sizes = sorted({max(batch.minimum, min(n, largest)) for n in (batch.minimum, batch.optimum, batch.maximum)})
    if len(sizes) > 1 and sizes[-1] <= count:
        sizes.pop()
    sizes *= -(-count // (2 * sum(sizes)))
    backwards = np.resize(np.arange(count)[::-1], sum(sizes))
    return np.split(backwards, np.cumsum(sizes)[:-1])


def _rounds(straight: Arrays, rows: NDArray[np.intp], parts: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """What was computed of `rows`, over and over, as one set of all images for each time.

    A criterion on a set weighs all images alike: those that are not among the rows are as they were in order.
    """
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in straight}
    found, count = [], count_of(straight)
    for start in range(0, len(rows), count):
        once = slice(start, start + count)
        found.append({name: y.copy() for name, y in straight.items()})
        for name, y in found[-1].items():
            y[rows[once]] = outputs[name][once]
    return tuple(found)


def operator_inputs(inputs: Inputs, batch: Batch) -> Arrays:
    """The images the operator criterion looks at: about four, fewer large ones, or the smallest batch allowed."""
    fitting = max(1, _OPERATOR_PIXELS // pixels_of(inputs))
    return resized(inputs, max(batch.minimum, min(_OPERATOR_IMAGES, batch.maximum, fitting)))


def reference_rungs(references: References, precision: Precision) -> list[Rung]:
    """What rounding alone costs: the first unfused network, and the others beside it.

    Each is one draw of rounding the same network, and no number bounds what two draws may differ by. What they have to
    be is finite, less than all of the output, and the model itself where nothing is rounded.
    """
    rungs = [
        Rung(name, references.runtime, precision.name, not_run=reason) for name, reason in references.unusable.items()
    ]
    first, factor = next(iter(references.rounded.values())), precision.network_factor
    for name, outputs in references.rounded.items():
        rounded = [first] if outputs is first else [first, outputs]
        checks = compare(outputs, rounded, references.oracle, factor, precision.network_floor, references.kinds)
        if name in references.wrong:
            checks = {"(exact)": NetworkCheck.refused(factor, references.wrong[name]), **checks}
        seconds = references.seconds if outputs is first else 0.0
        rungs.append(Rung(name, references.runtime, precision.name, outputs=checks, seconds=seconds))
    return rungs


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
        compare(outputs, rounded, references.oracle, factor, precision.network_floor, references.kinds)
        for outputs in (execution.straight, *execution.again)
    ]
    names = {name: None for run in runs for name in run}
    outputs = {name: max((run[name] for run in runs if name in run), key=_severity) for name in names}
    if execution.changed_input:
        outputs["(input)"] = NetworkCheck.refused(factor, "the input was written to")
    return Rung(
        name=execution.name,
        runtime=execution.runtime,
        precision=precision.name,
        file=execution.file,
        outputs=outputs,
        operators=operators,
        seconds=execution.seconds,
    )


def attempt(runner: Runner, obstacle: str, precision: Precision, inputs: Inputs, batch: Batch) -> Execution | Rung:
    """What an artefact computes; a rung where this machine cannot run it, or where it should and fails.

    `obstacle` says why it cannot, empty where nothing is known to speak against it.
    """
    if obstacle:
        return Rung(runner.name, runner.runtime, precision.name, runner.file, not_run=obstacle)
    try:
        return execute(runner, inputs, batch)
    except ExportError as error:
        refused = {"(run)": NetworkCheck.refused(precision.network_factor, str(error))}
        return Rung(runner.name, runner.runtime, precision.name, runner.file, refused)


def judge_attempt(outcome: Execution | Rung, references: References, precision: Precision, factor: float) -> Rung:
    """`judge` of what `attempt` gave."""
    return outcome if isinstance(outcome, Rung) else judge(outcome, references, precision, factor)


def _severity(check: NetworkCheck) -> tuple[bool, float]:
    return (not check, check.ratio if math.isfinite(check.ratio) else math.inf)
