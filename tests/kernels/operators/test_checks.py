"""Every argument that an operator does not accept is refused, with what was received and what is expected."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.launch
from kernels.operators.checks import is_channels_last
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.operators.registry import Arguments
from kernels.oracle import make_inputs
from kernels.problems import Problem, Projection
from tests.kernels.cases import SMALL, projected


def dense(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


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
    "x-3d": ("x has 3 dimensions .*expected 4", {"x": torch.zeros(2, 32, 6)}),
    "weight-2d": ("weight has 2 dimensions .*expected 4", {"weight": torch.zeros(40, 32)}),
    "bias-2d": ("bias has 2 dimensions .*expected 1", {"bias": torch.zeros(40, 1)}),
    "x-channels": ("x has 31 channels, expected 32", {"x": dense(2, 31, 6, 7)}),
    "no-weights": (r"weight is \(0, 32, 3, 3\)", {"weight": dense(0, 32, 3, 3)}),
    "bias-too-short": ("bias has 39 elements, expected 40", {"bias": torch.zeros(39)}),
    "x-dtype": ("x is torch.uint8, expected one of", {"x": dense(2, 32, 6, 7, dtype=torch.uint8)}),
    "weight-dtype": (
        "weight is torch.float16, expected torch.float32",
        {"weight": dense(40, 32, 3, 3, dtype=torch.float16)},
    ),
    "bias-dtype": ("bias is torch.float64, expected torch.float32", {"bias": torch.zeros(40, dtype=torch.float64)}),
    "stride-0": (r"stride is \(0, 1\), expected two integers of at least 1", {"stride": (0, 1)}),
    "stride-of-three": (r"stride is \(1, 1, 1\), expected two", {"stride": (1, 1, 1)}),
    "padding-negative": (r"padding is \(1, -1\)", {"padding": (1, -1)}),
    "output-empty": (
        r"output of \(-2, -1\), expected at least \(1, 1\)",
        {"padding": (0, 0), "weight": dense(40, 32, 9, 9)},
    ),
    "x-not-channels_last": ("x of shape .*expected channels_last", {"x": torch.zeros(2, 32, 6, 7)}),
    "x-sliced": ("x of shape .*channels_last", {"x": dense(2, 32, 6, 14)[..., ::2]}),
    "x-channel-slice": ("x of shape .*channels_last", {"x": dense(2, 64, 6, 7)[:, :32]}),
    "x-transposed": ("x of shape .*channels_last", {"x": dense(2, 32, 7, 6).transpose(2, 3)}),
    "x-expanded": ("x of shape .*channels_last", {"x": dense(1, 32, 6, 7).expand(2, -1, -1, -1)}),
    "weight-not-channels_last": ("weight of shape .*channels_last", {"weight": torch.zeros(40, 32, 3, 3)}),
    "bias-strided": (r"bias has strides \(2,\)", {"bias": torch.zeros(80)[::2]}),
}
OF_A_PROJECTION: dict[str, Refused] = {
    "shortcut-3d": ("shortcut has 3 dimensions .*expected 4", {"shortcut": torch.zeros(2, 48, 11)}),
    "shortcut_weight-2d": ("shortcut_weight has 2 dimensions", {"shortcut_weight": torch.zeros(40, 48)}),
    "shortcut-channels": ("shortcut has 47 channels, expected 48", {"shortcut": dense(2, 47, 11, 13)}),
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
    "shortcut-dtype": ("shortcut is torch.float16", {"shortcut": dense(2, 48, 11, 13, dtype=torch.float16)}),
    "shortcut-not-channels_last": ("shortcut of shape", {"shortcut": torch.zeros(2, 48, 11, 13)}),
}
REFUSED: dict[str, dict[str, Refused]] = {
    "conv2d_bias_act": {
        **OF_A_CONVOLUTION,
        "groups-do-not-divide-c_in": ("x has 32 channels, expected 64", {"groups": 2}),
        "groups-do-not-divide-c_out": (
            "40 output channels, expected a multiple of 16",
            {"weight": dense(40, 2, 3, 3), "groups": 16},
        ),
        "groups-0": ("groups is 0, expected at least 1", {"groups": 0}),
        "dilation-0": (r"dilation is \(1, 0\)", {"dilation": (1, 0)}),
        "residual-shape": (
            r"residual is \(2, 40, 6, 6\), expected .*\(2, 40, 6, 7\)",
            {"residual": dense(2, 40, 6, 6)},
        ),
        "residual-would-broadcast": (r"residual is \(1, 40, 1, 1\)", {"residual": dense(1, 40, 1, 1)}),
        "residual-dtype": ("residual is torch.bfloat16", {"residual": dense(2, 40, 6, 7, dtype=torch.bfloat16)}),
        "residual-not-channels_last": ("residual of shape", {"residual": torch.zeros(2, 40, 6, 7)}),
    },
    "conv2d_projection_bias_act": {
        **OF_A_CONVOLUTION,
        **OF_A_PROJECTION,
        "dilation-0": (r"dilation is \(1, 0\)", {"dilation": (1, 0)}),
    },
    "conv2d_conv1x1_bias_act": {
        **OF_A_CONVOLUTION,
        **OF_A_PROJECTION,
        "expand_weight-2d": ("expand_weight has 2 dimensions", {"expand_weight": torch.zeros(72, 40)}),
        "expand_weight-columns": (
            r"expand_weight is \(72, 39, 1, 1\), expected \(C_OUT, 40, 1, 1\)",
            {"expand_weight": dense(72, 39, 1, 1)},
        ),
        "expand_weight-3x3": (r"expand_weight is \(72, 40, 3, 3\)", {"expand_weight": dense(72, 40, 3, 3)}),
        "expand_weight-empty": (r"expand_weight is \(0, 40, 1, 1\)", {"expand_weight": dense(0, 40, 1, 1)}),
        "expand_weight-dtype": (
            "expand_weight is torch.float16",
            {"expand_weight": dense(72, 40, 1, 1, dtype=torch.float16)},
        ),
        "expand_bias-too-long": ("expand_bias has 73 elements, expected 72", {"expand_bias": torch.zeros(73)}),
        "expand_bias-strided": (r"expand_bias has strides \(2,\)", {"expand_bias": torch.zeros(144)[::2]}),
        "weight-without-shortcut": ("shortcut is None, expected the tensor", {"shortcut": None}),
        "shortcut-without-weight": (
            r"shortcut is \(2, 48, 11, 13\), expected the output's shape \(2, 72, 6, 7\)",
            {"shortcut_weight": None},
        ),
    },
    "conv2d_bias_relu_maxpool": OF_A_CONVOLUTION,
    "mean_linear": {
        "x-2d": ("x has 2 dimensions .*expected 4", {"x": torch.zeros(2, 32)}),
        "weight-4d": ("weight has 4 dimensions .*expected 2", {"weight": dense(10, 32, 1, 1)}),
        "bias-2d": ("bias has 2 dimensions .*expected 1", {"bias": torch.zeros(10, 1)}),
        "x-channels": ("x has 31 channels, expected weight's 32 columns", {"x": dense(2, 31, 6, 7)}),
        "no-classes": (r"weight \(0, 32\), expected no empty", {"weight": torch.zeros(0, 32)}),
        "no-pixels": (r"x is \(2, 32, 0, 7\) .* expected no empty", {"x": dense(2, 32, 0, 7)}),
        "bias-too-long": ("bias has 11 elements, expected 10", {"bias": torch.zeros(11)}),
        "x-dtype": ("x is torch.uint8, expected one of", {"x": dense(2, 32, 6, 7, dtype=torch.uint8)}),
        "weight-dtype": ("weight is torch.float16", {"weight": torch.zeros(10, 32, dtype=torch.float16)}),
        "x-not-channels_last": ("x of shape .*channels_last", {"x": torch.zeros(2, 32, 6, 7)}),
        "weight-transposed": (
            r"weight has strides \(1, 10\), expected a contiguous",
            {"weight": torch.zeros(32, 10).T},
        ),
        "bias-strided": (r"bias has strides \(2,\)", {"bias": torch.zeros(20)[::2]}),
    },
}
CASES = [(operator, name) for operator, refused in REFUSED.items() for name in refused]


def call_of(operator: str, **changes: Any) -> Arguments[Tensor]:
    """The accepted call, some of its arguments replaced."""
    inputs = make_inputs(PROBLEMS[operator].with_dtype(torch.float32))
    assert inputs.operator == operator
    return replace(inputs, **changes)


def faked(arguments: Arguments[Tensor]) -> Tensor:
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments.values()]
        y: Tensor = getattr(torch.ops.resnet_deploy, arguments.operator)(*values)
    return y


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
        faked(call)
    with pytest.raises(ValueError, match=message):
        kernels.launch.run(operator, *call.values())


@pytest.mark.parametrize("operator", PROBLEMS)
def test_another_device_is_refused(operator: str) -> None:
    weight = call_of(operator).tensors()["weight"]
    elsewhere = torch.empty_strided(weight.shape, weight.stride(), device="meta")
    with pytest.raises(ValueError, match="weight is on meta, expected cpu"):
        faked(call_of(operator, weight=elsewhere))


@pytest.mark.parametrize(
    "tensor",
    [
        dense(2, 3, 4, 5),
        dense(1, 3, 4, 5),
        dense(2, 1, 4, 5),
        dense(2, 3, 1, 1),
        dense(1, 1, 1, 1),
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 1, 4, 5),
        torch.zeros(2, 3, 1, 1),
        torch.zeros(1, 1, 4, 5),
        dense(2, 6, 4, 5)[:, ::2],
        dense(2, 3, 4, 10)[..., ::2],
        dense(4, 3, 4, 5)[::2],
        dense(4, 3, 4, 5)[:1],
        dense(1, 3, 4, 5).expand(2, -1, -1, -1),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_is_channels_last_agrees_with_torch(tensor: Tensor) -> None:
    assert is_channels_last(tensor) == tensor.is_contiguous(memory_format=torch.channels_last)
