"""What tests of this room hold results to: one line for a refusal, the same bits, or what rounding explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from resnet.errors import ResNetError

_ORDER = 256.0  # float32 may be summed in another order, and in float64: then it loses less than its own share


def refusal(kind: type[ResNetError], call: Callable[..., object], *arguments: object) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(kind) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


def bits(model: nn.Module) -> dict[str, bytes]:
    """All that a model holds."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def relative_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor over its largest value; NaN where a tensor is all zeros."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - wanted).abs().max() / wanted.abs().max())
        for name, wanted in expected.items()
    }


def assert_equal_in_float64(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], single: Mapping[str, Tensor]
) -> None:
    """`found` and `expected` are one computation in float64, `single` is the same in float32.

    The limit follows from the computation itself, not from a number seen on one machine. How much it makes of rounding
    errors is seen in float32: in float64 it may make as much of errors that are eps64 / eps32 = 2e-9 times as large. A
    defect is as large in both, so it cannot widen its own limit.
    """
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    limit = _ORDER * ratio * max(relative_errors(single, expected).values())
    wrong = {name: error for name, error in relative_errors(found, expected).items() if not error <= limit}
    assert not wrong, f"relative errors above {limit:.1e}: {wrong}"
