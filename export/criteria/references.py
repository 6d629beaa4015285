"""Run what every form is compared with: the user's model in float64, and what rounding alone makes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.base.batch import Arrays, at_once, run_in_batches
from export.base.precision import DOUBLE, Precision
from export.fusion.program import FusedProgram
from export.lowering.runners import EagerRunner, ProgramRunner, UnfusedRunner
from export.runtime.parity.ladder import FOLDED_FACTOR, References
from export.runtime.parity.network import relative_error
from export.runtime.runner import Runner

_EXACT = 1e-9  # relative error of float64 arithmetic in another order


def run_references(
    model: nn.Module, program: FusedProgram, names: tuple[str, ...], images: NDArray, precision: Precision
) -> References:
    """Run the user's model in float64, and what rounding alone makes of it in the precision under test."""
    return run_rounded(run_oracle(model, program, names, images), model, program, precision)


def run_oracle(model: nn.Module, program: FusedProgram, names: tuple[str, ...], images: NDArray) -> References:
    """Run the user's model in float64; nothing yet says what rounding makes of it."""
    with EagerRunner(model, torch.float64, names) as runner:
        return References(images, {}, run_in_batches(runner.infer, images, program.batch, at_once(images)))


def run_rounded(references: References, model: nn.Module, program: FusedProgram, precision: Precision) -> References:
    """The same images and oracle, with two unfused networks run in `precision`.

    They are the user's model, or where operators of the program are kept in float32 its captured graph with those in
    float32 too, and the captured graph with BatchNorm folded. The first may overflow where the second does not, between
    a convolution and its BatchNorm: then it is no reference.
    """
    names, images = tuple(references.oracle), references.images
    eager: Runner = EagerRunner(model, precision.dtype, names)
    if program.kept:
        eager = UnfusedRunner("unfused", program, program.source, precision, names)
    rounded, seconds = {}, []
    for runner in (eager, UnfusedRunner("folded", program, program.folded, precision, names)):
        with runner:
            started = time.perf_counter()
            rounded[runner.name] = run_in_batches(runner.infer, images, program.batch, at_once(images))
            seconds.append((time.perf_counter() - started) / len(images))
    why_not = _no_reference(program, rounded[eager.name], rounded["folded"], references, precision)
    unusable = {eager.name: why_not} if why_not else {}
    rounded = {name: outputs for name, outputs in rounded.items() if name not in unusable}
    return References(images, rounded, references.oracle, eager.runtime, seconds[0], unusable)


def _no_reference(
    program: FusedProgram, eager: Arrays, folded: Arrays, references: References, precision: Precision
) -> str:
    """Why the unfused model does not say what rounding does to the network, empty where it does."""
    oracle, images = references.oracle, references.images
    why_not = ""
    for name, exact in oracle.items():
        if np.issubdtype(exact.dtype, np.floating):
            error, other = (relative_error(outputs[name], exact) for outputs in (eager, folded))
            if not np.isfinite(other) or other > FOLDED_FACTOR * max(error, precision.network_floor):
                return ""  # the folded network is the one that is wrong: it is held to this one
            if error > FOLDED_FACTOR * max(other, precision.network_floor):
                why_not = f"the error of {name} in {precision.name} is {error:.2g}, with BatchNorm folded {other:.2g}"
    return why_not if why_not and _folded_exactly(program, oracle, images) else ""


def _folded_exactly(program: FusedProgram, oracle: Arrays, images: NDArray) -> bool:
    """Whether folding alone, in float64, leaves the outputs as they were."""
    runner = UnfusedRunner("folded", program, program.folded, DOUBLE, tuple(oracle))
    with runner:
        folded = run_in_batches(runner.infer, images, program.batch, at_once(images))
    errors = [relative_error(folded[name], y) for name, y in oracle.items() if np.issubdtype(y.dtype, np.floating)]
    return max(errors) < _EXACT


def run_simulations(references: References, simulations: Mapping[str, tuple[FusedProgram, Precision]]) -> References:
    """The same images and oracle, with other programs as what rounding alone makes of them.

    `simulations`: name -> program, and the precision of what is not quantised in it.
    """
    rounded, names = {}, tuple(references.oracle)
    seconds = 0.0
    for name, (program, precision) in simulations.items():
        with ProgramRunner(program, precision, names) as runner:
            started = time.perf_counter()
            rounded[name] = run_in_batches(runner.infer, references.images, program.batch, at_once(references.images))
            seconds = (time.perf_counter() - started) / len(references.images)
    return References(references.images, rounded, references.oracle, references.runtime, seconds)
