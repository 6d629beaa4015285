"""Networks in 8 bits for the tests: both schemes, and questions about their graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export import Batch, FusedProgram, fuse
from export.base.precision import INT8, PRECISIONS
from export.criteria.quantised import check_quantised, shown_values
from export.criteria.references import run_oracle, run_simulations
from export.fusion.nodes import QUANTISATION, is_call, module_path
from export.fusion.passes import QUANTISED_LEVEL
from export.fusion.program import QuantisedProgram, output_names
from export.lowering.onnx_file import OnnxFile, lower_onnx
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.quantisation.calibration import Calibration, InMemory, calibrate
from export.quantisation.quantise import LAYERS, quantised_programs
from export.quantisation.scheme import CPU, TENSORRT, Scheme
from export.quantisation.split_addition import split_addition
from export.runtime.onnx_session import runs_rounded
from export.runtime.parity.checks import OperatorChecks
from export.runtime.parity.ladder import References, execute, judge
from export.runtime.parity.rungs import Rung
from tests.captured import captured_once
from tests.export.networks import BATCH

SCHEMES = {scheme.name: scheme for scheme in (TENSORRT, CPU)}
QUANTIZE, DEQUANTIZE = QUANTISATION


@dataclass(frozen=True)
class Subject:
    """A network, fused and quantised both ways for the inputs it was calibrated on."""

    model: nn.Module
    images: Tensor
    program: FusedProgram
    calibration: Calibration
    quantised: dict[Scheme, QuantisedProgram]
    files: dict[Scheme, OnnxFile] = field(default_factory=dict)

    def keeping(self, *kept: str) -> Subject:
        """The same with some layers left in floating point."""
        return replace(self, quantised=quantised_programs(self.program, self.calibration.ranges, kept), files={})

    def file(self, scheme: Scheme) -> OnnxFile:
        """Written once: tests copy what they change."""
        if scheme not in self.files:
            self.files[scheme] = lower_onnx(self.quantised[scheme], scheme.arithmetic, {})
        return self.files[scheme]

    def shown(self, scheme: Scheme) -> OnnxFile:
        """As the export writes it: it shows only the values that P4 looks at."""
        file = self.file(scheme)
        return replace(file, values=shown_values(self.quantised[scheme], file))

    def runner(self, scheme: Scheme, file: OnnxFile) -> TracedOnnxRunner:
        return TracedOnnxRunner(file, scheme.arithmetic, scheme.file, runs_rounded(INT8.name, scheme.file))

    @cached_property
    def simulations(self) -> References:
        """What rounding to 8 bits alone makes of the network, by either scheme."""
        single, names = PRECISIONS["fp32"], output_names(self.program.graph_module)
        oracle = run_oracle(self.model, self.program, names, {"input": self.images.numpy()})
        return run_simulations(oracle, {scheme.name: (program, single) for scheme, program in self.quantised.items()})

    def judge(self, scheme: Scheme) -> Rung:
        """What the export says of the file in ONNX Runtime: each value to its LSB, the outputs to the simulations."""
        execution = execute(self.runner(scheme, self.shown(scheme)), {"input": self.images.numpy()}, BATCH)
        operators = self.check(scheme, execution.trace)
        return judge(execution, self.simulations, INT8, INT8.network_factor, operators)

    def trace(self, scheme: Scheme, file: OnnxFile) -> dict[str, Tensor]:
        """What ONNX Runtime computes of that file, for four of the images."""
        with self.runner(scheme, file) as runner:
            return runner.trace({"input": self.images[:4].numpy()})

    def simulated(self, program: FusedProgram) -> dict[str, Tensor]:
        """What PyTorch computes of a program, in float32."""
        with ProgramRunner(program, PRECISIONS["fp32"], ("output",)) as runner:
            return runner.trace({"input": self.images[:4].numpy()})

    def check(
        self, scheme: Scheme, trace: Mapping[str, Tensor], program: QuantisedProgram | None = None
    ) -> OperatorChecks:
        """P4, as the export asks for it."""
        return check_quantised(program or self.quantised[scheme], self.calibration.ranges, scheme, trace)


def quantised(model: nn.Module, images: Tensor, batch: Batch = BATCH) -> Subject:
    """`model` in both schemes, with the ranges of its values on `images`."""
    with captured_once():
        program = fuse(model, images, batch, QUANTISED_LEVEL)
    calibration = calibrate(split_addition(program.master), InMemory(images.numpy()), "minmax")
    return Subject(model, images, program, calibration, quantised_programs(program, calibration.ranges, ()))


def name_of(network: object) -> str:
    """For ids: names stand for themselves."""
    return getattr(network, "__name__", str(network))


def relative_error(got: object, expected: object) -> float:
    """The largest of the outputs' relative errors, L2."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)
    return max(((y - reference).norm() / reference.norm()).item() for y, reference in pairs)


def nodes(program: FusedProgram, *targets: Any) -> list[fx.Node]:
    return [node for node in program.master.graph.nodes if is_call(node, *targets)]


def layers(program: FusedProgram) -> dict[str, fx.Node]:
    return {module_path(node): node for node in nodes(program, *LAYERS)}
