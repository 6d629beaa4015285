"""Every argument that an operator does not accept is refused, with what was received and what is expected."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.launch
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.operators.registry import Arguments
from kernels.oracle import make_inputs
from kernels.problems import Problem, Projection
from tests.kernels.cases import SMALL, projected
from tests.kernels.launching import fake


def dense(*shape: int) -> Tensor:
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last)


# What is said, and the arguments that differ from the accepted call's.
Refused = tuple[str, dict[str, Any]]

PLAIN = replace(SMALL, has_residual=False)
# The accepted calls: x (2, 32, 6, 7), weight (40, 32, 3, 3), bias (40,), padding 1, and for the
# residual (2, 40, 6, 7); projected shortcut (2, 48, 11, 13) with weight (40 or 72, 48, 1, 1); expand_weight
# (72, 40, 1, 1). The head: x (2, 32, 6, 7), weight (10, 32), bias (10,).
PROBLEMS: dict[str, Problem] = {
    "conv2d_bias_act": SMALL,
    "conv2d_projection_bias_act": projected(SMALL, 48, (2, 2)),
    "conv2d_conv1x1_bias_act": BottleneckProblem(PLAIN, 72, projection=Projection(48, 11, 13, (2, 2)), relu=True),
    "conv2d_bias_relu_maxpool": StemProblem(PLAIN),
    "mean_linear": HeadProblem(2, 32, 6, 7, 10),
}

OF_A_CONVOLUTION: dict[str, Refused] = {
    "no-weights": (r"weight is \(0, 32, 3, 3\)", {"weight": dense(0, 32, 3, 3)}),
    "stride-0": (r"stride is \(0, 1\), expected two integers of at least 1", {"stride": (0, 1)}),
    "stride-of-three": (r"stride is \(1, 1, 1\), expected two", {"stride": (1, 1, 1)}),
    "padding-negative": (r"padding is \(1, -1\)", {"padding": (1, -1)}),
    "output-empty": (
        r"output of \(-2, -1\), expected at least \(1, 1\)", {"padding": (0, 0), "weight": dense(40, 32, 9, 9)},
    ),
    "x-not-channels_last": ("x of shape .*expected channels_last", {"x": torch.zeros(2, 32, 6, 7)}),
}  # fmt: skip
DILATION: dict[str, Refused] = {"dilation-0": (r"dilation is \(1, 0\)", {"dilation": (1, 0)})}
OF_A_PROJECTION: dict[str, Refused] = {
    "shortcut-batch": (r"the projected shortcut is \(1, \d+, 6, 7\)", {"shortcut": dense(1, 48, 11, 13)}),
    "shortcut-size": (
        r"the projected shortcut is \(2, \d+, 6, 8\), expected the output's shape \(2, \d+, 6, 7\)",
        {"shortcut": dense(2, 48, 11, 15)},
    ),
    "shortcut_stride-1": (r"the projected shortcut is \(2, \d+, 11, 13\)", {"shortcut_stride": (1, 1)}),
    "shortcut_stride-0": (r"shortcut_stride is \(0, 2\), expected two", {"shortcut_stride": (0, 2)}),
    "shortcut_weight-rows": (r"the projected shortcut is \(2, 39", {"shortcut_weight": dense(39, 48, 1, 1)}),
    "shortcut_weight-3x3": (
        r"shortcut_weight is \(40, 48, 3, 3\), expected \(C_OUT, 48, 1, 1\)",
        {"shortcut_weight": dense(40, 48, 3, 3), "shortcut": dense(2, 48, 13, 15)},
    ),
}
OF_ITS_OWN: dict[str, dict[str, Refused]] = {
    "conv2d_bias_act": {
        **OF_A_CONVOLUTION,
        **DILATION,
        "groups-do-not-divide-c_in": ("x has 32 channels, expected 64", {"groups": 2}),
        "groups-do-not-divide-c_out": (
            "40 output channels, expected a multiple of 16", {"weight": dense(40, 2, 3, 3), "groups": 16},
        ),
        "groups-0": ("groups is 0, expected at least 1", {"groups": 0}),
        "residual-shape": (
            r"residual is \(2, 40, 6, 6\), expected .*\(2, 40, 6, 7\)", {"residual": dense(2, 40, 6, 6)},
        ),
        "residual-would-broadcast": (r"residual is \(1, 40, 1, 1\)", {"residual": dense(1, 40, 1, 1)}),
    },
    "conv2d_projection_bias_act": {**OF_A_CONVOLUTION, **DILATION, **OF_A_PROJECTION},
    "conv2d_conv1x1_bias_act": {
        **OF_A_CONVOLUTION,
        **DILATION,
        **OF_A_PROJECTION,
        "expand_weight-columns": (
            r"expand_weight is \(72, 39, 1, 1\), expected \(C_OUT, 40, 1, 1\)", {"expand_weight": dense(72, 39, 1, 1)},
        ),
        "expand_weight-3x3": (r"expand_weight is \(72, 40, 3, 3\)", {"expand_weight": dense(72, 40, 3, 3)}),
        "expand_weight-empty": (r"expand_weight is \(0, 40, 1, 1\)", {"expand_weight": dense(0, 40, 1, 1)}),
        "expand_bias-too-long": ("expand_bias has 73 elements, expected 72", {"expand_bias": torch.zeros(73)}),
        "weight-without-shortcut": ("shortcut is None, expected the tensor", {"shortcut": None}),
        "shortcut-without-weight": (
            r"shortcut is \(2, 48, 11, 13\), expected the output's shape \(2, 72, 6, 7\)", {"shortcut_weight": None},
        ),
    },
    "conv2d_bias_relu_maxpool": OF_A_CONVOLUTION,
    "mean_linear": {
        "no-classes": (r"weight \(0, 32\), expected no empty", {"weight": torch.zeros(0, 32)}),
        "no-pixels": (r"x is \(2, 32, 0, 7\) .* expected no empty", {"x": dense(2, 32, 0, 7)}),
    },
}  # fmt: skip


def of_any_tensor(name: str, shape: tuple[int, ...]) -> dict[str, Refused]:
    """Every tensor of every operator: an axis fewer, another dtype, with gaps in memory, and a channel fewer."""
    tensor, axis = dense(*shape) if len(shape) == 4 else torch.zeros(shape), min(1, len(shape) - 1)
    gaps = torch.cat([tensor, tensor], axis)
    other, expected = (torch.uint8, "expected one of") if name == "x" else (torch.float64, "expected torch.float32")
    fewer = dense(*shape)[:, 1:] if len(shape) == 4 else tensor.narrow(axis, 1, shape[axis] - 1).clone()
    return {
        f"{name}-axes": (rf"{name} (has {len(shape) - 1} dimensions|is \().*expected", {name: tensor.select(-1, 0)}),
        f"{name}-dtype": (f"{name} is {other}, {expected}", {name: tensor.to(other)}),
        f"{name}-gaps": (
            f"{name} (of shape .*)?has strides .*, expected",
            {name: gaps[:, : shape[1]] if axis else gaps[::2]},
        ),
        f"{name}-channels": ("expected", {name: dense(*fewer.shape) if fewer.ndim == 4 else fewer}),
    }


REFUSED = {operator: {**OF_ITS_OWN[operator]} for operator in PROBLEMS}
for operator, problem in PROBLEMS.items():
    for name, shape in problem.shapes.items():
        REFUSED[operator] |= of_any_tensor(name, shape)
CASES = [(operator, name) for operator, refused in REFUSED.items() for name in refused]


def call_of(operator: str, **changes: Any) -> Arguments[Tensor]:
    """The accepted call, some of its arguments replaced."""
    inputs = make_inputs(PROBLEMS[operator].with_dtype(torch.float32))
    assert inputs.operator == operator
    return replace(inputs, **changes)


@pytest.mark.parametrize("operator", PROBLEMS)
def test_the_call_that_the_others_differ_from_is_accepted(operator: str) -> None:
    getattr(torch.ops.resnet_deploy, operator)(*call_of(operator).values())


@pytest.mark.parametrize(("operator", "name"), CASES)
def test_the_operator_its_fake_and_the_launcher_refuse_alike(operator: str, name: str) -> None:
    message, changes = REFUSED[operator][name]
    call = call_of(operator, **changes)
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.resnet_deploy, operator)(*call.values())
    with pytest.raises(ValueError, match=message):
        fake(call)
    with pytest.raises(ValueError, match=message):
        kernels.launch.run(operator, *call.values())


@pytest.mark.parametrize("operator", PROBLEMS)
def test_another_device_is_refused(operator: str) -> None:
    weight = call_of(operator).tensors()["weight"]
    elsewhere = torch.empty_strided(weight.shape, weight.stride(), device="meta")
    with pytest.raises(ValueError, match="weight is on meta, expected cpu"):
        fake(call_of(operator, weight=elsewhere))
