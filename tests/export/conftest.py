"""What several files of this room need and is slow to make."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.export import quantised


@pytest.fixture(scope="session")
def in_8_bits(request: pytest.FixtureRequest) -> Callable[[str], quantised.Subject]:
    """By name: a calibrated model, or `digits` for the trained one; quantised in both schemes when first asked for."""
    made: dict[str, quantised.Subject] = {}

    def subject(name: str) -> quantised.Subject:
        if name not in made:
            if name == "digits":
                model, images = request.getfixturevalue("trained_digits")
            else:
                model, images = (request.getfixturevalue(kind)[name] for kind in ("calibrated", "pictures"))
            made[name] = quantised.quantised(model, images)
        return made[name]

    return subject
