"""Run what every form is compared with: the user's model in float64, and what rounding alone makes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.base.batch import Arrays, at_once, run_in_batches
from export.base.errors import ExportError
from export.base.precision import DOUBLE, PRECISIONS, Precision
from export.fusion.nodes import deep_copy
from export.fusion.program import FusedProgram
from export.lowering.runners import EagerRunner, ProgramRunner, UnfusedRunner
from export.runtime.parity.ladder import FOLDED_FACTOR, References
from export.runtime.parity.network import VALUES, OutputKind, compare, relative_error
from export.runtime.runner import Runner

_EXACT = 1e-9  # relative error of float64 arithmetic in another order
_DRAWS = 8
_SAME = 2.0**-20  # 16 roundoffs of float32, which the constants made in forward have in the captured graph


def run_references(
    model: nn.Module, program: FusedProgram, names: tuple[str, ...], images: NDArray, precision: Precision
) -> References:
    """Run the user's model in float64, and what rounding alone makes of it in the precision under test."""
    return run_rounded(run_oracle(model, program, names, images), model, program, precision)


def run_oracle(model: nn.Module, program: FusedProgram, names: tuple[str, ...], images: NDArray) -> References:
    """Run the user's model in float64; nothing yet says what rounding makes of it.

    Where it leaves float64, as a model with `x.float()` does, its captured graph stands in, once that was seen to
    compute what the model does in float32.

    Raises:
        ExportError: the model runs neither way, or the graph computes something else.
    """
    failure, oracle = "", {}
    try:
        oracle = _outputs(EagerRunner(model, torch.float64, names), program, images)
        if all(y.dtype == np.float64 or not np.issubdtype(y.dtype, np.floating) for y in oracle.values()):
            return References(images, {}, oracle)
    except ExportError as error:
        failure = f"{error}; and "
    captured = _outputs(UnfusedRunner("unfused", program, program.source, DOUBLE, names), program, images)
    if oracle and all(relative_error(captured[name], y) <= _SAME for name, y in oracle.items()):
        return References(images, {}, captured)  # of a narrower type in the end alone
    single = PRECISIONS["fp32"]
    eager = _outputs(EagerRunner(model, single.dtype, names), program, images)
    graph = _outputs(UnfusedRunner("unfused", program, program.source, single, names), program, images)
    for name, exact in captured.items():
        apart, rounding = relative_error(eager[name], exact), relative_error(graph[name], exact)
        if not apart <= FOLDED_FACTOR * max(rounding, single.network_floor):
            raise ExportError(
                f"{failure}{name} of the eager model in float32 is {apart:.2g} from that of its graph: expected the "
                "same; take autocast, .half() and .float() out of forward, the export chooses the type"
            )
    oracle = captured
    return References(images, {}, oracle)


def run_rounded(references: References, model: nn.Module, program: FusedProgram, precision: Precision) -> References:
    """The same images and oracle, with two unfused networks run in `precision`.

    They are the user's model, or where operators of the program are kept in float32 its captured graph with those in
    float32 too, and the captured graph with BatchNorm folded. The first may overflow where the second does not, between
    a convolution and its BatchNorm, or be far closer by chance: then it is no reference. Where the model does not run
    in the precision, as with a float32 constant that forward makes, its captured graph stands in, once that was seen to
    compute the oracle.
    """
    names, unusable = tuple(references.oracle), {}
    eager: Runner = EagerRunner(model, precision.dtype, names)
    unfused = UnfusedRunner("unfused", program, program.source, precision, names)
    folded = UnfusedRunner("folded", program, program.folded, precision, names)
    rounded, seconds = {}, []
    for runner in (unfused if program.kept else eager, folded):
        started = time.perf_counter()
        try:
            rounded[runner.name] = _outputs(runner, program, references.images)
        except ExportError as error:
            if runner is not eager or not _captured_exactly(program, references):
                raise
            unusable[eager.name] = str(error)
            rounded[unfused.name] = _outputs(unfused, program, references.images)
        seconds.append((time.perf_counter() - started) / len(references.images))
    first = next(iter(rounded))
    why_not = _no_reference(program, rounded[first], rounded["folded"], references, precision)
    if why_not:
        unusable[first] = why_not
        del rounded[first]
    return replace(references, rounded=rounded, runtime=eager.runtime, seconds=seconds[0], unusable=unusable)


def _outputs(runner: Runner, program: FusedProgram, images: NDArray) -> Arrays:
    with runner:
        return run_in_batches(runner.infer, images, program.batch, at_once(images))


def _captured_exactly(program: FusedProgram, references: References) -> bool:
    """Whether the captured graph computes the oracle in float64."""
    runner = UnfusedRunner("unfused", program, program.source, DOUBLE, tuple(references.oracle))
    captured = _outputs(runner, program, references.images)
    return all(relative_error(captured[name], y) <= _SAME for name, y in references.oracle.items())


def _no_reference(
    program: FusedProgram, eager: Arrays, folded: Arrays, references: References, precision: Precision
) -> str:
    """Why the unfused model does not say what rounding does to the network, empty where it does."""
    oracle, images = references.oracle, references.images
    why_not = ""
    if not _as_exact(folded, [eager], oracle, precision):
        drawn = [] if program.kept else _drawn(program, references, precision)
        if not drawn or not _as_exact(folded, [eager, *drawn], oracle, precision):
            return ""  # the folded network is the one that is wrong: it is held to this one
        why_not = f"in {precision.name} its error is small by chance: not so with its weights rounded up or down by lot"
    for name, exact in oracle.items():
        if np.issubdtype(exact.dtype, np.floating):
            error, other = (relative_error(outputs[name], exact) for outputs in (eager, folded))
            if error > FOLDED_FACTOR * max(other, precision.network_floor):
                why_not = f"the error of {name} in {precision.name} is {error:.2g}, with BatchNorm folded {other:.2g}"
    return why_not if why_not and _folded_exactly(program, oracle, images) else ""


def _as_exact(folded: Arrays, others: list[Arrays], oracle: Arrays, precision: Precision) -> bool:
    """Whether folding costs no output more than two draws of rounding may differ by."""
    kinds = dict.fromkeys(oracle, OutputKind(VALUES))
    return all(compare(folded, others, oracle, FOLDED_FACTOR, precision.network_floor, kinds).values())


def _drawn(program: FusedProgram, references: References, precision: Precision) -> list[Arrays]:
    """What the captured graph makes of the images with each weight first moved by up to a roundoff, by chance.

    What rounding the weights costs is one draw, alike for all images: of a single logit it may be next to nothing.
    """
    found, generator = [], torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        graph_module = deep_copy(program.source)
        for tensor in [*graph_module.parameters(), *graph_module.buffers()]:
            if tensor.is_floating_point():
                moves = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
                tensor.data = tensor.data * (1 + precision.roundoff * moves)
        runner = UnfusedRunner("drawn", program, graph_module, precision, tuple(references.oracle))
        found.append(_outputs(runner, program, references.images))
    return found


def _folded_exactly(program: FusedProgram, oracle: Arrays, images: NDArray) -> bool:
    """Whether folding alone, in float64, leaves the outputs as they were."""
    runner = UnfusedRunner("folded", program, program.folded, DOUBLE, tuple(oracle))
    folded = _outputs(runner, program, images)
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
    return replace(references, rounded=rounded, seconds=seconds, unusable={})
