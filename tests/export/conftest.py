"""What several files of this room need and is slow to make."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from tests.conftest import Made
from tests.export import quantised


@pytest.fixture(scope="session")
def in_8_bits(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor], request: pytest.FixtureRequest
) -> dict[str, quantised.Subject]:
    """By name: a calibrated model, or `digits` for the trained one; quantised in both schemes when first asked for."""

    def subject(name: str) -> quantised.Subject:
        trained = name == "digits"
        subject = request.getfixturevalue("trained_digits") if trained else (calibrated[name], pictures[name])
        return quantised.quantised(*subject)

    return Made(subject)
