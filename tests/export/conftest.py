"""What several files of this room need and is slow to make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from export import ExportResult
from export.base.precision import PRECISIONS
from export.quantisation.scheme import Scheme
from tests.conftest import Made
from tests.export import digits, quantised
from tests.export.networks import Fused, make


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=quantised.SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return quantised.SCHEMES[request.param]


@pytest.fixture(scope="session")
def fused(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor], request: pytest.FixtureRequest
) -> Mapping[Any, Fused]:
    """A calibrated model by name, `digits` for the trained one, or one of `networks` by its function."""

    def subject(key: Any) -> Fused:
        if key == "digits":
            return Fused(*request.getfixturevalue("trained_digits"))
        known = isinstance(key, str)
        images = pictures[key if known else "resnet8"]
        return Fused(calibrated[key] if known else make(key, images), images)

    return Made(subject)


@pytest.fixture(scope="session")
def resnet8(fused: Mapping[Any, Fused]) -> Fused:
    return fused["resnet8"]


@pytest.fixture
def export(trained_digits: tuple[nn.Module, Tensor], tmp_path: Path) -> Callable[..., ExportResult]:
    """`digits.export` of the trained network, or of another `model`, to `tmp_path / "b"`."""
    model, images = trained_digits
    return partial(digits.export, model=model, images=images, output=tmp_path / "b")


@pytest.fixture(scope="session")
def in_8_bits(fused: Mapping[Any, Fused]) -> Mapping[Any, quantised.Subject]:
    """The same in both schemes of quantisation."""
    return Made(lambda key: quantised.quantised(fused[key].model, fused[key].images))
