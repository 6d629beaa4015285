"""What kind of error a wrong value is, on values made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from export.criteria.fault import fault_of, quantised_fault_of
from export.runtime.parity.checks import Fault, OperatorCheck, OperatorChecks

LARGEST = torch.finfo(torch.float16).max
INDEX = (1, 2)


def changed(value: float, to: float) -> Tensor:
    values = torch.full((3, 4), value, dtype=torch.float64)
    values[INDEX] = to
    return values


# what was computed, what float64 has, and what is found
KINDS: dict[str, tuple[Tensor, Tensor, str]] = {
    "infinite": (changed(1.0, math.inf), changed(1.0, 7e4), "overflow"),
    "infinite where float64 is within the range": (changed(1.0, math.inf), changed(7e4, 1.0), "overflow"),
    "not a number": (changed(1.0, math.nan), changed(7e4, 1.0), "NaN"),
    "clamped": (changed(1.0, LARGEST), changed(1.0, 7e4), "saturation"),
    "clamped below": (changed(-1.0, -LARGEST), changed(-1.0, -7e4), "saturation"),
    "flushed to zero": (changed(1.0, 0.0), changed(1.0, 3e-6), "underflow"),
    "not 0 behind a dead ReLU": (changed(0.0, 5.0), changed(0.0, 0.0), "wrong value"),
    "one wrong": (changed(1.0, 3.0), changed(1.0, 1.0), "wrong value"),
    "zero where it is not": (changed(1.0, 0.0), changed(1.0, 1.0), "wrong value"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_wrong_value_has_a_kind_a_place_and_both_values(case: str) -> None:
    y, expected, kind = KINDS[case]
    z = (y - expected).abs() / (1e-3 * expected.abs()).clamp(min=1e-9) if bool(torch.isfinite(y).all()) else None
    fault = fault_of(y, expected, z, torch.float16)
    assert (fault.kind, fault.index) == (kind, INDEX)
    assert fault.expected == expected[INDEX] and (fault.got == y[INDEX] or math.isnan(fault.got))


def test_of_several_infinite_values_the_largest_is_the_worst() -> None:
    y, expected = torch.full((5,), math.inf, dtype=torch.float64), torch.tensor([7e4, 9e4, -2e5, 8e4, 1.0]).double()
    y[3] = math.nan
    assert fault_of(y, expected, None, torch.float16).index == (2,)


def test_weights_below_the_smallest_normal_number_are_an_underflow() -> None:
    y, expected = torch.ones(4).double(), torch.full((4,), 1.01).double()
    small, usual = torch.linspace(1e-7, 1e-6, 50).double(), torch.linspace(-1, 1, 50).double()
    assert fault_of(y, expected, expected - y, torch.float16, [usual, small]).kind == "underflow"
    assert fault_of(y, expected, expected - y, torch.float16, [usual]).kind == "wrong value"
    assert fault_of(y, expected, expected - y, torch.bfloat16, [usual, small]).kind == "wrong value"


@pytest.mark.parametrize(
    ("got", "zero_point", "kind"),
    [(127, 0, "saturation"), (-128, 0, "saturation"), (90, 0, "wrong value"), (-128, -128, "wrong value")],
)
def test_whole_numbers(got: int, zero_point: int, kind: str) -> None:
    """What is at the end of the range was cut off, unless that end is the zero."""
    q, expected = torch.full((2, 3), 10.0).double(), torch.full((2, 3), 10.0).double()
    q[1, 1] = got
    fault = quantised_fault_of(q, expected, torch.tensor(zero_point, dtype=torch.int8))
    assert fault == Fault(kind, (1, 1), float(got), 10.0)


def test_a_diagnosis_says_where_what_and_how() -> None:
    fault = Fault("overflow", (0, 5, 2, 1), math.inf, 123456.0)
    passed = OperatorCheck("conv1", "conv2d_bias_act", 1.0, 4.0, 1.6, 9.0)
    failed = OperatorCheck("layer1.0.conv1", "conv2d_bias_act", math.inf, math.inf, 1.6, 9.0, "12 are Inf", fault)
    checks = OperatorChecks((passed, failed, failed), ())
    assert checks.summary == "layer1.0.conv1: overflow"
    assert checks.diagnosis == (
        "layer1.0.conv1 (conv2d_bias_act): overflow at [0, 5, 2, 1], inf where float64 has 1.2346e+05: 12 are Inf"
    )
    assert failed.to_json()["fault"] == {
        "kind": "overflow", "index": [0, 5, 2, 1], "got": None, "expected": 123456.0
    }  # fmt: skip
    assert OperatorChecks((passed,), ()).diagnosis == "" and passed.severity == pytest.approx(1 / 1.6)
    assert OperatorChecks((), ()).diagnosis == "no operator could be checked"
