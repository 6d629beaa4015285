"""Sums are accumulated in float32 and rounded to nearest: what rounds or truncates on the way is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.criteria import operators as operators_module
from export.criteria.operators import check_operators
from export.lowering.onnx_file import lower_onnx
from export.lowering.runners import ProgramRunner, TracedOnnxRunner
from export.runtime.parity.checks import OperatorChecks
from export.runtime.runner import Runner
from tests.export.criteria.mutants import CONV
from tests.export.networks import BATCH, Called

CHANNELS = 512  # 4608 products in a sum, as in the last stage of ResNet-18 and 50
NAMES = ("output",)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)).relu()


@pytest.fixture(scope="module")
def program(images: Tensor) -> FusedProgram:
    torch.manual_seed(0)
    return fuse(nn.Sequential(nn.Conv2d(CHANNELS, 64, 3, 2, 1), nn.ReLU()).eval(), images, BATCH)


def checks_of(program: FusedProgram, runner: Runner, images: Tensor, precision: str) -> OperatorChecks:
    with runner:
        trace = runner.trace({"input": images.numpy()})
    return check_operators(program, PRECISIONS[precision], trace, runner.name == "onnx")


def truncated(total: Tensor) -> Tensor:
    """float64 towards zero, to float32."""
    single = total.float()
    return torch.where(single.abs().double() > total.abs(), torch.nextafter(single, torch.zeros(())), single).double()


def summed(add: Callable[[Tensor, Tensor], Tensor], step: int, *arguments: Any) -> Tensor:
    """The convolution, its sum taken `step` products at a time."""
    x, weight, bias, _, stride, padding = arguments[:6]
    columns = F.unfold(x.double(), weight.shape[2:], padding=padding, stride=stride)
    rows = weight.double().contiguous().flatten(1)
    total = torch.zeros(len(x), len(rows), columns.shape[2], dtype=torch.float64)
    for start in range(0, rows.shape[1], step):
        total = add(total, rows[:, start : start + step] @ columns[:, start : start + step])
    y = (total.float() + bias.float()[:, None]).relu().to(x.dtype).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))
    return y.contiguous(memory_format=torch.channels_last)


def exactly(total: Tensor, part: Tensor) -> Tensor:
    return total + part


def truncating(total: Tensor, part: Tensor) -> Tensor:
    return truncated(total + part)


def in_tiles(dtype: torch.dtype, total: Tensor, part: Tensor) -> Tensor:
    return total + part.to(dtype).double()


def test_right_sums_are_accepted(program: FusedProgram, images: Tensor, precision: str) -> None:
    """Also those of tensor cores, which truncate after every 8 products or more."""
    p = PRECISIONS[precision]
    runners = [ProgramRunner(program, p, NAMES), TracedOnnxRunner(lower_onnx(program, p, {}), p)]
    runners += [ProgramRunner(program, p, NAMES, operators={CONV: partial(summed, exactly, 64)})]
    if precision != "fp32":
        runners += [ProgramRunner(program, p, NAMES, operators={CONV: partial(summed, truncating, 8)})]
    for runner in runners:
        (check,) = checks_of(program, runner, images, precision).checks
        assert check, check.reason


@pytest.mark.mutant
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_sum_truncated_after_every_product_is_refused(precision: str) -> None:
    """In float16 no value shows it, but all are drawn towards zero; the rounding of bfloat16 hides it."""
    torch.manual_seed(0)
    images = torch.randn(4, CHANNELS, 8, 8).relu()
    program = fuse(nn.Sequential(nn.Conv2d(CHANNELS, 512, 3, 2, 1), nn.ReLU()).eval(), images, BATCH)
    for step, right in ((1, False), (8, True)):
        operators: dict[Any, Callable[..., Tensor]] = {CONV: partial(summed, truncating, step)}
        runner = ProgramRunner(program, PRECISIONS[precision], NAMES, operators=operators)
        (check,) = checks_of(program, runner, images, precision).checks
        assert operators_module._RESULTS >= 4 * 4 * 512 * 4 * 4  # a sample of large images has four times as many
        if precision == "fp16":
            assert bool(check) is right and ("mean error away from zero is -" in check.reason) is not right, check
        elif not right:
            assert check.reason.startswith("rms error is "), check


@pytest.mark.mutant
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("step", [32, 256])
def test_tiles_summed_in_16_bits_are_refused(program: FusedProgram, images: Tensor, precision: str, step: int) -> None:
    p = PRECISIONS[precision]
    tiles = partial(summed, partial(in_tiles, p.dtype), step)
    (check,) = checks_of(program, ProgramRunner(program, p, NAMES, operators={CONV: tiles}), images, precision).checks
    assert not check


def head() -> nn.Module:
    """A mean and a layer whose classes differ little: what rounding the mean costs one of them, it costs all."""
    linear = nn.Linear(64, 1000)
    linear.weight.data = torch.rand(64) + 0.05 * torch.randn(1000, 64)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def widening() -> nn.Module:
    """A 3x3 of few channels, widened to many: each of its values is rounded, and read by all of those."""
    wide = nn.Conv2d(4, 512, 1)
    wide.weight.data = torch.rand(4, 1, 1) + 0.05 * torch.randn(512, 4, 1, 1)
    return nn.Sequential(nn.Conv2d(64, 4, 3, bias=False), nn.ReLU(), wide)


def faint() -> nn.Module:
    """A block that adds little but a constant to its shortcut: all values of a channel are rounded alike."""
    branch = nn.Conv2d(64, 64, 1)
    branch.weight.data /= 4000
    return Called(lambda x, m: F.relu(x + m.branch(x)), branch=branch)


@pytest.mark.parametrize("network", [head, widening, faint])
def test_a_rounding_that_results_share_is_one_draw(network: Callable[[], nn.Module]) -> None:
    p = PRECISIONS["fp16"]
    for seed in range(4):
        torch.manual_seed(seed)
        images = 2 + 2 * torch.rand(2, 64, 8, 8)  # of one power of two
        program = fuse(network().eval(), images, BATCH)
        assert len(program.coverage.fused) == 1
        (check,) = checks_of(program, ProgramRunner(program, p, NAMES), images, "fp16").checks
        assert check, check.reason
