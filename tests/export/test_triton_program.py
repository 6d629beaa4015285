"""A whole network through the Triton kernel: in the interpreter on a CPU, by the operator itself on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export import Batch, fuse
from export.parity.ladder import execute, judge, run_references
from export.parity.operators import check_operators
from export.passes.fuse_epilogue import FUSED
from export.precision import PRECISIONS
from export.runners import ProgramRunner

NAMES = ("output",)
BATCH = Batch(1, 2, 4)


def triton_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *geometry_and_relu: Any
) -> Tensor:
    from kernels.launch import conv2d_bias_act_triton

    stride, padding, dilation, groups, relu = geometry_and_relu
    return conv2d_bias_act_triton(
        x, weight, bias, residual, stride=stride, padding=padding, dilation=dilation, groups=groups, relu=relu
    )


def check(
    model: nn.Module, images: Tensor, precision: str, device: str, operators: dict[Callable[..., Any], Any]
) -> None:
    p, program = PRECISIONS[precision], fuse(model, images, BATCH)
    execution = execute(ProgramRunner(program, p, NAMES, device, operators), images.numpy(), BATCH)
    references = run_references(model, program, NAMES, images.numpy(), p)
    rung = judge(execution, references, p, p.network_factor, check_operators(program, p, execution.trace))
    assert rung.name == "triton" and rung, rung.verdict


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resnet20_through_the_interpreter(
    precision: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    images = pictures["resnet20"][:2, :, :16, :16].contiguous()
    check(calibrated["resnet20"], images, precision, "cpu", {FUSED: triton_convolution})


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_network_on_a_gpu(
    name: str, precision: str, calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    check(calibrated[name], pictures[name], precision, "cuda", {})
