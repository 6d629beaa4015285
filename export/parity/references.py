"""Run what every form is compared with: the user's model in float64, and what rounding alone makes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from numpy.typing import NDArray
from torch import nn

from export.batch import run_in_batches
from export.parity.ladder import References
from export.precision import Precision
from export.program import FusedProgram
from export.runners import EagerRunner, FoldedRunner, ProgramRunner


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
    rounded = {EagerRunner.name: eager, FoldedRunner.name: folded}
    return References(images, rounded, oracle, EagerRunner.runtime, seconds)


def run_simulations(references: References, simulations: Mapping[str, tuple[FusedProgram, Precision]]) -> References:
    """The same images and oracle, with other programs as what rounding alone makes of them.

    `simulations`: name -> program, and the precision of what is not quantised in it.
    """
    rounded, names = {}, tuple(references.oracle)
    seconds = 0.0
    for name, (program, precision) in simulations.items():
        with ProgramRunner(program, precision, names) as runner:
            started = time.perf_counter()
            rounded[name] = run_in_batches(runner.infer, references.images, program.batch, len(references.images))
            seconds = (time.perf_counter() - started) / len(references.images)
    return References(references.images, rounded, references.oracle, references.runtime, seconds)
