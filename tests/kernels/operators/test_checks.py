"""What an operator does not accept is refused, with what was received and what is expected.

Each check by one operator and one call; that every operator makes its checks, and its fake and its launcher the same,
is what test_properties.py draws calls for.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.launch
from kernels.operators.registry import Arguments
from kernels.oracle import make_inputs
from tests.kernels import strategies
from tests.kernels.cases import ONE_OF_EACH
from tests.kernels.launching import fake, operator


def dense(*shape: int) -> Tensor:
    return strategies.dense(torch.zeros(shape))


CONV, PROJECTION, BOTTLENECK, HEAD = "conv", "projection", "bottleneck-projection", "head"
# The accepted calls: x (2, 32, 6, 7), weight (40, 32, 3, 3), bias (40,), padding 1, and for the residual
# (2, 40, 6, 7); projected shortcut (2, 48, 11, 13) with weight (40 or 72, 48, 1, 1); expand_weight (72, 40, 1, 1).
# The head: x (5, 70, 7, 7), weight (33, 70), bias (33,). Behind each what it has in their place, and what is said.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no-weights": (CONV, {"weight": dense(0, 32, 3, 3)}, "weight is (0, 32, 3, 3), expected no empty dimension"),
    "stride-0": (CONV, {"stride": (0, 1)}, "stride is (0, 1), expected two integers of at least 1"),
    "stride-of-three": (CONV, {"stride": (1, 1, 1)}, "stride is (1, 1, 1), expected two"),
    "padding-negative": (CONV, {"padding": (1, -1)}, "padding is (1, -1), expected two integers of at least 0"),
    "dilation-0": (CONV, {"dilation": (1, 0)}, "dilation is (1, 0)"),
    "groups-0": (CONV, {"groups": 0}, "groups is 0, expected at least 1"),
    "groups-do-not-divide-c_in": (CONV, {"groups": 2}, "x has 32 channels, expected 64"),
    "groups-do-not-divide-c_out": (
        CONV, {"weight": dense(40, 2, 3, 3), "groups": 16}, "40 output channels, expected a multiple of 16",
    ),
    "output-empty": (
        CONV, {"padding": (0, 0), "weight": dense(40, 32, 9, 9)}, "output of (-2, -1), expected at least (1, 1)",
    ),
    "axes": (CONV, {"x": torch.zeros(2, 32, 6)}, "x has 3 dimensions (2, 32, 6), expected 4"),
    "dtype": (CONV, {"x": dense(2, 32, 6, 7).to(torch.uint8)}, "x is torch.uint8, expected one of torch.float16"),
    "other-dtype": (CONV, {"bias": torch.zeros(40).double()}, "bias is torch.float64, expected torch.float32 like x"),
    "contiguous": (CONV, {"x": torch.zeros(2, 32, 6, 7)}, "x of shape (2, 32, 6, 7) has strides (1344, 42, 7, 1)"),
    "gaps": (CONV, {"bias": torch.zeros(80)[::2]}, "bias has strides (2,), expected a contiguous tensor"),
    "bias-too-long": (BOTTLENECK, {"expand_bias": torch.zeros(73)}, "expand_bias has 73 elements, expected 72"),
    "residual-would-broadcast": (
        CONV, {"residual": dense(1, 40, 1, 1)}, "residual is (1, 40, 1, 1), expected the output's shape (2, 40, 6, 7)",
    ),
    "shortcut-size": (
        PROJECTION, {"shortcut": dense(2, 48, 11, 15)}, "the projected shortcut is (2, 40, 6, 8), expected",
    ),
    "shortcut_stride-0": (PROJECTION, {"shortcut_stride": (0, 2)}, "shortcut_stride is (0, 2), expected two"),
    "shortcut_weight-3x3": (
        PROJECTION, {"shortcut_weight": dense(40, 48, 3, 3), "shortcut": dense(2, 48, 13, 15)},
        "shortcut_weight is (40, 48, 3, 3), expected (C_OUT, 48, 1, 1)",
    ),
    "expand_weight-columns": (
        BOTTLENECK, {"expand_weight": dense(72, 39, 1, 1)}, "expand_weight is (72, 39, 1, 1), expected (C_OUT, 40",
    ),
    "weight-without-shortcut": (BOTTLENECK, {"shortcut": None}, "shortcut is None, expected the tensor"),
    "shortcut-without-weight": (
        BOTTLENECK, {"shortcut_weight": None}, "shortcut is (2, 48, 11, 13), expected the output's shape (2, 72, 6, 7)",
    ),
    "no-pixels": (HEAD, {"x": dense(5, 70, 0, 7)}, "x is (5, 70, 0, 7) and weight (33, 70), expected no empty"),
}  # fmt: skip
for name, problem in ONE_OF_EACH.items():  # every tensor of every operator
    for tensor, shape in problem.shapes.items():
        fewer = (shape[0], shape[1] - 1, *shape[2:]) if len(shape) > 1 else (shape[0] - 1,)
        REFUSED[f"{name}-{tensor}-channels"] = name, {tensor: dense(*fewer)}, "expected"
        REFUSED[f"{name}-{tensor}-axes"] = name, {tensor: dense(*shape[:-1])}, "expected"


def call_of(name: str, **changes: Any) -> Arguments[Tensor]:
    """The accepted call, some of its arguments replaced."""
    return replace(make_inputs(ONE_OF_EACH[name].with_dtype(torch.float32)), **changes)


@pytest.mark.parametrize("case", REFUSED)
def test_the_operator_its_fake_and_the_launcher_refuse_alike(case: str) -> None:
    name, changes, message = REFUSED[case]
    call = call_of(name, **changes)
    for run in (operator, fake, lambda call: kernels.launch.run(call.operator, *call.values())):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(call)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_another_device_is_refused(name: str) -> None:
    weight = call_of(name).tensors()["weight"]
    elsewhere = torch.empty_strided(weight.shape, weight.stride(), device="meta")
    with pytest.raises(ValueError, match="weight is on meta, expected cpu"):
        fake(call_of(name, weight=elsewhere))
