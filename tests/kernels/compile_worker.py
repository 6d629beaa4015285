"""Compiles every kernel of the networks and the extra cases for every target; prints what was found as JSON.

A process of its own, because Triton's interpreter, in which the other tests run, cannot be switched off again.
"""

import json

from kernels.compile import compile_problems
from kernels.configs.targets import TARGETS
from tests.kernels.networks import BATCHES, EXTRA, NETWORKS


def main() -> None:
    networks = [problem for network in NETWORKS.values() for batch in BATCHES for problem in network(batch)]
    problems = [*networks, *EXTRA.values()]
    print(json.dumps(compile_problems({target: problems for target in TARGETS.values()})))


if __name__ == "__main__":
    main()
