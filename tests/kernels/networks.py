"""Whole networks as the problems their fused operators have, in order and with repetitions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from export import Batch, FusedProgram, fuse
from export.base.precision import PRECISIONS
from export.benchmark.workload import fused_workload
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.problems import ConvProblem, Problem
from resnet.models import create_model
from tests.effort import TIMES

BATCHES = (1, 32)
# What is compiled, by instructions: sm_100 is a larger sm_110, sm_121 a smaller sm_120. With more effort each alone.
_ALIKE = (("sm_80", "sm_86", "sm_87", "sm_89"), ("sm_90",), ("sm_110",), ("sm_120",))
COMPILED = _ALIKE if TIMES == 1 else tuple((name,) for names in _ALIKE for name in names)


@functools.cache
def _fused(name: str) -> FusedProgram:
    return fuse(create_model(name).eval(), torch.zeros(1, 3, 224, 224), Batch(1, 1, 256))


def problems_of(name: str, batch: int) -> list[Problem]:
    """Of a network's fused operators, which are all of it, in float16."""
    works = fused_workload(_fused(name), PRECISIONS["fp16"], batch)
    return [work.problem for work in works if work.problem is not None]


NETWORKS: dict[str, Callable[[int], list[Problem]]] = {
    name: functools.partial(problems_of, name) for name in ("resnet18", "resnet50")
}

# Beside the two networks: every other shape of load and width of tile.
EXTRA: dict[str, Problem] = {
    "grouped-3x3": ConvProblem(8, 128, 56, 56, 128, (3, 3), padding=(1, 1), groups=32, relu=True),
    "resnext-3x3-s2": ConvProblem(8, 1024, 14, 14, 1024, (3, 3), (2, 2), (1, 1), groups=32, relu=True),
    "3x3-bf16": ConvProblem(32, 256, 14, 14, 256, (3, 3), padding=(1, 1), dtype=torch.bfloat16, relu=True),
    "1x1-residual-fp32": ConvProblem(
        8, 64, 56, 56, 256, (1, 1), dtype=torch.float32, has_residual=True, relu=True
    ),
    "stem-odd-width": StemProblem(ConvProblem(8, 3, 223, 223, 64, (7, 7), (2, 2), (3, 3), relu=True)),
    "7x7-unfused": ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True),
}  # fmt: skip


def hardest_problems(targets: Sequence[str]) -> dict[Target, list[Problem]]:
    """Of the networks at every batch and the extra cases: what to compile, for which of targets that are alike.

    One problem for each kernel, tile, number of warps, way of loading and loop that any of them launches; of those that
    share them the one with a residual and the longest reduction, which needs most registers.
    """
    networks = [problem for network in NETWORKS.values() for batch in BATCHES for problem in network(batch)]
    hardest: dict[tuple[Any, ...], tuple[tuple[Any, ...], Target, Problem]] = {}
    for target in map(TARGETS.__getitem__, targets):
        for problem in dict.fromkeys([*networks, *EXTRA.values()]):
            for launch in select_config(problem, target).launches(problem, target):
                s = launch.scalars
                tile = tuple(value for name, value in s.items() if name.startswith("BLOCK_"))
                loop = (s.get("R", 1) > 1, s.get("GROUPS", 1) > 1, s.get("SPLIT_K", 1) > 1, s.get("HAS_PROJECTION"))
                loads = (launch.uses_boxes, problem.loads_are_vectors, problem.dtype)
                key = (launch.kernel, tile, launch.options["num_warps"], loop, loads)
                needs = (s.get("HAS_RESIDUAL", False), s.get("R", 1) * s.get("C_IN", s.get("MAIN", 0)))
                if key not in hardest or needs > hardest[key][0]:
                    hardest[key] = needs, target, launch.problem
    found: dict[Target, list[Problem]] = {}
    for _, target, problem in hardest.values():
        found.setdefault(target, []).append(problem)
    return found
