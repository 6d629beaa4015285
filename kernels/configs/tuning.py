"""Search for the fastest configuration of a problem: from the heuristic's, one change at a time, while it helps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kernels.configs.config import (
    BottleneckConfig,
    Config,
    ConvConfig,
    PairConfig,
    unsupported_reason,
)
from kernels.configs.heuristic import box_of, heuristic_config
from kernels.configs.targets import Target
from kernels.problems import BottleneckProblem, ConvProblem, Problem

# Seconds of one launch, or None where the kernel cannot be compiled or its result is wrong.
Measure = Callable[[Problem, Config], float | None]
# A change must win by more than two timings of the same kernel differ.
_NOISE = 0.01


def tune(problem: Problem, target: Target, measure: Measure) -> tuple[Config, float, int]:
    """The fastest configuration found for `problem`, its time in seconds, and how many were measured.

    A bottleneck is tuned as one kernel and as two, and the faster way is taken.

    Raises:
        ValueError: no configuration can run the problem, or the heuristic's gives a wrong result.
    """
    starts = [heuristic_config(problem, target)]
    measured = 0
    if isinstance(problem, BottleneckProblem):
        parts = [tune(part, target, measure) for part in (problem.first, problem.second)]
        measured = sum(count for _, _, count in parts)
        first, second = (config for config, _, _ in parts)
        assert isinstance(first, ConvConfig) and isinstance(second, ConvConfig)
        starts = [PairConfig(first, second), *_fused_starts(problem, target)]
    times: dict[Config, float | None] = {}

    def seconds(config: Config) -> float | None:
        if config not in times:
            times[config] = measure(problem, config)
        return times[config]

    best: tuple[float, Config] | None = None
    for start in starts:
        found = _descend(start, problem, target, seconds)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        raise ValueError(f"no configuration of {problem} gives a right result on {target.name}")
    return best[1], best[0], measured + len(times)


def _descend(
    start: Config, problem: Problem, target: Target, seconds: Callable[[Config], float | None]
) -> tuple[float, Config] | None:
    """From `start`, move to the first faster neighbour until none is."""
    now = seconds(start)
    if now is None:
        return None
    config, improved = start, True
    while improved:
        improved = False
        for neighbour in neighbours(problem, config, target):
            trial = seconds(neighbour)
            if trial is not None and trial < now * (1 - _NOISE):
                config, now, improved = neighbour, trial, True
                break
    return now, config


def _fused_starts(problem: BottleneckProblem, target: Target) -> list[Config]:
    """One valid fused configuration, with boxes where the target has them and without."""
    starts: list[Config] = []
    for box in (True, False):
        for block_m, num_warps in ((128, 8), (64, 8), (64, 4), (32, 8)):
            tile = box_of(problem.first, block_m) if box else None
            config = BottleneckConfig(block_m, 64, 32, num_warps, 2, box=tile)
            if unsupported_reason(problem, config, target) is None:
                starts.append(config)
                break
    return starts


def neighbours(problem: Problem, config: Config, target: Target) -> Iterator[Config]:
    """Every valid configuration that differs from `config` in one decision."""
    if isinstance(config, PairConfig):
        return
    for candidate in _changes(problem, config):
        if unsupported_reason(problem, candidate, target) is None:
            yield candidate


def _changes(problem: Problem, config: Config) -> Iterator[Config]:
    for name in ("block_m", "block_q", "block_n", "block_k", "num_warps", "pool_rows"):
        value = getattr(config, name, None)
        if value is not None:
            for other in (value * 2, value // 2):
                yield from _with(problem, config, name, other)
    if hasattr(config, "num_stages"):
        for other in (config.num_stages + 1, config.num_stages - 1):
            yield from _with(problem, config, "num_stages", other)
    if isinstance(config, (ConvConfig, BottleneckConfig)):
        conv = problem.first if isinstance(problem, BottleneckProblem) else problem
        assert isinstance(conv, ConvProblem)
        yield replace(config, box=None if config.box else box_of(conv, config.block_m))
    if isinstance(config, ConvConfig):
        if config.box is None:
            for other in (config.split_k * 2, config.split_k // 2):
                yield from _with(problem, config, "split_k", other)
        for programs in {0, 1, 2} - {config.programs_per_sm} if config.box else ():
            yield replace(config, programs_per_sm=programs)


def _with(problem: Problem, config: Config, name: str, value: int) -> Iterator[Config]:
    """`config` with one size changed, and its box with the rows."""
    if value < 1:
        return
    changes: dict[str, Any] = {name: value}
    changed = replace(config, **changes)
    if name == "block_m" and isinstance(changed, (ConvConfig, BottleneckConfig)) and changed.box is not None:
        conv = problem.first if isinstance(problem, BottleneckProblem) else problem
        assert isinstance(conv, ConvProblem)
        changed = replace(changed, box=box_of(conv, value))
    yield changed
