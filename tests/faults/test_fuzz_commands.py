"""Thousands of command lines: exit code 0, 1 or 2, and for 2 one line that says why."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.effort import TIMES
from tests.faults.command_inputs import command_lines
from tests.faults.fuzzing import fuzz

LINES = 2700 * TIMES


def test_command_lines(bundle: Path) -> None:
    outcome = fuzz(partial(command_lines, bundle), LINES)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.count == LINES
    assert outcome.words["exit code 2"] > LINES // 2 and outcome.words["exit code 0"] > LINES // 100
