"""No right network is refused: one of each kind, exported and its bundle verified. `make test` prints how many were.

By default every kind goes through one precision and every sixth through all; with TEST_TIMES above 1 all through all.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from export import ExportConfig, export_bundle, verify_bundle
from export.base.precision import FORMATS, INT8
from export.quantisation.calibration import InMemory
from tests.effort import TIMES
from tests.export.zoo import SIZE, ZOO, channels_of, pictures, settled

FULL = 6  # every how many kinds are tried in every precision
TRIALS = [
    (name, precision)
    for i, name in enumerate(ZOO)
    for j, precision in enumerate(FORMATS)
    if TIMES > 1 or i % FULL == 0 or i % len(FORMATS) == j
]
model_of = lru_cache(maxsize=1)(settled)


pytestmark = pytest.mark.usefixtures("captured_once")  # what all precisions of a network start from


def test_the_zoo_has_many_kinds() -> None:
    assert len(ZOO) >= 40 and {precision for _, precision in TRIALS} == {"fp32", "fp16", "bf16", "int8"}


@pytest.mark.right_network
@pytest.mark.parametrize(("name", "precision"), TRIALS)
def test_a_right_network_is_not_refused(name: str, precision: str, tmp_path: Path) -> None:
    channels, config = channels_of(name), ExportConfig(precision, (1, 8, 32), "none")
    calibration = InMemory(pictures(104, channels, 50).numpy()) if precision == INT8.name else None
    example, images = torch.zeros(1, channels, SIZE, SIZE), pictures(16, channels, 77)
    result = export_bundle(model_of(name), example, tmp_path / "b", config, images=images, calibration=calibration)
    assert result, result.report.verdict
    for rung in verify_bundle(tmp_path / "b"):
        assert rung, rung.verdict
