"""Ways of running one network, side by side: held against the float64 model, then taking turns on the clock."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.base.batch import Batch, run_in_batches
from export.base.errors import ExportError, first_line
from export.benchmark.candidates import COMPILED, Candidate, Subject
from export.benchmark.providers import WARM_UP, EngineProvider, Provider
from export.runtime.parity.network import NetworkCheck, compare, finite

QUANTILES = (0.2, 0.5, 0.8)
_IDLE_SECONDS = 0.05  # after a run the threads of a CPU runtime spin for a while, which would slow the next one


@dataclass(frozen=True)
class Clock:
    """How a device is timed.

    Attributes:
        turn: runs a provider so many times on inputs in rotation; returns the seconds of each run.
        rounds: turns of each provider.
        seconds: timed per provider, about.
    """

    turn: Callable[[Provider, Iterator[Tensor], int], list[float]]
    rounds: int
    seconds: float


def cpu_turn(provider: Provider, inputs: Iterator[Tensor], count: int) -> list[float]:
    """After a pause and a run that does not count, time `count` runs by the wall clock."""
    time.sleep(_IDLE_SECONDS)
    provider.load(next(inputs))
    provider.step()
    seconds = []
    for _ in range(count):
        provider.load(next(inputs))
        started = time.perf_counter()
        provider.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def cuda_turn(provider: Provider, inputs: Iterator[Tensor], count: int) -> list[float]:
    """Time `count` runs by CUDA events, each behind a run on the same input that does not count.

    While the device is busy with that one, the timed one is launched: its time is the device's, unless launching takes
    longer than running, as it does for an eager model and a small batch. An engine runs elsewhere and is timed there in
    the same way, on one input a turn.
    """
    if isinstance(provider, EngineProvider):
        provider.load(next(inputs))
        return provider.turn(count)
    events = []
    for _ in range(count):
        provider.load(next(inputs))
        provider.step()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        provider.step()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


CPU_CLOCK = Clock(cpu_turn, rounds=10, seconds=3.0)
CUDA_CLOCK = Clock(cuda_turn, rounds=20, seconds=1.0)


def measure(providers: Mapping[str, Provider], inputs: Sequence[Tensor], clock: Clock) -> dict[str, list[float]]:
    """Seconds of every run: the providers take turns, and each round another one begins."""
    rotation = {name: itertools.cycle(inputs) for name in providers}
    counts = {}
    for name, provider in providers.items():
        once = statistics.median(clock.turn(provider, rotation[name], WARM_UP))
        counts[name] = max(1, math.ceil(clock.seconds / clock.rounds / once))
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    order = deque(providers)
    for _ in range(clock.rounds):
        for name in order:
            seconds[name] += clock.turn(providers[name], rotation[name], counts[name])
        order.rotate(-1)
    return seconds


@dataclass(frozen=True)
class Row:
    """What came of one candidate. True unless it failed; one that cannot run here has not.

    Attributes:
        name: the candidate's.
        level: the candidate's.
        seconds: of each timed run, empty where it was not timed.
        check: of its outputs, the worse of the two made before and after timing; None where it did not run.
        reason: why it was not timed, or why its times do not count.
        failed: whether its outputs were wrong or it broke down.
    """

    name: str
    level: str
    seconds: tuple[float, ...] = ()
    check: NetworkCheck | None = None
    reason: str = ""
    failed: bool = False

    def __bool__(self) -> bool:
        return not self.failed


def compare_providers(
    candidates: Sequence[Candidate],
    subject: Subject,
    batch: int,
    inputs: Sequence[Tensor],
    clock: Clock,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Row]:
    """Check every candidate, time those that are right, and check them again.

    Args:
        candidates: in the order of the rows returned.
        batch: images per run.
        inputs: batches on the device, in rotation.
        progress: called with the name of each step as it begins.
    """
    rows, providers = {}, {}
    for candidate in candidates:
        progress(f"batch {batch}: prepare and check {candidate.name}")
        row = Row(candidate.name, candidate.level)
        try:
            provider = candidate.make(batch)
            row = _checked(row, check(provider, candidate, subject, batch))
        except ExportError as error:
            row = replace(row, reason=first_line(error))
        except Exception as error:  # what one provider does must not cost the others their result
            row = replace(row, reason=f"{type(error).__name__}: {first_line(error)}", failed=True)
        rows[candidate.name] = row
        if row.check is not None and row:
            providers[candidate.name] = provider
    progress(f"batch {batch}: time {len(providers)} providers in {clock.rounds} rounds")
    seconds = measure(providers, inputs, clock)
    progress(f"batch {batch}: check again")
    for candidate in candidates:
        if candidate.name in providers:
            row = replace(rows[candidate.name], seconds=tuple(seconds[candidate.name]))
            again = check(providers[candidate.name], candidate, subject, batch, backwards=True)
            rows[candidate.name] = _checked(row, again)
    return list(rows.values())


def check(
    provider: Provider, candidate: Candidate, subject: Subject, batch: int, backwards: bool = False
) -> NetworkCheck:
    """The worst of a provider's outputs on the parity images, in batches of the size that is timed.

    `backwards` gives the images in reverse order: an output left over from an earlier run differs.
    """
    r, order = candidate.references or subject.references, slice(None, None, -1 if backwards else 1)
    found = run_in_batches(provider.infer, r.images[order].copy(), Batch(batch, batch, batch), batch)
    outputs = {name: values[order] for name, values in found.items()}
    checks = compare(outputs, list(r.rounded.values()), r.oracle, candidate.factor, subject.precision.network_floor)
    return max(checks.values(), key=_severity)


def _checked(row: Row, found: NetworkCheck) -> Row:
    """A row with one more check; one that was refused has no times."""
    worse = found if row.check is None else max(row.check, found, key=_severity)
    if not found:
        when = "after timing: " if row.seconds else ""
        return replace(row, check=worse, reason=when + found.reason, failed=True, seconds=())
    return replace(row, check=worse)


def _severity(found: NetworkCheck) -> tuple[bool, float]:
    return not found, found.ratio


def describe(rows: Sequence[Row], batch: int, floors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every row in numbers, for JSON: milliseconds, images per second, and how many times as fast as others.

    Args:
        rows: the first is the eager model.
        floors: level -> seconds of the floor S.
    """
    medians = {row.name: statistics.median(row.seconds) for row in rows if row.seconds}
    eager = medians.get(rows[0].name)
    compiled = next((median for name, median in medians.items() if name.startswith(COMPILED)), None)
    records = []
    for row in rows:
        record: dict[str, Any] = {"provider": row.name, "batch": batch}
        record["status"] = "failed" if row.failed else "measured" if row.seconds else "not measured"
        record["reason"] = row.reason
        if row.check is not None:
            record["error"], record["error_ratio"] = finite(row.check.error), finite(row.check.ratio)
            record["error_limit"] = row.check.limit
        if row.seconds:
            low, median, high = (float(q) for q in np.quantile(row.seconds, QUANTILES))
            record |= {"runs": len(row.seconds), "median_ms": 1e3 * median, "p20_ms": 1e3 * low, "p80_ms": 1e3 * high}
            record["images_per_second"] = batch / median
            record["times_eager"] = eager / median if eager else None
            record["times_compiled"] = compiled / median if compiled else None
            if row.level in floors:
                record["floor_ms"] = 1e3 * floors[row.level]
                record["over_floor"] = median / floors[row.level]
        records.append(record)
    return records
