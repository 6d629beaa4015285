"""The forms of a network that an export compares and ships, and what each of them is held to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import onnx
import torch
from torch import Tensor

from export.base.normalisation import Normalisation
from export.base.precision import INT8, PRECISIONS, Precision
from export.base.progress import Progress
from export.criteria.operators import OperatorChecks, check_operators
from export.criteria.quantised import check_quantised, shown_values
from export.fusion.nodes import is_call, module_path, resnet_deploy
from export.fusion.program import FusedProgram
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.quantisation.calibration import Calibration
from export.quantisation.quantise import quantisable, quantised_programs
from export.quantisation.scheme import CPU, TENSORRT
from export.runtime.onnx_session import ONNX_FILE, optimised_operators, runs_rounded
from export.runtime.parity.rungs import LayerCost, Quantisation
from export.runtime.runner import Runner

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Check = Callable[[Mapping[str, Tensor]], OperatorChecks]


@dataclass(frozen=True)
class Form:
    """One form that runs on this machine.

    Attributes:
        runner: what runs it.
        precision: of its weights and activations.
        check: what its intermediate tensors are held to.
        measured: whether its accuracy counts.
    """

    runner: Runner
    precision: Precision
    check: Check
    measured: bool = True


@dataclass(frozen=True)
class Forms:
    """What an export made of a fused program.

    Attributes:
        files: name in the bundle -> ONNX file. Engines are built from ONNX_FILE.
        candidates: what is compared, but for the engines.
        arithmetic: of the unfused networks that candidates of floating-point precisions are compared with.
        simulations: what those of 8 bits are compared with: name -> program, and the precision it is run in.
        kept: the layers that compute in a wider type than the precision, by the names of their ONNX nodes.
        quantisation: how it was quantised; None for floating-point precisions.
        costs: finds what each layer costs in 8 bits, however late one comes to want it.
    """

    files: Mapping[str, OnnxFile]
    candidates: tuple[Form, ...]
    arithmetic: Precision
    simulations: Mapping[str, tuple[FusedProgram, Precision]]
    kept: frozenset[str] = frozenset()
    quantisation: Quantisation | None = None
    costs: Callable[[], tuple[LayerCost, ...]] = tuple


def floating_forms(
    program: FusedProgram, precision: Precision, progress: Progress, normalisation: Normalisation | None = None
) -> Forms:
    """The fused program and its ONNX file in a floating-point precision; `normalisation` as in `lower_onnx`."""
    progress("write ONNX")
    facts = {"precision": precision.name, "batch": str(program.batch)}
    onnx_file = lower_onnx(program, precision, facts, normalisation)
    names, fused = onnx_file.output_names, partial(check_operators, program, precision)
    kept = _layers_in(onnx_file.model, {onnx.TensorProto.FLOAT}) if precision.name != "fp32" else frozenset()
    on_gpu = torch.cuda.is_available()
    candidates = [Form(ProgramRunner(program, precision, names), precision, fused, measured=not on_gpu)]
    if on_gpu:
        candidates.append(Form(ProgramRunner(program, precision, names, device="cuda"), precision, fused))
    separate = partial(check_operators, program, precision, separate_addition=True)  # standard ONNX adds in a node
    candidates.append(Form(TracedOnnxRunner(onnx_file, precision), precision, separate))
    return Forms({ONNX_FILE: onnx_file}, tuple(candidates), precision, {}, kept)


def quantised_forms(
    program: FusedProgram,
    calibration: Calibration,
    kept: frozenset[str],
    costs: tuple[LayerCost, ...],
    progress: Progress,
    normalisation: Normalisation | None = None,
) -> Forms:
    """The two ONNX files of an 8-bit network, and the float32 program that they are made from.

    Args:
        program: fused at level b.
        calibration: the ranges of its values.
        kept: layers that stay in floating point.
        costs: of the layers, for the record; none where they are not measured.
        progress: called with the name of each step.
        normalisation: as in `lower_onnx`.
    """
    single = PRECISIONS["fp32"]
    programs = quantised_programs(program, calibration.ranges, kept)
    files, candidates = {}, []
    for scheme, quantised in programs.items():
        progress(f"write {scheme.file}")
        facts = {"precision": INT8.name, "batch": str(program.batch), "purpose": scheme.purpose}
        onnx_file = lower_onnx(quantised, scheme.arithmetic, facts, normalisation)
        onnx_file = replace(onnx_file, values=shown_values(quantised, onnx_file))
        files[scheme.file] = onnx_file
        runner = TracedOnnxRunner(onnx_file, scheme.arithmetic, scheme.file, runs_rounded(INT8.name, scheme.file))
        check = partial(check_quantised, quantised, calibration.ranges, scheme)
        candidates.append(Form(runner, INT8, check))
    names = files[ONNX_FILE].output_names
    fused = Form(
        ProgramRunner(program, single, names), single, partial(check_operators, program, single), measured=False
    )
    left = _layers_in(files[TENSORRT.file].model, {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16})
    run = optimised_operators(files[CPU.file].model)
    convolutions = [n for n in quantisable(program.master) if is_call(n, resnet_deploy.conv2d_bias_act.default)]
    quantisation = Quantisation(
        calibration.method,
        calibration.images,
        calibration.sha256,
        sum(module_path(layer) not in kept for layer in quantisable(program.master)),
        tuple(sorted(left)),
        costs,
        {scheme.file: scheme.purpose for scheme in programs},
        len(convolutions) - run["QLinearConv"],
    )
    simulations: dict[str, tuple[FusedProgram, Precision]] = {
        f"sim. {scheme.name}": (programs[scheme], single) for scheme in (CPU, TENSORRT)
    }
    if left:  # what stays in float16 is rounded too
        simulations["fp16"] = (program, PRECISIONS["fp16"])
    return Forms(files, (fused, *candidates), single, simulations, left, quantisation)


def _layers_in(model: onnx.ModelProto, types: Collection[int]) -> frozenset[str]:
    """The nodes that compute with constant weights of one of these types."""
    constants, found = {tensor.name: tensor.data_type for tensor in model.graph.initializer}, set()
    for node in model.graph.node:
        if node.op_type in _WEIGHTED and constants.get(node.input[1]) in types:
            found.add(node.name)
        if node.op_type != "DequantizeLinear" and all(name in constants for name in node.input if name):
            kind = constants[node.input[0]] if node.input else onnx.TensorProto.UNDEFINED
            constants |= dict.fromkeys(node.output, kind)  # such as a transposed weight
    return frozenset(found)
