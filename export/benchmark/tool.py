"""What an export itself costs beside another one, in turn, each time in a new process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.base.errors import ExportError
from export.base.progress import Progress

ROUNDS = 3
SCRIPT = Path("scripts/export.py")
FIGURES = ("cpu_s", "wall_s", "peak_mb")
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Cost:
    """Of one run of a program and of all processes that it started.

    Attributes:
        cpu_s: user and system time.
        wall_s: from the start to the end.
        peak_mb: the most resident memory at any time, in MB of 10^6 bytes; a page that two of them share counts twice.
    """

    cpu_s: float
    wall_s: float
    peak_mb: float


def compare_checkouts(
    checkouts: Sequence[Path], arguments: Sequence[str], progress: Progress, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Run `scripts/export.py` with the same arguments in each checkout in turn; for JSON.

    Returns:
        The median of each figure of each checkout, and the last checkout's in units of the first one's.

    Raises:
        ExportError: an export ends with an error, or this is not Linux.
    """
    programs = {str(checkout): (checkout, (str(SCRIPT), *arguments)) for checkout in checkouts}
    return {"arguments": list(arguments), **compare_programs(programs, progress, "checkout", rounds)}


def compare_programs(
    programs: Mapping[str, tuple[Path, Sequence[str]]], progress: Progress, what: str, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Run each program in turn; for JSON.

    Args:
        programs: label -> the checkout in which Python runs, and its arguments; the flag of the output and a path
            that does not exist yet come behind them.
        progress: called with what is being done.
        what: the key of the label in each row.
        rounds: how often.

    Returns:
        The median of each figure of each program, and the last one's in units of the first one's.

    Raises:
        ExportError: a program ends with an error, or this is not Linux.
    """
    if not Path("/proc/self/status").is_file():
        raise ExportError("the memory of processes is read from /proc: expected Linux")
    costs: dict[str, list[Cost]] = {label: [] for label in programs}
    for number in range(rounds):
        for label, (checkout, arguments) in programs.items():
            progress(f"round {number + 1}: {label}")
            costs[label].append(cost_of(checkout, arguments))
    rows: list[dict[str, Any]] = [
        {what: label, **{f: statistics.median(getattr(cost, f) for cost in found) for f in FIGURES}}
        for label, found in costs.items()
    ]
    ratios = {figure: rows[-1][figure] / rows[0][figure] for figure in FIGURES}
    return {"rounds": rounds, "rows": rows, "ratios": ratios}


def cost_of(checkout: Path, arguments: Sequence[str]) -> Cost:
    """Of one run, whose result is thrown away and that finds nothing cached; raises ExportError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *arguments, "--output", str(Path(folder) / "bundle")]
        cache = str(Path(folder) / "cache")
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "XDG_CACHE_HOME": cache}
        with (Path(folder) / "log").open("w+b") as log:
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                peak, status, usage = _watch(process.pid)
            except BaseException:
                process.kill()
                process.wait()
                raise
            wall = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
                raise ExportError(f"the export in {checkout} fails: {said[-1]}")
    # Not usage.ru_maxrss: it counts the memory that this process had when it started the other.
    return Cost(usage.ru_utime + usage.ru_stime, wall, peak * 1024 / 1e6)


def _watch(pid: int) -> tuple[int, int, Any]:
    """Wait for a process: the most memory that it and its descendants had, in KiB, its status and its usage."""
    peak = 0
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return peak, status, usage
        memory = [_memory(member) for member in _tree(pid)]
        peak = max(peak, sum(now for now, _ in memory), *(most for _, most in memory))
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):  # it has just ended
                found += map(int, tasks.read_text().split())
    return found


def _memory(pid: int) -> tuple[int, int]:
    """What a process has and the most that it had, KiB; none of one that has ended."""
    with suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found = {words[0]: int(words[1]) for words in lines if words[0] in ("VmRSS:", "VmHWM:")}
        return found.get("VmRSS:", 0), found.get("VmHWM:", 0)
    return 0, 0
