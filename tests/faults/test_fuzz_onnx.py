"""Damaged ONNX files whose hashes fit: each is refused in one line, or runs and is found right or wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.effort import TIMES
from tests.faults.bundle_inputs import onnx_files
from tests.faults.fuzzing import fuzz

FILES = 1500 * TIMES


def test_onnx_files(bundle: Path) -> None:
    outcome = fuzz(partial(onnx_files, bundle), FILES)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.count == FILES
    assert min(outcome.words[word] for word in ("refused", "failed", "passed")) > FILES // 20
