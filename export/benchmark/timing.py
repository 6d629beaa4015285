"""Runners on the clock: in turns, with inputs in rotation, one forward pass at a time."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from export.benchmark.runners import WARM_UP
from export.runtime.engines.runner import EngineRunner
from export.runtime.runner import TimedRunner

_IDLE_SECONDS = 0.05  # after a run the threads of a CPU runtime spin for a while, which would slow the next one


@dataclass(frozen=True)
class Clock:
    """How a device is timed.

    Attributes:
        turn: runs a runner so many times on inputs in rotation; returns the seconds of each run.
        rounds: turns of each runner.
        seconds: timed per runner, about.
    """

    turn: Callable[[TimedRunner, Iterator[Tensor], int], list[float]]
    rounds: int
    seconds: float


def cpu_turn(runner: TimedRunner, inputs: Iterator[Tensor], count: int) -> list[float]:
    """After a pause and a run that does not count, time `count` runs by the wall clock."""
    time.sleep(_IDLE_SECONDS)
    runner.load(next(inputs))
    runner.step()
    seconds = []
    for _ in range(count):
        runner.load(next(inputs))
        started = time.perf_counter()
        runner.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def cuda_turn(runner: TimedRunner, inputs: Iterator[Tensor], count: int) -> list[float]:
    """Time `count` runs by CUDA events, each behind a run on the same input that does not count.

    While the device is busy with that one, the timed one is launched: its time is the device's, unless launching takes
    longer than running, as it does for an eager model and a small batch. An engine runs elsewhere and is timed there in
    the same way, on one input a turn.
    """
    if isinstance(runner, EngineRunner):
        runner.load(next(inputs).float().contiguous().cpu().numpy())
        return runner.time(count)
    events = []
    for _ in range(count):
        runner.load(next(inputs))
        runner.step()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        runner.step()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def graph_seconds(launches: Sequence[Callable[[], object]], replays: int) -> list[float]:
    """Seconds of one launch, on average over all, of each replay of a CUDA graph in which they follow each other.

    In a graph: launching from Python takes longer than the smallest kernels run. Each has run before it is recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + replays + 1)]
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 / len(launches) for a, b in itertools.pairwise(events[WARM_UP:])]


CPU_CLOCK = Clock(cpu_turn, rounds=10, seconds=3.0)
CUDA_CLOCK = Clock(cuda_turn, rounds=20, seconds=0.5)  # some 200 runs of what takes 2.5 ms


def measure(runners: Mapping[str, TimedRunner], inputs: Sequence[Tensor], clock: Clock) -> dict[str, list[float]]:
    """Seconds of every run: the runners take turns, and each round another one begins."""
    rotation = {name: itertools.cycle(inputs) for name in runners}
    counts = {}
    for name, runner in runners.items():
        once = statistics.median(clock.turn(runner, rotation[name], WARM_UP))
        counts[name] = max(1, math.ceil(clock.seconds / clock.rounds / once))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    order = deque(runners)
    for _ in range(clock.rounds):
        for name in order:
            seconds[name] += clock.turn(runners[name], rotation[name], counts[name])
        order.rotate(-1)
    return seconds
