"""What this process has used so far, of processor time and memory."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of what can be written to _CLEAR


@dataclass(frozen=True)
class StepUsage:
    """What one step of a run used.

    Attributes:
        step: its name.
        cpu_s: user and system time of this process, and of those it has waited for.
        wall_s: seconds from its begin to its end.
        peak_mb: the most resident memory of this process while it ran, in MB of 10^6 bytes; None where the system does
            not say, which is anything but Linux.
    """

    step: str
    cpu_s: float
    wall_s: float
    peak_mb: float | None

    def to_json(self) -> dict[str, Any]:
        peak = None if self.peak_mb is None else round(self.peak_mb)
        return {"step": self.step, "cpu_s": round(self.cpu_s, 2), "wall_s": round(self.wall_s, 2), "peak_mb": peak}


class UsageMeter:
    """Measures one step after the other; the first begins with the process."""

    def __init__(self) -> None:
        self.steps: list[StepUsage] = []
        self._cpu, self._wall = 0.0, time.perf_counter() - _age()

    def end(self, step: str) -> None:
        """Count what was used since the last step ended to `step`."""
        cpu, wall = sum(os.times()[:4]), time.perf_counter()
        self.steps.append(StepUsage(step, cpu - self._cpu, wall - self._wall, _peak()))
        self._cpu, self._wall = cpu, wall


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return 0.0


def _peak() -> float | None:
    """MB since the last call, which forgets them."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    with suppress(OSError):  # without the right to write there it is the peak since the beginning
        _CLEAR.write_text(_RESET_PEAK)
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), None)
