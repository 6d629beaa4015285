"""Search for the fastest configuration of a problem: from the heuristic's, one change at a time, while it helps."""

from collections.abc import Callable, Iterator

from kernels.configs.config import Config
from kernels.configs.heuristic import starting_configs
from kernels.configs.targets import Target
from kernels.problems import Problem

# Seconds of one launch, or None where the kernel cannot be compiled or its result is wrong.
Measure = Callable[[Problem, Config], float | None]
# A change must win by more than two timings of the same kernel differ.
_NOISE = 0.01


def tune(problem: Problem, target: Target, measure: Measure) -> tuple[Config, float, int]:
    """The fastest configuration found for `problem`, its time in seconds, and how many were measured.

    What can run as one kernel or as several is tuned both ways, and the faster one is taken.

    Raises:
        ValueError: no configuration can run the problem, or the heuristic's gives a wrong result.
    """
    parts = [tune(part, target, measure) for part in problem.parts]
    measured = sum(count for _, _, count in parts)
    times: dict[Config, float | None] = {}

    def seconds(config: Config) -> float | None:
        if config not in times:
            times[config] = measure(problem, config)
        return times[config]

    best: tuple[float, Config] | None = None
    for start in starting_configs(problem, target, [config for config, _, _ in parts]):
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


def neighbours(problem: Problem, config: Config, target: Target) -> Iterator[Config]:
    """Every valid configuration that differs from `config` in one decision."""
    for candidate in config.changes(problem):
        if candidate.unsupported_reason(problem, target) is None:
            yield candidate
