"""The gate on the gate: every defect is refused, every correct pipeline accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.capture import Batch
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.parity.evidence import check_evidence
from export.parity.ladder import References, execute, judge, run_references
from export.parity.operators import check_operators
from export.parity.report import Rung
from export.passes.fuse_epilogue import FUSED
from export.precision import PRECISIONS
from export.program import FusedProgram, fuse
from export.runners import OnnxRuntimeRunner, ProgramRunner, Runner
from tests.export import mutants

NAMES = ("output",)
BATCH = Batch(1, 4, 8)


@dataclass(frozen=True)
class Subject:
    """One network with its references in every precision."""

    program: FusedProgram
    images: NDArray[np.float32]
    references: Mapping[str, References]

    def judge(self, runner: Runner, precision: str, program: FusedProgram | None = None) -> Rung:
        p = PRECISIONS[precision]
        execution = execute(runner, self.images.copy(), BATCH)
        operators = check_operators(program or self.program, p, execution.trace, runner.name == "onnx")
        return judge(execution, self.references[precision], p, p.network_factor, operators)


def make_subject(model: nn.Module, images: Tensor) -> Subject:
    inputs = images.numpy()
    program = fuse(model, images, BATCH)
    references = {name: run_references(model, program, NAMES, inputs, p) for name, p in PRECISIONS.items()}
    return Subject(program, inputs, references)


@pytest.fixture(scope="module", params=["calibrated resnet20", "trained resnet20", "calibrated resnet18"])
def subject(request: pytest.FixtureRequest) -> Subject:
    weights, name = request.param.split()
    if weights == "trained":
        return make_subject(*request.getfixturevalue("trained_digits"))
    models, pictures = request.getfixturevalue("calibrated"), request.getfixturevalue("pictures")
    return make_subject(models[name], pictures[name])


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_correct_program_is_accepted(subject: Subject, precision: str) -> None:
    rung = subject.judge(ProgramRunner(subject.program, PRECISIONS[precision], NAMES), precision)
    assert rung, rung.verdict


def test_correct_onnx_file_is_accepted(subject: Subject, precision: str) -> None:
    p = PRECISIONS[precision]
    file = lower_onnx(subject.program, torch.from_numpy(subject.images), p, {})
    rung = subject.judge(OnnxRuntimeRunner(file, p), precision)
    assert rung, rung.verdict


def test_evidence_is_accepted(subject: Subject) -> None:
    outputs = [torch.from_numpy(subject.references["fp32"].oracle["output"])]
    evidence = check_evidence(subject.program.source, torch.from_numpy(subject.images), outputs)
    assert evidence, evidence.weaknesses


@pytest.mark.parametrize("defect", mutants.OPERATORS)
def test_defective_operator_is_refused(subject: Subject, precision: str, defect: str) -> None:
    if precision == "bf16" and defect == "bfloat16 arithmetic":
        pytest.skip("no defect there")
    operator = mutants.in_one_operator(*mutants.OPERATORS[defect])
    runner = ProgramRunner(subject.program, PRECISIONS[precision], NAMES, operators={FUSED: operator})
    assert not subject.judge(runner, precision)


@pytest.mark.parametrize("defect", mutants.RUNNERS)
def test_defective_runner_is_refused(subject: Subject, precision: str, defect: str) -> None:
    runner = mutants.RUNNERS[defect](subject.program, PRECISIONS[precision], NAMES)
    assert not subject.judge(runner, precision)


def test_wrong_batchnorm_epsilon_is_refused(subject: Subject, precision: str) -> None:
    program = mutants.with_wrong_epsilon(subject.program)
    runner = ProgramRunner(program, PRECISIONS[precision], NAMES)
    assert not subject.judge(runner, precision, program)


def test_bfloat16_network_called_fp16_is_refused(subject: Subject) -> None:
    runner = ProgramRunner(subject.program, PRECISIONS["bf16"], NAMES)
    assert not subject.judge(runner, "fp16")


def _without(model: onnx.ModelProto, op_type: str) -> None:
    """Take one node out: its readers read its first input."""
    node = [n for n in model.graph.node if n.op_type == op_type][1]
    model.graph.node.remove(node)
    for reader in model.graph.node:
        reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]


def _with_scaled_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith("conv2.weight"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] *= 1.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


ONNX_DEFECTS: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "one filter scaled by 1.05": _with_scaled_weight,
    "without one Relu": lambda model: _without(model, "Relu"),
    "without one Add": lambda model: _without(model, "Add"),
}


@pytest.mark.parametrize("defect", ONNX_DEFECTS)
def test_defective_onnx_file_is_refused(subject: Subject, precision: str, defect: str) -> None:
    p = PRECISIONS[precision]
    file = lower_onnx(subject.program, torch.from_numpy(subject.images), p, {})
    broken = onnx.ModelProto()
    broken.CopyFrom(file.model)
    ONNX_DEFECTS[defect](broken)
    values = {node: value for node, value in file.values.items() if _computed(broken, value)}
    assert not subject.judge(OnnxRuntimeRunner(OnnxFile(broken, file.output_names, values), p), precision)


def _computed(model: onnx.ModelProto, value: str) -> bool:
    return value == "input" or any(value in node.output for node in model.graph.node)
