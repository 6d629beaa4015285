"""The rounding model is one: what a module without torch repeats of it is the same."""

import pytest

from export.base.precision import PRECISIONS
from kernels.rounding import ROUNDING_RMS, UNIT_ROUNDOFF


@pytest.mark.parametrize("name", PRECISIONS)
def test_precisions_round_as_the_model_says(name: str) -> None:
    precision = PRECISIONS[name]
    assert precision.roundoff == UNIT_ROUNDOFF[precision.dtype]
    assert name == "fp32" or precision.network_floor == ROUNDING_RMS * precision.roundoff
