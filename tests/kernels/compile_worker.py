"""Compiles every distinct kernel of the networks for the targets named on the command line; prints JSON.

A process of its own, because Triton's interpreter, in which the other tests run, cannot be switched off again.
"""

import json
import sys
from typing import Any

from kernels.compile import code_key, compile_kernel
from kernels.config import shared_memory_bound
from kernels.heuristic import heuristic_config
from kernels.plan import KernelLaunch, plan
from kernels.selection import problem_key
from kernels.targets import TARGETS, Target
from tests.kernels.networks import BATCHES, EXTRA, NETWORKS


def launches(target: Target) -> list[KernelLaunch]:
    """One of each code that the networks and the extra cases run. By the rules: tuned entries were timed on a GPU."""
    networks = [problem for network in NETWORKS.values() for batch in BATCHES for problem in network(batch)]
    distinct: dict[Any, KernelLaunch] = {}
    for problem in dict.fromkeys([*networks, *EXTRA.values()]):
        for launch in plan(problem, heuristic_config(problem, target), target):
            distinct.setdefault(code_key(launch), launch)
    return list(distinct.values())


def compiled(launch: KernelLaunch, target: Target) -> dict[str, Any]:
    kernel = compile_kernel(launch, target)
    return {
        "what": f"{launch.kernel.__name__} for {problem_key(launch.problem)} as {launch.config}",
        "kernel": launch.kernel.__name__,
        "faults": kernel.faults,
        "shared_bytes": kernel.shared_bytes,
        "shared_bound": shared_memory_bound(launch.problem, launch.config),
        "registers": kernel.registers,
        "cubin_bytes": len(kernel.cubin),
    }


def main(names: list[str]) -> None:
    targets = [TARGETS[name] for name in names]
    report = {target.name: [compiled(launch, target) for launch in launches(target)] for target in targets}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
