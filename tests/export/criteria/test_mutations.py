"""The gate on the gate: every defect is refused, every correct pipeline accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import pytest
from torch import nn

from export import FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria.operators import check_operators
from export.fusion.nodes import FUSED_OPERATORS
from export.fusion.passes import LEVELS
from export.lowering.onnx_file import OnnxFile
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.runtime.parity.ladder import execute, judge
from export.runtime.runner import Runner
from export.sample_inputs import crops, photographs
from resnet.initialise import initialise
from resnet.models import Bottleneck, CifarResNet
from tests.conftest import Made
from tests.export.criteria import mutants
from tests.export.networks import BATCH, Fused, judged
from tests.export.onnx_edits import Edit, bypass, change, edited, setting

pytestmark = pytest.mark.usefixtures("captured_once")

NAMES = ("output",)


def refuses(subject: Fused, runner: Runner, precision: str, program: FusedProgram | None = None) -> bool:
    """What `judged` says, without the operators where the outputs are refused already."""
    p, references = PRECISIONS[precision], subject.references[precision]
    execution = execute(runner, {"input": subject.images.numpy().copy()}, BATCH)
    if not judge(execution, references, p, p.network_factor):
        return True
    return not check_operators(program or subject.program, p, execution.trace, runner.name == "onnx")


def bottlenecks() -> Fused:
    """Behind a stem with max-pool."""
    model = CifarResNet(Bottleneck, (2, 2, 2), 10, 3)
    model.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
    model.add_module("relu", nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
    calibrated = initialise(model, crops(photographs(), 16, 3, (64, 64), seed=1)).eval()
    return Fused(calibrated, crops(photographs(), 8, 3, (64, 64)))


# Each network with the operators whose defects are planted in it.
SUBJECTS = {
    "resnet8": (mutants.CONV,),
    "digits": (mutants.CONV, mutants.PROJECTION, mutants.HEAD),
    "basic": (mutants.CONV,),
    "bottlenecks": (mutants.STEM, mutants.BOTTLENECK),
}
WRITTEN = ("digits", "bottlenecks")  # as ONNX files
DEFECTS = [
    pytest.param(subject, operator, defect, id=f"{subject}-{operator._opname}-{defect}")
    for subject, operators in SUBJECTS.items()
    for operator in operators
    for defect in mutants.MUTANTS[operator]
]


@pytest.fixture(scope="module")
def subjects(fused: Mapping[str, Fused]) -> Mapping[str, Fused]:
    return Made(lambda name: bottlenecks() if name == "bottlenecks" else fused[name])


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, subjects: Mapping[str, Fused]) -> Fused:
    return subjects[request.param]


def program_runner(program: FusedProgram, precision: str, **options: Any) -> ProgramRunner:
    return ProgramRunner(program, PRECISIONS[precision], NAMES, **options)


def test_correct_program_is_accepted(subject: Fused, precision: str) -> None:
    rung = judged(program_runner(subject.program, precision), subject, subject.program, precision)
    assert rung, rung.verdict


@pytest.mark.parametrize("name", WRITTEN)
def test_correct_onnx_file_is_accepted(name: str, subjects: Mapping[str, Fused], precision: str) -> None:
    runner = TracedOnnxRunner(subjects[name].files[precision], PRECISIONS[precision])
    rung = judged(runner, subjects[name], subjects[name].program, precision)
    assert rung, rung.verdict


@pytest.mark.parametrize("level", LEVELS)
def test_correct_program_of_every_level_is_accepted(subjects: Mapping[str, Fused], level: str) -> None:
    subject = subjects["bottlenecks"]
    program = fuse(subject.model, subject.images, BATCH, level)
    rung = judged(program_runner(program, "fp16"), subject, program, "fp16")
    assert rung, rung.verdict


def test_every_operator_has_defects_and_a_network_to_plant_them_in() -> None:
    assert set(mutants.MUTANTS) == set(FUSED_OPERATORS) == {op for operators in SUBJECTS.values() for op in operators}


@pytest.mark.mutant
@pytest.mark.parametrize(("name", "operator", "defect"), DEFECTS)
def test_defective_operator_is_refused(
    subjects: Mapping[str, Fused], name: str, operator: Any, defect: str, precision: str
) -> None:
    if precision == "bf16" and defect == "bfloat16 arithmetic":
        pytest.skip("no defect there")
    operators = mutants.MUTANTS[operator][defect].operators(subjects[name].program)
    assert refuses(subjects[name], program_runner(subjects[name].program, precision, operators=operators), precision)


@pytest.mark.mutant
@pytest.mark.parametrize("defect", mutants.RUNNERS)
def test_defective_runner_is_refused(subject: Fused, precision: str, defect: str) -> None:
    assert refuses(subject, mutants.RUNNERS[defect](subject.program, PRECISIONS[precision], NAMES), precision)


@pytest.mark.mutant
@pytest.mark.parametrize("defect", mutants.PROGRAMS)
def test_defective_program_is_refused(subject: Fused, precision: str, defect: str) -> None:
    program = mutants.PROGRAMS[defect](subject.program)
    assert refuses(subject, program_runner(program, precision), precision, program)


@pytest.mark.mutant
def test_shortcut_taken_from_the_branch_is_refused(subjects: Mapping[str, Fused], precision: str) -> None:
    subject = subjects["bottlenecks"]
    program = mutants.with_shortcut_from_the_branch(subject.program)
    rung = judged(program_runner(program, precision), subject, program, precision)
    assert rung.verdict.startswith("layer1.0.conv3: wrong wiring: ")


@pytest.mark.mutant
def test_bfloat16_network_called_fp16_is_refused(subject: Fused) -> None:
    assert refuses(subject, program_runner(subject.program, "bf16"), "fp16")


def _without(model: onnx.ModelProto, op_type: str) -> None:
    node = [n for n in model.graph.node if n.op_type == op_type][1]
    bypass(model, node, node.input[0])


def _with_scaled_weight(model: onnx.ModelProto) -> None:
    """In a block behind the first: the first of the bottlenecks adds so little that bfloat16 hides 5 %."""
    layers = {"layer1.1.conv2.weight", "layer2.0.conv1.weight"}
    name = next(t.name for t in model.graph.initializer if t.name in layers)
    change(model, name, setting(3, lambda weights: weights[3] * 1.05))


ONNX_DEFECTS: dict[str, Edit] = {
    "one filter scaled by 1.05": _with_scaled_weight,
    "without one Relu": lambda model: _without(model, "Relu"),
    "without one Add": lambda model: _without(model, "Add"),
}


@pytest.mark.mutant
@pytest.mark.parametrize("defect", ONNX_DEFECTS)
@pytest.mark.parametrize("name", WRITTEN)
def test_defective_onnx_file_is_refused(name: str, subjects: Mapping[str, Fused], precision: str, defect: str) -> None:
    file = subjects[name].files[precision]
    broken = edited(file.model, ONNX_DEFECTS[defect])
    shown = {"input"} | {value for node in broken.graph.node for value in node.output}
    values = {node: value for node, value in file.values.items() if value in shown}
    runner = TracedOnnxRunner(OnnxFile(broken, file.output_names, values), PRECISIONS[precision])
    assert refuses(subjects[name], runner, precision)
