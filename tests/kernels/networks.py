"""Whole networks as the problems their fused operators have, in order and with repetitions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kernels.configs.selection import select_config
from kernels.configs.targets import Target
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.problems import ConvProblem, Problem, Projection

BATCHES = (1, 32)


def _network(batch: int, blocks: tuple[int, int, int, int], bottleneck: bool) -> list[Problem]:
    problems: list[Problem] = [StemProblem(ConvProblem(batch, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True))]
    c_in, size, expansion = 64, 56, 4 if bottleneck else 1
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        for block in range(count):
            stride, c_out = 2 if block == 0 and width > 64 else 1, width * expansion
            shortcut = Projection(c_in, size, size, (stride, stride)) if block == 0 and c_in != c_out else None
            first = ConvProblem(
                batch, width if bottleneck else c_in, size, size, width, (3, 3), (stride, stride), (1, 1), relu=True
            )
            if bottleneck:
                problems.append(ConvProblem(batch, c_in, size, size, width, (1, 1), relu=True))
                problems.append(BottleneckProblem(first, c_out, shortcut is None, shortcut, relu=True))
            else:
                second = replace(first, c_in=width, height=size // stride, width=size // stride, stride=(1, 1))
                problems += [first, replace(second, has_residual=shortcut is None, projection=shortcut)]
            c_in, size = c_out, size // stride
    return [*problems, HeadProblem(batch, c_in, 7, 7, 1000)]


NETWORKS: dict[str, Callable[[int], list[Problem]]] = {
    "resnet18": lambda batch: _network(batch, (2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda batch: _network(batch, (3, 4, 6, 3), bottleneck=True),
}

# Beside the two networks: every other shape of load and width of tile.
EXTRA: dict[str, Problem] = {
    "grouped-3x3": ConvProblem(8, 128, 56, 56, 128, (3, 3), padding=(1, 1), groups=32, relu=True),
    "resnext-3x3-s2": ConvProblem(8, 1024, 14, 14, 1024, (3, 3), (2, 2), (1, 1), groups=32, relu=True),
    "3x3-bf16": ConvProblem(32, 256, 14, 14, 256, (3, 3), padding=(1, 1), dtype=torch.bfloat16, relu=True),
    "1x1-residual-fp32": ConvProblem(
        8, 64, 56, 56, 256, (1, 1), dtype=torch.float32, has_residual=True, relu=True
    ),
    "7x7-unfused": ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True),
}  # fmt: skip


def hardest_problems(target: Target) -> list[Problem]:
    """Of the networks at every batch and the extra cases: what to compile to have seen every kind of code.

    One problem for each kernel, tile, number of warps, way of loading and loop there is; of those that share them the
    one with a residual and the longest reduction, which needs most registers.
    """
    networks = [problem for network in NETWORKS.values() for batch in BATCHES for problem in network(batch)]
    hardest: dict[tuple[Any, ...], tuple[tuple[Any, ...], Problem]] = {}
    for problem in dict.fromkeys([*networks, *EXTRA.values()]):
        for launch in select_config(problem, target).launches(problem, target):
            s = launch.scalars
            tile = tuple(value for name, value in s.items() if name.startswith("BLOCK_"))
            loop = (s.get("R", 1) > 1, s.get("GROUPS", 1) > 1, s.get("SPLIT_K", 1) > 1, s.get("HAS_PROJECTION"))
            loads = (launch.uses_boxes, problem.loads_are_vectors, problem.dtype)
            key = (launch.kernel, tile, launch.options["num_warps"], loop, loads)
            needs = (s.get("HAS_RESIDUAL", False), s.get("R", 1) * s["C_IN"])
            if key not in hardest or needs > hardest[key][0]:
                hardest[key] = needs, launch.problem
    return [problem for _, problem in hardest.values()]
