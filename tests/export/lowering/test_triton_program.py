"""Whole networks through the Triton kernels: in the interpreter on a CPU, by the operators themselves on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export import Batch, fuse
from export.base.precision import PRECISIONS
from export.criteria.operators import check_operators
from export.criteria.references import run_references
from export.fusion.nodes import FUSED_OPERATORS
from export.lowering.runners import ProgramRunner
from export.runtime.parity.ladder import execute, judge
from export.sample_inputs import crops, photographs
from kernels import launch
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem
from kernels.operators.registry import OPERATORS
from kernels.problems import ConvProblem, Problem
from resnet.initialise import initialise
from resnet.models import Bottleneck, ResNet

NAMES = ("output",)
BATCH = Batch(1, 2, 4)


def launcher(name: str) -> Callable[..., Tensor]:
    """An operator by its Triton launcher whatever the device, in few large tiles: the interpreter pays per tile."""

    def call(*arguments: Any) -> Tensor:
        config = large_tiles(OPERATORS[name].of(*arguments).problem())
        return launch.run(name, *arguments, config=config)

    return call


def large_tiles(problem: Problem) -> Config | None:
    if isinstance(problem, ConvProblem):
        block_k = 256 if problem.c_in_per_group >= 256 else 64
        return ConvConfig(side(problem.gemm_m, 256), side(problem.gemm_n, 512), block_k, 4, 2)
    if isinstance(problem, BottleneckProblem):
        block_k = 256 if problem.first.c_in >= 256 else 64
        return BottleneckConfig(side(problem.first.gemm_m, 256), side(problem.c_out, 512), block_k, 4, 2)
    return None


def side(size: int, most: int) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))


LAUNCHERS: dict[Callable[..., Any], Any] = {op: launcher(op._opname) for op in FUSED_OPERATORS}


@pytest.fixture(scope="module")
def bottlenecks() -> nn.Module:
    """The ResNet-50 family with two blocks per stage, calibrated."""
    model = ResNet(Bottleneck, (2, 2, 2, 2), num_classes=10, in_channels=3)
    initialise(model, crops(photographs(), 16, 3, (64, 64), seed=1))
    return model.eval()


def check(
    model: nn.Module, images: Tensor, precision: str, device: str, operators: dict[Callable[..., Any], Any]
) -> None:
    p, program = PRECISIONS[precision], fuse(model, images, BATCH)
    assert not program.coverage.left
    execution = execute(ProgramRunner(program, p, NAMES, device, operators), images.numpy(), BATCH)
    references = run_references(model, program, NAMES, images.numpy(), p)
    operator_checks = check_operators(program, p, execution.trace)
    assert len(operator_checks.checks) == len(program.coverage.fused) and not operator_checks.unchecked
    rung = judge(execution, references, p, p.network_factor, operator_checks)
    assert rung.name == "triton" and rung, rung.verdict
    assert all(check.decision != "differs" for check in rung.outputs.values())


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@interpreted
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resnet20_through_the_interpreter(
    precision: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    images = pictures["resnet20"][:2, :, :16, :16].contiguous()
    check(calibrated["resnet20"], images, precision, "cpu", LAUNCHERS)


@interpreted
def test_resnet18_through_the_interpreter(calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    check(calibrated["resnet18"], pictures["resnet18"][:2], "fp16", "cpu", LAUNCHERS)


@interpreted
def test_bottlenecks_through_the_interpreter(bottlenecks: nn.Module, pictures: dict[str, Tensor]) -> None:
    check(bottlenecks, pictures["resnet50"][:2], "fp16", "cpu", LAUNCHERS)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_network_on_a_gpu(
    name: str, precision: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    check(calibrated[name], pictures[name], precision, "cuda", {})
