"""Thousands of damaged bundles whose hashes fit: each is refused in one line, or read and found right or wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.effort import TIMES
from tests.faults.bundle_inputs import golden_files, manifests
from tests.faults.fuzzing import fuzz

MANIFESTS, GOLDEN_FILES = 4000 * TIMES, 1500 * TIMES


def test_manifests(bundle: Path) -> None:
    outcome = fuzz(partial(manifests, bundle), MANIFESTS)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.count == MANIFESTS
    assert outcome.words["refused"] > MANIFESTS // 3 and outcome.words["passed"] > MANIFESTS // 10


def test_golden_files(bundle: Path) -> None:
    outcome = fuzz(partial(golden_files, bundle), GOLDEN_FILES)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.count == GOLDEN_FILES
    assert min(outcome.words[word] for word in ("refused", "failed", "passed")) > 10
