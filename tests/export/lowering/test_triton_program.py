"""Whole networks through the Triton kernels: in the interpreter on a CPU, by the operators themselves on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from export import Batch, fuse
from export.base.precision import PRECISIONS
from export.fusion.nodes import FUSED_OPERATORS
from export.lowering.runners import ProgramRunner
from kernels import launch
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem
from kernels.operators.registry import OPERATORS
from kernels.problems import ConvProblem, Problem
from tests.export.networks import Fused, judged

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


def check(network: Fused, precision: str, device: str, operators: dict[Callable[..., Any], Any]) -> None:
    program = fuse(network.model, network.images, BATCH)
    assert not program.coverage.left
    runner = ProgramRunner(program, PRECISIONS[precision], ("output",), device, operators)
    rung = judged(runner, network, program, precision)
    assert rung.name == "triton" and rung, rung.verdict
    assert rung.operators is not None and not rung.operators.unchecked
    assert len(rung.operators.checks) == len(program.coverage.fused)
    assert all(check.decision != "differs" for check in rung.outputs.values())


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@interpreted
@pytest.mark.parametrize(("name", "precision"), [*(("resnet8", p) for p in PRECISIONS), ("bottleneck", "fp16")])
def test_through_the_interpreter(name: str, precision: str, fused: Mapping[str, Fused]) -> None:
    images = fused[name].images[:2]
    images = images[:, :, :16, :16].contiguous() if name == "resnet8" else images
    check(Fused(fused[name].model, images), precision, "cpu", LAUNCHERS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["basic", "resnet50"])
def test_network_on_a_gpu(name: str, precision: str, fused: Mapping[str, Fused]) -> None:
    check(fused[name], precision, "cuda", {})
