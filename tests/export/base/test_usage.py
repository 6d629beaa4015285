"""What each step used is counted to it and to no other."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from export.base.usage import UsageMeter
from export.terminal.console import Progress, print_usage


def test_a_step_has_its_own_time_and_memory_and_that_of_its_processes() -> None:
    meter = UsageMeter()
    meter.end("start")
    large = bytearray(b"x") * 300_000_000
    del large
    meter.end("large")
    ends = time.process_time() + 0.2
    while time.process_time() < ends:
        pass
    meter.end("busy")
    work = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    meter.end("child")
    start, large_step, busy, child = meter.steps
    assert start.wall_s > 0 and start.cpu_s > 0
    assert busy.cpu_s >= 0.15 and child.cpu_s >= 0.25 and busy.wall_s >= 0.15
    assert large_step.peak_mb is not None and busy.peak_mb is not None
    assert large_step.peak_mb > busy.peak_mb + 200
    assert list(child.to_json()) == ["step", "cpu_s", "wall_s", "peak_mb"]


def test_the_table_has_each_step_once_it_is_done_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(measured=True) as progress:
        progress("first")
        progress("second")
    assert progress.usage is not None and [step.step for step in progress.usage.steps] == ["start", "first", "second"]
    print_usage(progress.usage.steps)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [words[0] for words in lines[3:]] == ["start", "first", "second", "all"]
    assert Progress().usage is None
