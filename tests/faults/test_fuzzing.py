"""The fuzzing itself: whatever an input makes a function do is seen, and blamed on that input."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.fuzzing import fuzz


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
