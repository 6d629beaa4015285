"""The launcher's own arguments: what it writes into, and which configurations it takes."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels.config import TARGETS, ConvConfig, ConvProblem, Target, select_config
from kernels.implicit_gemm import _conv2d_bias_act_kernel
from kernels.launch import (
    conv2d_bias_act_triton,
    kernel_arguments,
    launch_conv2d_bias_act,
    launch_grid,
    target_of,
)
from tests.kernels.conv_cases import ODD_CASES
from tests.kernels.oracle import Inputs, conv_arguments, make_inputs, p1_failures

SMALL = ODD_CASES["small"]
CONFIG = ConvConfig(128, 64, 32, 4, 2)


def output(problem: ConvProblem, device: torch.device) -> Tensor:
    shape = (problem.batch, problem.c_out, problem.out_height, problem.out_width)
    return torch.zeros(shape, dtype=problem.dtype, device=device).contiguous(memory_format=torch.channels_last)


def launch(inputs: Inputs, out: Tensor, problem: ConvProblem = SMALL, config: ConvConfig | None = CONFIG) -> None:
    launch_conv2d_bias_act(
        inputs.x, inputs.weight, inputs.bias, inputs.residual, out, **conv_arguments(problem), config=config
    )


def test_allocating_form_gives_the_convolution(device: torch.device) -> None:
    inputs = make_inputs(SMALL, device)
    y = conv2d_bias_act_triton(inputs.x, inputs.weight, inputs.bias, inputs.residual, **conv_arguments(SMALL))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert p1_failures(y, SMALL, inputs) == []


def test_batch_0_launches_nothing(device: torch.device) -> None:
    problem = replace(SMALL, batch=0)
    launch(make_inputs(problem, device), output(problem, device), problem)


@pytest.mark.parametrize("broken", ["shape", "dtype", "layout", "device"])
def test_a_wrong_output_tensor_is_refused(broken: str, device: torch.device) -> None:
    out = output(SMALL, device)
    out = {
        "shape": out[:1],
        "dtype": out.double(),
        "layout": out.contiguous(memory_format=torch.contiguous_format),
        "device": out.to("meta"),
    }[broken]
    with pytest.raises(ValueError, match=r"out is .* expected \(2, 40, 6, 7\), torch.float16"):
        launch(make_inputs(SMALL, device), out)


def test_float64_is_refused(device: torch.device) -> None:
    problem = replace(SMALL, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x is torch.float64, expected one of"):
        launch(make_inputs(problem, device), output(problem, device), problem)


def test_an_invalid_config_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="block_k is 8, expected a power of two of at least 16"):
        launch(make_inputs(SMALL, device), output(SMALL, device), config=replace(CONFIG, block_k=8))


def test_the_arguments_are_the_parameters_of_the_kernel() -> None:
    names = [name for name in _conv2d_bias_act_kernel.arg_names if not name.endswith("_ptr")]
    assert list(kernel_arguments(SMALL, CONFIG)) == names


def test_the_grid_covers_the_output() -> None:
    problem = replace(SMALL, batch=5, c_out=100, groups=2)
    assert launch_grid(problem, ConvConfig(32, 16, 32, 4, 2)) == (-(-5 * 6 * 7 // 32) * 4, 2)


def describe_device(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    properties = SimpleNamespace(
        name="a GPU", major=major, minor=minor, shared_memory_per_block_optin=101_376, multi_processor_count=48
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target_of.cache_clear()


def test_the_target_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    describe_device(monkeypatch, 9, 0)
    assert target_of(torch.device("cuda")) is TARGETS["sm_90"]
    describe_device(monkeypatch, 12, 1)
    unlisted = target_of(torch.device("cuda"))
    assert unlisted == Target("sm_121", 121, 101_376, 48)
    select_config(SMALL, unlisted)
    describe_device(monkeypatch, 7, 5)
    with pytest.raises(ValueError, match="a GPU is sm_75, expected sm_80 or newer"):
        target_of(torch.device("cuda"))
    target_of.cache_clear()


ON_CPU_WITHOUT_INTERPRETER = """
import torch
from kernels.launch import conv2d_bias_act_triton
layout = torch.channels_last
x = torch.randn(1, 4, 5, 5).contiguous(memory_format=layout)
weight = torch.randn(4, 4, 1, 1).contiguous(memory_format=layout)
plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "relu": False}
try:
    conv2d_bias_act_triton(x, weight, torch.zeros(4), None, **plain)
except ValueError as error:
    print(error)
"""


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-c", ON_CPU_WITHOUT_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "x is on cpu, expected a CUDA device" in done.stdout
