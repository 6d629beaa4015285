"""Thousands of damaged and hostile weights files: each is refused in one line, without running it, or is sound."""

from __future__ import annotations

from tests.effort import TIMES
from tests.faults.fuzzing import fuzz
from tests.faults.weights_inputs import weights_files

FILES = 2500 * TIMES


def test_weights_files() -> None:
    outcome = fuzz(weights_files, FILES)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.count == FILES
    assert outcome.words["refused"] > FILES // 2 and outcome.words["passed"] > FILES // 50
