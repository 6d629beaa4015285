"""Decide which layers of a network compute in a wider type than the others."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from export.base.batch import Inputs
from export.base.errors import ExportError
from export.base.normalisation import Normalisation
from export.base.precision import Precision
from export.base.progress import Progress
from export.config import AUTO, ExportConfig
from export.criteria.operators import check_alone, check_operators
from export.criteria.references import run_oracle, run_rounded
from export.forms import Forms, quantised_forms
from export.fusion.nodes import FUSED_OPERATORS, constant, is_call, module_path
from export.fusion.program import FusedProgram, operator_nodes, output_names
from export.lowering.runners import ProgramRunner, cast
from export.quantisation.calibration import Pictures, calibrate
from export.quantisation.quantise import quantisable, quantised_programs
from export.quantisation.sensitivity import layer_costs
from export.quantisation.split_addition import split_addition
from export.runtime.parity.ladder import References, execute, judge, operator_inputs
from export.runtime.parity.rungs import LayerCost


def keep_float32(
    model: nn.Module,
    program: FusedProgram,
    precision: Precision,
    names: tuple[str, ...],
    inputs: Inputs,
    progress: Progress,
) -> FusedProgram:
    """The program with some of its operators in float32.

    Args:
        model: that the program was fused from.
        program: of which none is kept.
        precision: of the others, 16 bits.
        names: of operators, or of modules that they compute or that hold them; or AUTO for the fewest with which the
            program is equal to the eager model.
        inputs: to judge that by.
        progress: called with what is being done.

    Raises:
        ExportError: a name that stands for nothing; nothing would be left in `precision`.
    """
    operators = _operators(program)
    kept = (
        _fewest(model, program, precision, inputs, progress)
        if names == AUTO
        else chosen("ExportConfig.keep_fp32", operators, names)
    )
    if kept >= operators.keys():
        every = f"all {len(operators)} operators would be kept in float32, none is left"
        raise ExportError(f"{every}: use ExportConfig.precision='fp32'")
    return program.keeping(kept) if kept else program


def quantise_network(
    program: FusedProgram,
    config: ExportConfig,
    calibration: Pictures,
    inputs: Inputs,
    retains: Callable[[FusedProgram], bool] | None,
    progress: Progress,
    normalisation: Normalisation | None = None,
) -> Forms:
    """Calibrate, find which layers stay in floating point and, where that is asked, what each costs, write the files.

    Args:
        program: fused at level b.
        config: the method of calibration, and what to keep.
        calibration: inputs whose activations set the scales.
        inputs: by which the costs are measured.
        retains: says whether a quantised program keeps the accuracy; without it `auto` keeps no layer.
        progress: called with what is being done.
        normalisation: as in `lower_onnx`.

    Raises:
        ExportError: a name that stands for no layer; nothing would be left to quantise; a range no scale can hold.
    """
    layers = {module_path(layer): () for layer in quantisable(program.master)}
    kept = frozenset() if config.keep_fp16 == AUTO else chosen("ExportConfig.keep_fp16", layers, config.keep_fp16)
    progress(f"calibrate on {len(calibration)} images")
    calibrated = calibrate(
        split_addition(program.master), calibration, config.calibration_method, program.batch, progress
    )

    @cache
    def costs() -> tuple[LayerCost, ...]:
        progress("quantise one layer at a time")
        shown = cast(operator_inputs(inputs, program.batch), torch.float32)
        return tuple(layer_costs(program.master, calibrated.ranges, shown, progress))

    found = costs() if config.layer_costs else ()
    if config.keep_fp16 == AUTO and retains is not None:
        progress("look for the fewest layers to keep in fp16")

        @cache
        def passes(kept: frozenset[str]) -> bool:
            return all(map(retains, quantised_programs(program, calibrated.ranges, kept).values()))

        if not passes(frozenset()):
            found = costs()
            kept = fewest([cost.name for cost in found], passes)
    if kept >= layers.keys():
        every = f"all {len(layers)} layers would be kept in fp16, nothing is left to quantise"
        raise ExportError(f"{every}: use ExportConfig.precision='fp16'")
    return replace(quantised_forms(program, calibrated, kept, found, progress, normalisation), costs=costs)


def _operators(program: FusedProgram) -> dict[str, tuple[str, ...]]:
    """Name of an operator -> the modules that it computes."""
    found: dict[str, tuple[str, ...]] = {}
    for node in operator_nodes(program.master):
        parts = tuple(node.meta["fused"]) if is_call(node, *FUSED_OPERATORS) else ()
        found[module_path(node)] = (*found.get(module_path(node), ()), *parts)
    return found


def _fewest(
    model: nn.Module, program: FusedProgram, precision: Precision, inputs: Inputs, progress: Progress
) -> frozenset[str]:
    progress("look for operators that this precision does not suit")
    outside = _outside(program, precision)
    severity = dict.fromkeys(_operators(program), 0.0)
    shown = cast(operator_inputs(inputs, program.batch), torch.float32)
    for check in check_alone(program, precision, shown):
        severity[check.name] = max(severity[check.name], check.severity)
    ordered = sorted((name for name in severity if name not in outside), key=severity.__getitem__, reverse=True)
    oracle = run_oracle(model, program, output_names(program.master), inputs)
    tried = 0

    def passes(kept: frozenset[str]) -> bool:
        nonlocal tried
        tried += 1
        progress(f"keep {len(outside | kept)} of {len(severity)} operators in float32 (attempt {tried})")
        return _equal(model, program.keeping(outside | kept), precision, oracle)

    return outside | fewest(ordered, passes)


def _outside(program: FusedProgram, precision: Precision) -> frozenset[str]:
    """The operators whose weights the type cannot hold."""
    found = set()
    for node in operator_nodes(program.master):
        weights = (constant(program.master, n) for n in node.all_input_nodes)
        if any(w is not None and not bool(torch.isfinite(w.to(precision.dtype)).all()) for w in weights):
            found.add(module_path(node))
    return frozenset(found)


def _equal(model: nn.Module, program: FusedProgram, precision: Precision, oracle: References) -> bool:
    """Whether a program passes the operator criterion and, only then tried, the network criterion."""
    runner = ProgramRunner(program, precision, tuple(oracle.oracle))
    with runner:
        trace = runner.trace(operator_inputs(oracle.inputs, program.batch))
    operators = check_operators(program, precision, trace)
    if not operators:
        return False
    references = run_rounded(oracle, model, program, precision)
    execution = execute(runner, oracle.inputs, program.batch)
    return bool(judge(execution, references, precision, precision.network_factor, operators))


def chosen(field: str, layers: Mapping[str, Collection[str]], patterns: Collection[str]) -> frozenset[str]:
    """The layers that `patterns` stand for: by their own names, or those of modules they hold or are part of.

    Args:
        field: of the settings that holds the patterns.
        layers: name -> modules of the user's model that it computes.
        patterns: names of modules.

    Raises:
        ExportError: a name that stands for none.
    """
    found: set[str] = set()
    for pattern in patterns:
        named = {
            layer
            for layer, modules in layers.items()
            if any(module == pattern or module.startswith(f"{pattern}.") for module in (layer, *modules))
        }
        if not named:
            near = difflib.get_close_matches(pattern, layers, n=3) or list(layers)[:3]
            hint = f"expected a layer, or a module with layers, such as {', '.join(near)}"
            raise ExportError(f"{field}: no layer is called {pattern!r}; {hint}")
        found |= named
    return frozenset(found)


def fewest(names: Sequence[str], passes: Callable[[frozenset[str]], bool]) -> frozenset[str]:
    """A set that passes and from which none can be left out, of names taken in their order.

    Bisection finds how many of the first it takes; then each of them that is not needed is given back.

    Args:
        names: the most likely first.
        passes: whether the network is good enough with these; with all of them it is taken to be.
    """
    if passes(frozenset()):
        return frozenset()
    low, high = 0, len(names)  # it fails with the first `low` and passes with the first `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(frozenset(names[:middle])) else (middle, high)
    kept = set(names[:high])
    for name in reversed(names[: high - 1]):  # the last one is needed
        if passes(frozenset(kept - {name})):
            kept.remove(name)
    return frozenset(kept)
