"""Every kernel of the networks in resnet/ as the rules launch it, the first, middle and last blocks of each executed.

    make test-kernels
    python -m tests.emulator.networks --targets sm_87 --networks resnet50 --batches 1

Prints a line for each kernel and a table at the end. Exit code 1: a result is outside P1, or a hazard was found.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from export import Batch, fuse
from export.base.precision import PRECISIONS
from export.benchmark.workload import fused_workload
from kernels.configs.config import Config, KernelLaunch
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.conv2d_conv1x1_bias_act import PairConfig
from kernels.oracle import make_inputs, oracle, p1_failures
from kernels.plan import plan
from kernels.problems import Problem
from resnet.models import MODELS, create_model
from tests.emulator.block import UnknownInstruction
from tests.emulator.compiling import Compiler
from tests.emulator.running import emulate
from tests.emulator.traffic import new_traffic

_EXECUTED = ("sm_87", "sm_90", "sm_120", "sm_110", "sm_121")


def problems(network: str, batch: int) -> list[Problem]:
    """Of a network's fused operators in float16, each once."""
    size = MODELS[network].image_size
    program = fuse(create_model(network).eval(), torch.zeros(1, 3, size, size), Batch(1, 1, 256))
    works = fused_workload(program, PRECISIONS["fp16"], batch)
    return [*dict.fromkeys(work.problem for work in works if work.problem is not None)]


def launches(network_problems: Sequence[Problem], target: Target) -> Iterator[tuple[Problem, Config]]:
    """With the configurations of the rules; what runs as two kernels as two."""
    for problem in network_problems:
        config = select_config(problem, target)
        if isinstance(config, PairConfig):
            yield from zip(problem.parts, (config.first, config.second), strict=True)
        else:
            yield problem, config


def sample(launch: KernelLaunch) -> list[int]:
    """The first, middle and last tile's blocks: all that share its sum."""
    splits, shares = (launch.scalars.get(name, 1) for name in ("SPLIT_K", "SHARES"))
    tiles = math.prod(launch.grid) // splits
    first = [tile // shares * splits * shares + tile % shares for tile in sorted({0, tiles // 2, tiles - 1})]
    return [block + split * shares for block in first for split in range(splits)]


@dataclass
class Outcome:
    """Of one kernel: blocks executed and in the grid, sectors of global memory over the fewest that could do."""

    blocks: int = 0
    grid: int = 0
    faults: tuple[str, ...] = ()
    sectors: float = 1.0
    unknown: str = ""


def execute(problem: Problem, config: Config, target: Target, compiler: Compiler) -> Outcome:
    inputs, traffic = make_inputs(problem), new_traffic()
    try:
        found = emulate(plan(problem, config, target), target, inputs, compiler, blocks=sample, traffic=traffic)
    except UnknownInstruction as unknown:
        return Outcome(unknown=str(unknown))
    except BrokenProcessPool:
        compiler.restart()
        return Outcome(unknown=f"Triton does not compile for {target.name}")
    (pre, sigma), faults = oracle(problem, inputs), ["nothing written"]
    if found.written.any():
        faults = p1_failures(found.y[found.written], problem, inputs, (pre[found.written], sigma[found.written]))
    requests = [counts for (space, _, _), counts in traffic.items() if space == "global"]
    sectors = sum(c["sectors"] for c in requests) / max(1, sum(c["ideal"] for c in requests))
    blocks, grid = sum(launch.blocks for launch in found.ran), sum(launch.grid for launch in found.ran)
    return Outcome(blocks, grid, (*found.defects, *faults), sectors)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=_EXECUTED)
    parser.add_argument("--networks", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    wanted = [*dict.fromkeys(p for network in args.networks for b in args.batches for p in problems(network, b))]
    tasks = [(target, *one) for name in args.targets for target in [TARGETS[name]] for one in launches(wanted, target)]
    tasks = [*dict.fromkeys(tasks)]
    totals: dict[str, Counter[str]] = {name: Counter() for name in args.targets}
    compiler = Compiler()
    for number, (target, problem, config) in enumerate(tasks, 1):
        start, counts = time.monotonic(), totals[target.name]
        outcome = execute(problem, config, target, compiler)
        counts["kernels"] += not outcome.unknown
        counts["not executed"] += bool(outcome.unknown)
        counts["faulty"] += bool(outcome.faults)
        counts["blocks"] += outcome.blocks
        counts["of"] += outcome.grid
        verdict = f"not executed: {outcome.unknown}" if outcome.unknown else "; ".join(outcome.faults) or "right"
        print(
            f"{number} of {len(tasks)}: {target.name} {problem.key}: {verdict}, {outcome.blocks} of {outcome.grid}"
            f" blocks, {outcome.sectors:.2f} sectors of 1, {time.monotonic() - start:.1f} s",
            flush=True,
        )
    compiler.close()
    print(f"\n{'target':8}{'kernels':>9}{'blocks':>9}{'of':>9}{'faulty':>9}{'not executed':>14}")
    for name, c in totals.items():
        print(f"{name:8}{c['kernels']:9}{c['blocks']:9}{c['of']:9}{c['faulty']:9}{c['not executed']:14}")
    return int(any(counts["faulty"] for counts in totals.values()))


if __name__ == "__main__":
    sys.exit(main())
