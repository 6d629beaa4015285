"""The gate on the gate: every defect is refused, every correct pipeline accepted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.base.precision import PRECISIONS
from export.criteria.evidence import check_evidence
from export.criteria.operators import check_operators
from export.criteria.references import run_references
from export.fusion.capture import Batch
from export.fusion.nodes import FUSED_OPERATORS
from export.fusion.passes import LEVELS
from export.fusion.program import FusedProgram, fuse
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import OnnxRuntimeRunner, ProgramRunner, Runner
from export.runtime.parity.ladder import References, execute, judge
from export.runtime.parity.rungs import Rung
from export.sample_inputs import crops, photographs
from resnet.initialise import initialise
from resnet.models import Bottleneck, CifarResNet
from tests.export.criteria import mutants

NAMES = ("output",)
BATCH = Batch(1, 4, 8)


@dataclass(frozen=True)
class Subject:
    """One network with its references in every precision."""

    model: nn.Module
    program: FusedProgram
    images: NDArray[np.float32]
    references: Mapping[str, References]
    files: dict[str, OnnxFile] = field(default_factory=dict)

    def onnx_file(self, precision: str) -> OnnxFile:
        """The correct file, written once."""
        if precision not in self.files:
            example = torch.from_numpy(self.images)
            self.files[precision] = lower_onnx(self.program, example, PRECISIONS[precision], {})
        return self.files[precision]

    def judge(self, runner: Runner, precision: str, program: FusedProgram | None = None) -> Rung:
        p = PRECISIONS[precision]
        execution = execute(runner, self.images.copy(), BATCH)
        operators = check_operators(program or self.program, p, execution.trace, runner.name == "onnx")
        return judge(execution, self.references[precision], p, p.network_factor, operators)


def make_subject(model: nn.Module, images: Tensor) -> Subject:
    inputs = images.numpy()
    program = fuse(model, images, BATCH)
    references = {name: run_references(model, program, NAMES, inputs, p) for name, p in PRECISIONS.items()}
    return Subject(model, program, inputs, references)


@pytest.fixture(scope="module")
def bottlenecks() -> tuple[nn.Module, Tensor]:
    """A small network of bottlenecks behind a stem with max-pool, calibrated, and eight pictures."""
    model = CifarResNet(Bottleneck, (2, 2, 2), 10, 3)
    model.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
    model.relu = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    initialise(model, crops(photographs(), 16, 3, (64, 64), seed=1))
    return model.eval(), crops(photographs(), 8, 3, (64, 64))


# Each network with the operators whose defects are planted in it.
SUBJECTS = {
    "calibrated resnet20": (mutants.CONV,),
    "trained resnet20": (mutants.CONV, mutants.PROJECTION, mutants.HEAD),
    "calibrated resnet18": (mutants.CONV,),
    "calibrated bottlenecks": (mutants.STEM, mutants.BOTTLENECK),
}
DEFECTS = [
    pytest.param(subject, operator, defect, id=f"{subject}-{operator._schema.name.split('::')[1]}-{defect}")
    for subject, operators in SUBJECTS.items()
    for operator in operators
    for defect in mutants.MUTANTS[operator]
]


@pytest.fixture(scope="module")
def subjects(
    calibrated: dict[str, nn.Module],
    pictures: dict[str, Tensor],
    trained_digits: tuple[nn.Module, Tensor],
    bottlenecks: tuple[nn.Module, Tensor],
) -> Callable[[str], Subject]:
    networks = {
        "calibrated resnet20": (calibrated["resnet20"], pictures["resnet20"]),
        "trained resnet20": trained_digits,
        "calibrated resnet18": (calibrated["resnet18"], pictures["resnet18"]),
        "calibrated bottlenecks": bottlenecks,
    }
    return functools.cache(lambda name: make_subject(*networks[name]))


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_correct_program_is_accepted(subject: Subject, precision: str) -> None:
    rung = subject.judge(ProgramRunner(subject.program, PRECISIONS[precision], NAMES), precision)
    assert rung, rung.verdict


def test_correct_onnx_file_is_accepted(subject: Subject, precision: str) -> None:
    rung = subject.judge(OnnxRuntimeRunner(subject.onnx_file(precision), PRECISIONS[precision]), precision)
    assert rung, rung.verdict


def test_evidence_is_accepted(subject: Subject) -> None:
    outputs = [torch.from_numpy(subject.references["fp32"].oracle["output"])]
    images = torch.from_numpy(subject.images)
    evidence = check_evidence(subject.program.source, images, images, outputs)
    assert evidence, evidence.weaknesses


@pytest.mark.parametrize("level", LEVELS)
def test_correct_program_of_every_level_is_accepted(subjects: Callable[[str], Subject], level: str) -> None:
    subject = subjects("calibrated bottlenecks")
    program = fuse(subject.model, torch.from_numpy(subject.images), BATCH, level)
    rung = subject.judge(ProgramRunner(program, PRECISIONS["fp16"], NAMES), "fp16", program)
    assert rung, rung.verdict


def test_every_operator_has_defects_and_a_network_to_plant_them_in() -> None:
    assert set(mutants.MUTANTS) == set(FUSED_OPERATORS) == {op for operators in SUBJECTS.values() for op in operators}


@pytest.mark.parametrize(("subject_name", "operator", "defect"), DEFECTS)
def test_defective_operator_is_refused(
    subjects: Callable[[str], Subject], subject_name: str, operator: Any, defect: str, precision: str
) -> None:
    if precision == "bf16" and defect == "bfloat16 arithmetic":
        pytest.skip("no defect there")
    subject = subjects(subject_name)
    operators = mutants.MUTANTS[operator][defect].operators(subject.program)
    runner = ProgramRunner(subject.program, PRECISIONS[precision], NAMES, operators=operators)
    assert not subject.judge(runner, precision)


@pytest.mark.parametrize("defect", mutants.RUNNERS)
def test_defective_runner_is_refused(subject: Subject, precision: str, defect: str) -> None:
    runner = mutants.RUNNERS[defect](subject.program, PRECISIONS[precision], NAMES)
    assert not subject.judge(runner, precision)


@pytest.mark.parametrize("defect", mutants.PROGRAMS)
def test_defective_program_is_refused(subject: Subject, precision: str, defect: str) -> None:
    program = mutants.PROGRAMS[defect](subject.program)
    runner = ProgramRunner(program, PRECISIONS[precision], NAMES)
    assert not subject.judge(runner, precision, program)


def test_shortcut_taken_from_the_branch_is_refused(subjects: Callable[[str], Subject], precision: str) -> None:
    subject = subjects("calibrated bottlenecks")
    program = mutants.with_shortcut_from_the_branch(subject.program)
    rung = subject.judge(ProgramRunner(program, PRECISIONS[precision], NAMES), precision, program)
    assert rung.verdict.startswith("layer1.0.conv3: wrong wiring: ")


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
    """In the second block: the first of the bottlenecks adds so little to its shortcut that bfloat16 hides 5 %."""
    tensor = next(t for t in model.graph.initializer if t.name == "layer1.1.conv2.weight")
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
    p, file = PRECISIONS[precision], subject.onnx_file(precision)
    broken = onnx.ModelProto()
    broken.CopyFrom(file.model)
    ONNX_DEFECTS[defect](broken)
    values = {node: value for node, value in file.values.items() if _computed(broken, value)}
    assert not subject.judge(OnnxRuntimeRunner(OnnxFile(broken, file.output_names, values), p), precision)


def _computed(model: onnx.ModelProto, value: str) -> bool:
    return value == "input" or any(value in node.output for node in model.graph.node)
