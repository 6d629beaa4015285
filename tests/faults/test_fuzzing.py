"""Thousands of damaged files whose hashes fit, and of command lines: refused in one line, or taken, right or wrong.

Before them the fuzzing itself: whatever an input makes a function do is seen, and blamed on that input.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from export.base.machine import installed_version
from tests.effort import TIMES
from tests.faults.bundle_inputs import golden_files, manifests, onnx_files
from tests.faults.command_inputs import command_lines
from tests.faults.fuzzing import fuzz
from tests.faults.kernel_inputs import kernel_files
from tests.faults.weights_inputs import weights_files


def spin() -> None:
    while True:
        pass


OUTSIDE = "/tmp/written-by-a-fuzzed-input"
DEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "exception": (lambda: [][0], "IndexError: 'list index out of range' at test_fuzzing.py"),
    "exit": (lambda: sys.exit(3), "SystemExit: '3'"),
    "crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "the process ended with SIGSEGV"),
    "end": (lambda: os._exit(0), "the process ended with exit code 0"),
    "hang": (spin, "still busy after 1 s of processor time"),
    "memory": (lambda: bytearray(8 << 30), "MemoryError"),
    "file outside": (lambda: Path(OUTSIDE).write_text("x"), f"escape: open ('{OUTSIDE}', 'w'"),
    "folder outside": (lambda: os.mkdir(OUTSIDE), "escape: os.mkdir"),
    "file above": (lambda: Path("../written").write_text("x"), "escape: open ('../written', 'w'"),
    "program": (lambda: subprocess.run(["true"]), "escape: subprocess.Popen"),
    "shell": (lambda: os.system("true"), "escape: os.system"),
    "connection": (lambda: socket.create_connection(("192.0.2.1", 9)), "escape: socket"),
}  # fmt: skip


def misbehave(folder: Path) -> Callable[[int], str]:
    """Every fourth input is one of DEEDS; the others write a file where they may."""

    def try_one(index: int) -> str:
        if index % 4 == 2:
            DEEDS[list(DEEDS)[index // 4]][0]()
        (folder / "file").write_text("x")
        return "fine"

    return try_one


def test_every_misdeed_is_seen_and_named() -> None:
    outcome = fuzz(misbehave, 4 * len(DEEDS), seconds=1)
    assert not Path(OUTSIDE).exists()
    assert outcome.words == {"fine": 3 * len(DEEDS)} and outcome.count == 4 * len(DEEDS)
    for number, (name, (_, expected)) in enumerate(DEEDS.items()):
        assert outcome.faults[number].startswith(f"input {4 * number + 2}: {expected}"), name


def waits(folder: Path) -> Callable[[int], str]:
    def try_one(index: int) -> str:
        time.sleep(1000)
        return "fine"

    return try_one


def test_one_that_waits_for_ever_is_seen() -> None:
    assert fuzz(waits, 1, clock=1).faults == ["input 0: still waiting after 1 s"]


# How many of each there are, and what share of them must at least come to what: none is all sound or all refused.
INPUTS: dict[str, tuple[Callable[..., Any], int, dict[str, float]]] = {
    "manifests": (manifests, 2000, {"refused": 1 / 3, "passed": 1 / 10}),
    "golden files": (golden_files, 2100, {"refused": 1 / 150, "failed": 1 / 150, "passed": 1 / 150}),
    "onnx files": (onnx_files, 1500, {"refused": 1 / 20, "failed": 1 / 20, "passed": 1 / 20}),
    "kernel engines": (kernel_files, 2000, {"refused": 1 / 2, "passed": 1 / 50}),
    "command lines": (command_lines, 2500, {"exit code 2": 1 / 2, "exit code 0": 1 / 100}),
    "weights files": (weights_files, 2000, {"refused": 1 / 2, "passed": 1 / 50}),
}


def _runtime_version() -> tuple[int, ...]:
    return tuple(map(int, installed_version("onnxruntime").split(".")[:2]))


def test_there_are_at_least_10000_inputs() -> None:
    assert sum(count for _, count, _ in INPUTS.values()) >= 10_000


@pytest.mark.parametrize("name", INPUTS)
def test_each_is_refused_in_one_line_or_taken(
    name: str, bundle: Path, record_property: Callable[[str, Any], None]
) -> None:
    if name == "onnx files" and _runtime_version() < (1, 24):
        pytest.skip("ONNX Runtime before 1.24 ends the process, or loops, on damaged files")
    target, count, shares = INPUTS[name]
    outcome = fuzz(partial(target, bundle), count * TIMES)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.count == count * TIMES
    record_property("inputs", outcome.count)
    for word, share in shares.items():
        assert outcome.words.get(word, 0) >= share * count * TIMES, outcome.words
