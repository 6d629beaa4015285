"""Few configurations for each layer that cover a range of batch sizes: each is machine code to compile and to ship.

The rules, or the tuned table, choose for the smallest, the optimal and the largest batch; which of these a batch runs
is decided by their predicted times, and one that saves next to nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from export.base.batch import Batch
from export.base.errors import ExportError
from export.lowering.kernel_code import Code, CodeRequest, code_name, compile_codes, launch_key
from kernels.configs.config import Config, KernelLaunch
from kernels.configs.selection import select_config
from kernels.configs.targets import Target
from kernels.plan import plan
from kernels.problems import Problem

# A configuration is dropped where the others take longer by less than this share, on average and at most.
_WORTH, _WORTH_ONCE = 0.02, 0.1
_EVERY_SIZE_TO = 32
_STEPS = 8  # batch sizes from one power of two to the next, beyond that

Track = tuple[tuple[int, Problem], ...]  # (batch size, what a layer asks for at it)


@dataclass(frozen=True)
class Cover:
    """What every batch size launches.

    Attributes:
        configs: batch size -> the configuration of each call.
        codes: by `code_name`, all that are launched.
        predicted: batch size -> seconds of all launches together, of some sizes.
    """

    configs: Mapping[int, tuple[Config, ...]]
    codes: Mapping[str, Code]
    predicted: Mapping[int, float]


def batch_sizes(batch: Batch) -> list[int]:
    """The sizes that get a table of their own; what lies between runs as the next larger one.

    Every size up to 32; beyond that eight between a power of two and the next, of which an eighth at most is wasted.
    """
    sizes, size = [], batch.minimum
    while size < batch.maximum:
        sizes.append(size)
        step = max(1, (1 << size.bit_length()) // (2 * _STEPS)) if size >= _EVERY_SIZE_TO else 1
        size = (size // step + 1) * step
    return sorted({*sizes, batch.optimum, batch.maximum})


def cover(problems: Mapping[int, Sequence[Problem]], batch: Batch, target: Target) -> Cover:
    """The configurations and machine code with which a target runs these problems.

    Args:
        problems: batch size -> what its calls ask for, in order.

    Raises:
        ExportError: no configuration runs one of them, or it does not compile.
    """
    powers = {1 << exponent for exponent in range(batch.maximum.bit_length())}
    anchors = {batch.minimum, batch.optimum, batch.maximum}
    samples = sorted((anchors | powers) & problems.keys())
    tracks = [track for tracks in _tracks(problems).values() for track in tracks]
    candidates = {track: _candidates(track, anchors, target) for track in tracks}
    requests: dict[str, CodeRequest] = {}
    for track, configs in candidates.items():
        for size, problem in track:
            for config in configs:
                if size in samples and not config.unsupported_reason(problem, target):
                    _request(requests, plan(problem, config, target), target, predicted=True)
    codes = compile_codes(requests, target)

    def seconds(problem: Problem, config: Config) -> float:
        if config.unsupported_reason(problem, target):
            return math.inf
        launches = plan(problem, config, target)
        return sum(codes[code_name(launch, target)].floors[launch_key(launch)] for launch in launches)

    chosen: dict[Track, dict[int, Config]] = {}
    for track, configs in candidates.items():
        costs = {size: {c: seconds(problem, c) for c in configs} for size, problem in track if size in samples}
        chosen[track] = _assigned(track, _worthwhile(configs, costs), costs, target)
    per_batch = {size: tuple(chosen[track][size] for track in tracks_of) for size, tracks_of in _by_size(problems)}
    final: dict[str, CodeRequest] = {}
    for size, configs_of in per_batch.items():
        for problem, config in zip(problems[size], configs_of, strict=True):
            _request(final, plan(problem, config, target), target, predicted=False)
    codes |= compile_codes({name: request for name, request in final.items() if name not in codes}, target)
    predicted = {
        size: sum(seconds(problem, config) for problem, config in zip(problems[size], per_batch[size], strict=True))
        for size in samples
    }
    return Cover(per_batch, {name: codes[name] for name in final}, predicted)


def _tracks(problems: Mapping[int, Sequence[Problem]]) -> dict[int, list[Track]]:
    """Number of calls -> a track for each of them: batch sizes with as many calls have the same layers."""
    found = {}
    for count in {len(calls) for calls in problems.values()}:
        alike = {size: calls for size, calls in problems.items() if len(calls) == count}
        found[count] = [tuple((size, calls[i]) for size, calls in alike.items()) for i in range(count)]
    return found


def _by_size(problems: Mapping[int, Sequence[Problem]]) -> Iterator[tuple[int, list[Track]]]:
    tracks = _tracks(problems)
    for size, calls in problems.items():
        yield size, tracks[len(calls)]


def _candidates(track: Track, anchors: set[int], target: Target) -> list[Config]:
    wanted = [problem for size, problem in track if size in anchors] or [problem for _, problem in track]
    try:
        return [*dict.fromkeys(select_config(problem, target) for problem in wanted)]
    except ValueError as error:
        raise ExportError(str(error)) from error


def _request(
    requests: dict[str, CodeRequest], launches: Sequence[KernelLaunch], target: Target, *, predicted: bool
) -> None:
    for launch in launches:
        name = code_name(launch, target)
        known = requests.get(name, CodeRequest(launch))
        keys = {launch_key(one) for one in known.predicted}
        more = (launch,) if predicted and launch_key(launch) not in keys else ()
        requests[name] = CodeRequest(known.launch, (*known.predicted, *more))


def _worthwhile(configs: Sequence[Config], costs: Mapping[int, Mapping[Config, float]]) -> list[Config]:
    """The fewest of the configurations whose absence would cost time."""
    kept = [*configs]
    best = {size: min(cost.values()) for size, cost in costs.items()}

    def loss(without: Config) -> tuple[float, float]:
        others = [config for config in kept if config is not without]
        losses = [min(cost[c] for c in others) / best[size] - 1 for size, cost in costs.items()]
        return sum(losses) / len(losses), max(losses)

    while len(kept) > 1 and all(math.isfinite(value) for value in best.values()):
        losses = {config: loss(config) for config in kept}
        least = min(losses, key=losses.__getitem__)
        if not (losses[least][0] <= _WORTH and losses[least][1] <= _WORTH_ONCE):
            break
        kept.remove(least)
    return kept


def _assigned(
    track: Track, kept: Sequence[Config], costs: Mapping[int, Mapping[Config, float]], target: Target
) -> dict[int, Config]:
    """Batch size -> the configuration that is fastest at the nearest size whose time was predicted."""
    found = {}
    for size, problem in track:
        near = min(costs, key=lambda sample: abs(math.log(sample / size))) if costs else None
        order = sorted(kept, key=lambda config: costs[near][config]) if near is not None else kept
        valid = [config for config in order if not config.unsupported_reason(problem, target)]
        found[size] = valid[0] if valid else select_config(problem, target)
    return found
