"""Run what every form is compared with: the user's model in float64, and what rounding alone makes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import fx, nn

from export.base.batch import Arrays, Inputs, at_once, count_of, rows_of, run_in_batches
from export.base.errors import ExportError
from export.base.memory import give_back
from export.base.precision import DOUBLE, PRECISIONS, Precision
from export.fusion.program import FusedProgram
from export.lowering.runners import EagerRunner, ProgramRunner, UnfusedRunner
from export.runtime.parity.ladder import ENGINE_FACTOR, References, operator_inputs
from export.runtime.parity.network import VALUES, OutputKind, compare, relative_error
from export.runtime.runner import Runner

_EXACT = 1e-9  # relative error of float64 arithmetic in another order
_EXACT_SHARE = 4  # values of float64 are large: of few images, what lies between two operators fits into the caches
_FOLD_IMAGES = 2  # any weight that is folded wrongly shows in float64 on any image on which its channel is not dead
_SAME = 2.0**-20  # 16 roundoffs of float32, which the constants made in forward have in the captured graph


def run_references(
    model: nn.Module, program: FusedProgram, names: tuple[str, ...], inputs: Inputs, precision: Precision
) -> References:
    """Run the user's model in float64, and what rounding alone makes of it in the precision under test."""
    return run_rounded(run_oracle(model, program, names, inputs), model, program, precision)


def run_oracle(model: nn.Module, program: FusedProgram, names: tuple[str, ...], inputs: Inputs) -> References:
    """Run the user's model in float64; nothing yet says what rounding makes of it.

    Where it leaves float64, as a model with `x.float()` does, its captured graph stands in, once that was seen to
    compute what the model does in float32.

    Raises:
        ExportError: the model runs neither way, or the graph computes something else.
    """
    failure, oracle = "", {}
    try:
        oracle = _outputs(EagerRunner(model, torch.float64, names, program.inputs), program, inputs, _EXACT_SHARE)
        if all(y.dtype == np.float64 or not np.issubdtype(y.dtype, np.floating) for y in oracle.values()):
            return References(inputs, {}, oracle)
    except ExportError as error:
        failure = f"{error}; and "
    captured = _outputs(UnfusedRunner("unfused", program, program.source, DOUBLE, names), program, inputs, _EXACT_SHARE)
    if oracle and all(relative_error(captured[name], y) <= _SAME for name, y in oracle.items()):
        return References(inputs, {}, captured)  # of a narrower type in the end alone
    single = PRECISIONS["fp32"]
    eager = _outputs(EagerRunner(model, single.dtype, names, program.inputs), program, inputs)
    graph = _outputs(UnfusedRunner("unfused", program, program.source, single, names), program, inputs)
    for name, exact in captured.items():
        apart, rounding = relative_error(eager[name], exact), relative_error(graph[name], exact)
        if not apart <= single.network_factor * max(rounding, single.network_floor):
            raise ExportError(
                f"{failure}{name} of the eager model in float32 is {apart:.2g} from that of its graph: expected the "
                "same; take autocast, .half() and .float() out of forward, the export chooses the type"
            )
    oracle = captured
    return References(inputs, {}, oracle)


def run_rounded(references: References, model: nn.Module, program: FusedProgram, precision: Precision) -> References:
    """The same images and oracle, with two unfused networks run in `precision`.

    They are the user's model, or where operators of the program are kept in float32 its captured graph with those in
    float32 too, and the captured graph with BatchNorm folded. The first may overflow where the second does not, between
    a convolution and its BatchNorm: then it is no reference. Where the model does not run in the precision, as with a
    float32 constant that forward makes, its captured graph stands in, once that was seen to compute the oracle.
    """
    names, unusable = tuple(references.oracle), {}
    eager: Runner = EagerRunner(model, precision.dtype, names, program.inputs)
    unfused = UnfusedRunner("unfused", program, program.source, precision, names)
    folded = UnfusedRunner("folded", program, program.folded, precision, names)
    rounded, seconds = {}, []
    for runner in (unfused if program.kept else eager, folded):
        give_back()
        started = time.perf_counter()
        try:
            rounded[runner.name] = _outputs(runner, program, references.inputs)
        except ExportError as error:
            if runner is not eager or not _captured_exactly(program, references):
                raise
            unusable[eager.name] = str(error)
            rounded[unfused.name] = _outputs(unfused, program, references.inputs)
        seconds.append((time.perf_counter() - started) / count_of(references.inputs))
    wrong, first = _wrong_fold(program, references), next(iter(rounded))
    why_not = "" if wrong else _no_reference(rounded[first], rounded["folded"], references, precision)
    if why_not:
        unusable[first] = why_not
        del rounded[first]
    return replace(
        references,
        rounded=rounded,
        runtime=eager.runtime,
        seconds=seconds[0],
        unusable=unusable,
        wrong={"folded": wrong} if wrong else {},
    )


