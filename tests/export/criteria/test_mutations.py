"""The gate on the gate: every defect is refused, every correct pipeline accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from export import FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.evidence import check_evidence
from export.criteria.operators import check_operators
from export.criteria.references import run_oracle, run_rounded
from export.fusion.nodes import FUSED_OPERATORS
from export.fusion.passes import LEVELS
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import OnnxRuntimeRunner, ProgramRunner
from export.runtime.parity.ladder import References, execute, judge
from export.runtime.runner import Runner
from export.sample_inputs import crops, photographs
from resnet.initialise import initialise
from resnet.models import Bottleneck, CifarResNet
from tests.conftest import Made
from tests.export.criteria import mutants
from tests.export.networks import BATCH, judged

NAMES = ("output",)


@dataclass(frozen=True)
class Subject:
    """One network with, by precision, its references and the correct file."""

    model: nn.Module
    program: FusedProgram
    images: Tensor
    references: Mapping[str, References]
    files: Mapping[str, OnnxFile]

    def accepts(self, runner: Runner, precision: str, program: FusedProgram | None = None) -> None:
        references = self.references[precision]
        rung = judged(runner, self.model, program or self.program, self.images, precision, references)
        assert rung, rung.verdict

    def refuses(self, runner: Runner, precision: str, program: FusedProgram | None = None) -> bool:
        """What `judged` says, without the operators where the outputs are refused already."""
        p, references = PRECISIONS[precision], self.references[precision]
        execution = execute(runner, self.images.numpy().copy(), BATCH)
        if not judge(execution, references, p, p.network_factor):
            return True
        return not check_operators(program or self.program, p, execution.trace, runner.name == "onnx")


def make_subject(model: nn.Module, images: Tensor) -> Subject:
    program = fuse(model, images, BATCH)
    oracle = run_oracle(model, program, NAMES, images.numpy())
    return Subject(
        model,
        program,
        images,
        Made(lambda name: run_rounded(oracle, model, program, PRECISIONS[name])),
        Made(lambda name: lower_onnx(program, images, PRECISIONS[name], {})),
    )


def bottlenecks() -> nn.Module:
    """Behind a stem with max-pool."""
    model = CifarResNet(Bottleneck, (2, 2, 2), 10, 3)
    model.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
    model.add_module("relu", nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
    return model


# Each network with the operators whose defects are planted in it.
SUBJECTS = {
    "calibrated resnet8": (mutants.CONV,),
    "trained resnet8": (mutants.CONV, mutants.PROJECTION, mutants.HEAD),
    "calibrated basic": (mutants.CONV,),
    "calibrated bottlenecks": (mutants.STEM, mutants.BOTTLENECK),
}
WRITTEN = ("trained resnet8", "calibrated bottlenecks")  # as ONNX files
DEFECTS = [
    pytest.param(subject, operator, defect, id=f"{subject}-{operator._schema.name.split('::')[1]}-{defect}")
    for subject, operators in SUBJECTS.items()
    for operator in operators
    for defect in mutants.MUTANTS[operator]
]


@pytest.fixture(scope="module")
def subjects(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor], trained_digits: tuple[nn.Module, Tensor]
) -> Mapping[str, Subject]:
    def subject(name: str) -> Subject:
        if name == "trained resnet8":
            return make_subject(*trained_digits)
        if name == "calibrated bottlenecks":
            made = initialise(bottlenecks(), crops(photographs(), 16, 3, (64, 64), seed=1))
            return make_subject(made.eval(), crops(photographs(), 8, 3, (64, 64)))
        name = name.removeprefix("calibrated ")
        return make_subject(calibrated[name], pictures[name])

    return Made(subject)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, subjects: Mapping[str, Subject]) -> Subject:
    return subjects[request.param]


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def program_runner(program: FusedProgram, precision: str, **options: Any) -> ProgramRunner:
    return ProgramRunner(program, PRECISIONS[precision], NAMES, **options)


def test_correct_program_is_accepted(subject: Subject, precision: str) -> None:
    subject.accepts(program_runner(subject.program, precision), precision)


@pytest.mark.parametrize("name", WRITTEN)
def test_correct_onnx_file_is_accepted(name: str, subjects: Mapping[str, Subject], precision: str) -> None:
    file = subjects[name].files[precision]
    subjects[name].accepts(OnnxRuntimeRunner(file, PRECISIONS[precision]), precision)


def test_evidence_is_accepted(subject: Subject) -> None:
    outputs = [torch.from_numpy(subject.references["fp32"].oracle["output"])]
    evidence = check_evidence(subject.program.source, subject.images, subject.images, outputs)
    assert evidence, evidence.weaknesses


@pytest.mark.parametrize("level", LEVELS)
def test_correct_program_of_every_level_is_accepted(subjects: Mapping[str, Subject], level: str) -> None:
    subject = subjects["calibrated bottlenecks"]
    program = fuse(subject.model, subject.images, BATCH, level)
    subject.accepts(program_runner(program, "fp16"), "fp16", program)


def test_every_operator_has_defects_and_a_network_to_plant_them_in() -> None:
    assert set(mutants.MUTANTS) == set(FUSED_OPERATORS) == {op for operators in SUBJECTS.values() for op in operators}


@pytest.mark.parametrize(("subject_name", "operator", "defect"), DEFECTS)
def test_defective_operator_is_refused(
    subjects: Mapping[str, Subject], subject_name: str, operator: Any, defect: str, precision: str
) -> None:
    if precision == "bf16" and defect == "bfloat16 arithmetic":
        pytest.skip("no defect there")
    subject = subjects[subject_name]
    operators = mutants.MUTANTS[operator][defect].operators(subject.program)
    assert subject.refuses(program_runner(subject.program, precision, operators=operators), precision)


@pytest.mark.parametrize("defect", mutants.RUNNERS)
def test_defective_runner_is_refused(subject: Subject, precision: str, defect: str) -> None:
    assert subject.refuses(mutants.RUNNERS[defect](subject.program, PRECISIONS[precision], NAMES), precision)


@pytest.mark.parametrize("defect", mutants.PROGRAMS)
def test_defective_program_is_refused(subject: Subject, precision: str, defect: str) -> None:
    program = mutants.PROGRAMS[defect](subject.program)
    assert subject.refuses(program_runner(program, precision), precision, program)


def test_shortcut_taken_from_the_branch_is_refused(subjects: Mapping[str, Subject], precision: str) -> None:
    subject = subjects["calibrated bottlenecks"]
    program, references = mutants.with_shortcut_from_the_branch(subject.program), subject.references[precision]
    runner = program_runner(program, precision)
    rung = judged(runner, subject.model, program, subject.images, precision, references)
    assert rung.verdict.startswith("layer1.0.conv3: wrong wiring: ")


def test_bfloat16_network_called_fp16_is_refused(subject: Subject) -> None:
    assert subject.refuses(program_runner(subject.program, "bf16"), "fp16")


def _without(model: onnx.ModelProto, op_type: str) -> None:
    """Take one node out: its readers read its first input."""
    node = [n for n in model.graph.node if n.op_type == op_type][1]
    model.graph.node.remove(node)
    for reader in model.graph.node:
        reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]


def _with_scaled_weight(model: onnx.ModelProto) -> None:
    """In a block behind the first: the first of the bottlenecks adds so little that bfloat16 hides 5 %."""
    tensor = next(t for t in model.graph.initializer if t.name in ("layer1.1.conv2.weight", "layer2.0.conv1.weight"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] *= 1.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


ONNX_DEFECTS: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "one filter scaled by 1.05": _with_scaled_weight,
    "without one Relu": lambda model: _without(model, "Relu"),
    "without one Add": lambda model: _without(model, "Add"),
}


@pytest.mark.parametrize("defect", ONNX_DEFECTS)
@pytest.mark.parametrize("name", WRITTEN)
def test_defective_onnx_file_is_refused(
    name: str, subjects: Mapping[str, Subject], precision: str, defect: str
) -> None:
    file, broken = subjects[name].files[precision], onnx.ModelProto()
    broken.CopyFrom(file.model)
    ONNX_DEFECTS[defect](broken)
    shown = {"input"} | {value for node in broken.graph.node for value in node.output}
    values = {node: value for node, value in file.values.items() if value in shown}
    runner = OnnxRuntimeRunner(OnnxFile(broken, file.output_names, values), PRECISIONS[precision])
    assert subjects[name].refuses(runner, precision)
