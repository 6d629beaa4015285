"""Every activation behind every way to launch a convolution, and what the operator refuses of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.operators.activations import ACTIVATIONS
from kernels.operators.conv2d_bias_act import conv2d_bias_act
from kernels.oracle import make_inputs, oracle, p1_failures
from kernels.problems import ConvProblem
from tests.kernels.cases import ODD_CASES, PROJECTION_CASES
from tests.kernels.launching import check, on_device, quick_config

PLAIN = replace(ODD_CASES["small"], relu=False)
WAYS: dict[str, tuple[ConvProblem, Config | None]] = {
    "quick": (PLAIN, None),
    "groups": (replace(PLAIN, groups=2, has_residual=False), ConvConfig(64, 32, 32, 4, 2)),
    "split": (replace(PLAIN, has_residual=False), ConvConfig(64, 64, 16, 4, 2, split_k=5)),
    "boxes": (replace(PLAIN, c_out=70), ConvConfig(32, 32, 16, 4, 2, box=(1, 4, 8))),
    "projection": (replace(PROJECTION_CASES["even-image"], relu=False), None),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_the_kernels_equal_the_oracle(way: str, activation: str, device: torch.device) -> None:
    problem, config = WAYS[way]
    dtypes = [torch.float16] if way != "quick" else [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        own = replace(problem, activation=activation, negative_slope=0.3, dtype=dtype)
        check(own, device, config or on_device(quick_config(own), device))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"activation": "swish"}, "activation is 'swish', expected '' or one of relu6, "),
    "beside relu": ({"activation": "silu", "relu": True}, "'silu' beside relu, expected one of the two"),
    "no slope": ({"activation": "prelu"}, "slope is None and activation 'prelu', expected"),
    "a slope for another": ({"slope": torch.ones(40)}, "slope is given and activation '', expected"),
    "a slope too short": ({"activation": "prelu", "slope": torch.ones(1)}, "slope has 1 elements, expected 40"),
    "a slope that is no number": (
        {"activation": "leaky_relu", "negative_slope": float("nan")},
        "negative_slope is nan",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    inputs: Any = make_inputs(replace(PLAIN, dtype=torch.float32, has_residual=False))
    given, said = WRONG[name]
    with pytest.raises(ValueError, match="expected") as refusal:
        conv2d_bias_act(inputs.x, inputs.weight, inputs.bias, padding=(1, 1), **given)
    assert said in str(refusal.value)


# What is easily taken for what; `leaky_relu` stands for itself with another slope.
TAKEN_FOR = {
    "relu6": "", "leaky_relu": "leaky_relu", "prelu": "leaky_relu", "sigmoid": "hardsigmoid", "silu": "hardswish",
    "hardsigmoid": "sigmoid", "hardswish": "silu", "gelu": "gelu_tanh", "gelu_tanh": "gelu",
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_oracle_tells_one_from_another(activation: str) -> None:
    """In float16 and float32, among values that reach beyond every bend."""
    for dtype in (torch.float16, torch.float32):
        problem = replace(PLAIN, activation=activation, negative_slope=0.1, dtype=dtype)
        inputs: Any = make_inputs(problem)
        inputs = replace(inputs, weight=inputs.weight * 4)
        expected = oracle(problem, inputs)
        assert p1_failures(inputs.reference(), problem, inputs, expected) == []
        other = replace(inputs, activation=TAKEN_FOR[activation], negative_slope=0.101, slope=None)
        assert p1_failures(other.reference(), problem, inputs, expected) != []