def _outputs(runner: Runner, program: FusedProgram, inputs: Inputs, share: int = 1) -> Arrays:
    """The outputs for all images, run one part in `share` of what fits at once."""
    with runner:
        return run_in_batches(runner.infer, inputs, program.batch, max(2, at_once(inputs) // share))


def _captured_exactly(program: FusedProgram, references: References) -> bool:
    """Whether the captured graph computes the oracle in float64."""
    runner = UnfusedRunner("unfused", program, program.source, DOUBLE, tuple(references.oracle))
    captured = _outputs(runner, program, references.inputs, _EXACT_SHARE)
    return all(relative_error(captured[name], y) <= _SAME for name, y in references.oracle.items())


def _no_reference(eager: Arrays, folded: Arrays, references: References, precision: Precision) -> str:
    """Why the unfused model does not say what rounding does to the network, empty where it does.

    It is held to the folded one, which has been seen to be the model, as a runtime that fuses otherwise would be.
    """
    for name, exact in references.oracle.items():
        if np.issubdtype(exact.dtype, np.floating):
            error, other = (relative_error(outputs[name], exact) for outputs in (eager, folded))
            if np.isfinite(other) and error > ENGINE_FACTOR * max(other, precision.network_floor):
                return f"the error of {name} in {precision.name} is {error:.2g}, with BatchNorm folded {other:.2g}"
    return ""


def _wrong_fold(program: FusedProgram, references: References) -> str:
    """How the graph with BatchNorm folded differs from the model where nothing is rounded, empty where it does not.

    What differs in a type of fewer bits alone is then the rounding of its weights and values, however much that is:
    two ways to round the same network, each of them one draw, may differ by any factor. Looked at are the images of
    the operator criterion. The constants that forward makes are of float32 in the graph, and may be of float64 in the
    model: they may differ by that, the fold may not.
    """
    images = operator_inputs(references.inputs, program.batch)
    images = rows_of(images, slice(max(program.batch.minimum, _FOLD_IMAGES)))
    rows = np.resize(np.arange(count_of(references.inputs)), count_of(images))
    oracle, exact = {name: y[rows] for name, y in references.oracle.items()}, program.keeping(())

    def outputs(graph_module: fx.GraphModule) -> Arrays:
        return _outputs(UnfusedRunner("exact", exact, graph_module, DOUBLE, tuple(oracle)), exact, images)

    folded = outputs(program.folded)
    if not _difference(folded, oracle, _EXACT):
        return ""
    captured = outputs(program.source)
    unlike = _difference(captured, oracle, _SAME)
    if unlike:
        return f"the captured graph in float64 is not the model: {unlike}"
    unlike = _difference(folded, captured, _EXACT)
    return f"with BatchNorm folded the graph in float64 is not the model: {unlike}" if unlike else ""


def _difference(outputs: Arrays, expected: Arrays, limit: float) -> str:
    """Which output differs by more than a relative error of `limit`, and by how much; empty where none does."""
    checks = compare(outputs, [expected], expected, 1.0, limit, dict.fromkeys(expected, OutputKind(VALUES)))
    return next((f"{name} is {check.error:.2g} from it" for name, check in checks.items() if not check), "")


def run_simulations(references: References, simulations: Mapping[str, tuple[FusedProgram, Precision]]) -> References:
    """The same images and oracle, with other programs as what rounding alone makes of them.

    `simulations`: name -> program, and the precision of what is not quantised in it.
    """
    rounded, names = {}, tuple(references.oracle)
    seconds = 0.0
    for name, (program, precision) in simulations.items():
        with ProgramRunner(program, precision, names) as runner:
            started = time.perf_counter()
            rounded[name] = run_in_batches(runner.infer, references.inputs, program.batch, at_once(references.inputs))
            seconds = (time.perf_counter() - started) / count_of(references.inputs)
    return replace(references, rounded=rounded, seconds=seconds, unusable={})
