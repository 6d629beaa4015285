"""Every argument that the operator does not accept is refused, with what was received and what is expected."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import conv2d_bias_act
from kernels.checks import is_channels_last
from kernels.launch import launch_conv2d_bias_act
from tests.kernels.conv_cases import ODD_CASES
from tests.kernels.oracle import make_inputs

PROBLEM = replace(ODD_CASES["small"], dtype=torch.float32)


def dense(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Refused:
    message: str
    changes: dict[str, Any] = field(default_factory=dict)


# The accepted call is x (2, 32, 6, 7), weight (40, 32, 3, 3), bias (40,), residual (2, 40, 6, 7), padding 1.
REFUSED = {
    "x-3d": Refused("x has 3 dimensions .*expected 4", {"x": torch.zeros(2, 32, 6)}),
    "weight-2d": Refused("weight has 2 dimensions .*expected 4", {"weight": torch.zeros(40, 32)}),
    "bias-2d": Refused("bias has 2 dimensions .*expected 1", {"bias": torch.zeros(40, 1)}),
    "x-channels": Refused("x has 31 channels, expected 32", {"x": dense(2, 31, 6, 7)}),
    "no-weights": Refused(r"weight is \(0, 32, 3, 3\)", {"weight": dense(0, 32, 3, 3)}),
    "groups-do-not-divide-c_in": Refused("x has 32 channels, expected 64", {"groups": 2}),
    "groups-do-not-divide-c_out": Refused(
        "40 output channels, expected a multiple of 16", {"weight": dense(40, 2, 3, 3), "groups": 16}
    ),
    "groups-0": Refused("groups is 0, expected at least 1", {"groups": 0}),
    "bias-too-short": Refused("bias has 39 elements, expected 40", {"bias": torch.zeros(39)}),
    "residual-shape": Refused(
        r"residual is \(2, 40, 6, 6\), expected .*\(2, 40, 6, 7\)", {"residual": dense(2, 40, 6, 6)}
    ),
    "residual-would-broadcast": Refused(r"residual is \(1, 40, 1, 1\)", {"residual": dense(1, 40, 1, 1)}),
    "x-dtype": Refused("x is torch.uint8, expected one of", {"x": dense(2, 32, 6, 7, dtype=torch.uint8)}),
    "weight-dtype": Refused(
        "weight is torch.float16, expected torch.float32", {"weight": dense(40, 32, 3, 3, dtype=torch.float16)}
    ),
    "bias-dtype": Refused(
        "bias is torch.float64, expected torch.float32", {"bias": torch.zeros(40, dtype=torch.float64)}
    ),
    "residual-dtype": Refused("residual is torch.bfloat16", {"residual": dense(2, 40, 6, 7, dtype=torch.bfloat16)}),
    "stride-0": Refused(r"stride is \(0, 1\), expected two integers of at least 1", {"stride": (0, 1)}),
    "stride-of-three": Refused(r"stride is \(1, 1, 1\), expected two", {"stride": (1, 1, 1)}),
    "padding-negative": Refused(r"padding is \(1, -1\)", {"padding": (1, -1)}),
    "dilation-0": Refused(r"dilation is \(1, 0\)", {"dilation": (1, 0)}),
    "output-empty": Refused(
        r"output of \(-2, -1\), expected at least \(1, 1\)", {"padding": (0, 0), "dilation": (4, 4), "residual": None}
    ),
    "x-not-channels_last": Refused("x of shape .*expected channels_last", {"x": torch.zeros(2, 32, 6, 7)}),
    "x-sliced": Refused("x of shape .*channels_last", {"x": dense(2, 32, 6, 14)[..., ::2]}),
    "x-channel-slice": Refused("x of shape .*channels_last", {"x": dense(2, 64, 6, 7)[:, :32]}),
    "x-transposed": Refused("x of shape .*channels_last", {"x": dense(2, 32, 7, 6).transpose(2, 3)}),
    "x-expanded": Refused("x of shape .*channels_last", {"x": dense(1, 32, 6, 7).expand(2, -1, -1, -1)}),
    "weight-not-channels_last": Refused("weight of shape .*channels_last", {"weight": torch.zeros(40, 32, 3, 3)}),
    "residual-not-channels_last": Refused("residual of shape .*channels_last", {"residual": torch.zeros(2, 40, 6, 7)}),
    "bias-strided": Refused(r"bias has stride \(2,\)", {"bias": torch.zeros(80)[::2]}),
}


def accepted_call() -> dict[str, Any]:
    inputs = make_inputs(PROBLEM)
    return {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "residual": inputs.residual,
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "relu": True,
    }


def test_the_call_that_the_others_differ_from_is_accepted() -> None:
    conv2d_bias_act(**accepted_call())


@pytest.mark.parametrize("name", REFUSED)
def test_the_operator_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name].message):
        conv2d_bias_act(**{**accepted_call(), **REFUSED[name].changes})


@pytest.mark.parametrize("name", REFUSED)
def test_the_fake_refuses_alike(name: str) -> None:
    arguments = {**accepted_call(), **REFUSED[name].changes}
    with FakeTensorMode() as mode:
        faked = {
            key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in arguments.items()
        }
        with pytest.raises(ValueError, match=REFUSED[name].message):
            conv2d_bias_act(**faked)


@pytest.mark.parametrize("name", REFUSED)
def test_the_launcher_refuses_alike(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name].message):
        launch_conv2d_bias_act(out=dense(2, 40, 6, 7), **{**accepted_call(), **REFUSED[name].changes})


def test_another_device_is_refused() -> None:
    with FakeTensorMode():
        arguments = {**accepted_call(), "weight": torch.empty(40, 32, 3, 3, device="meta")}
        with pytest.raises(ValueError, match="weight is on meta, expected cpu"):
            conv2d_bias_act(**arguments)


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
