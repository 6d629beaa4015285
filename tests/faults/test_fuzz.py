"""Thousands of damaged files whose hashes fit, and of command lines: refused in one line, or taken, right or wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.effort import TIMES
from tests.faults.bundle_inputs import golden_files, manifests, onnx_files
from tests.faults.command_inputs import command_lines
from tests.faults.fuzzing import fuzz
from tests.faults.weights_inputs import weights_files

# How many of each there are, and what share of them must at least come to what: none is all sound or all refused.
INPUTS: dict[str, tuple[Callable[..., Any], int, dict[str, float]]] = {
    "manifests": (manifests, 2000, {"refused": 1 / 3, "passed": 1 / 10}),
    "golden files": (golden_files, 2100, {"refused": 1 / 150, "failed": 1 / 150, "passed": 1 / 150}),
    "onnx files": (onnx_files, 1500, {"refused": 1 / 20, "failed": 1 / 20, "passed": 1 / 20}),
    "command lines": (command_lines, 2500, {"exit code 2": 1 / 2, "exit code 0": 1 / 100}),
    "weights files": (weights_files, 2000, {"refused": 1 / 2, "passed": 1 / 50}),
}


def test_there_are_at_least_10000_inputs() -> None:
    assert sum(count for _, count, _ in INPUTS.values()) >= 10_000


@pytest.mark.parametrize("name", INPUTS)
def test_each_is_refused_in_one_line_or_taken(
    name: str, bundle: Path, record_property: Callable[[str, Any], None]
) -> None:
    target, count, shares = INPUTS[name]
    outcome = fuzz(partial(target, bundle), count * TIMES)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.count == count * TIMES
    record_property("inputs", outcome.count)
    for word, share in shares.items():
        assert outcome.words.get(word, 0) >= share * count * TIMES, outcome.words
