"""Whole networks as the problems their fused operators have, in order and with repetitions."""

from collections.abc import Callable
from typing import Any

import torch

from kernels.configs.selection import select_config
from kernels.configs.targets import Target
from kernels.operators.conv2d_bias_relu_maxpool import StemProblem
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckProblem
from kernels.operators.mean_linear import HeadProblem
from kernels.problems import ConvProblem, Problem, Projection

BATCHES = (1, 32)


def _stem(batch: int) -> StemProblem:
    return StemProblem(ConvProblem(batch, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True))


def resnet18(batch: int) -> list[Problem]:
    problems: list[Problem] = [_stem(batch)]
    c_in, size = 64, 56
    for width in (64, 128, 256, 512):
        for block in range(2):
            stride = 2 if block == 0 and width > 64 else 1
            shortcut = Projection(c_in, size, size, (2, 2)) if stride == 2 else None
            problems.append(ConvProblem(batch, c_in, size, size, width, (3, 3), (stride, stride), (1, 1), relu=True))
            c_in, size = width, size // stride
            problems.append(
                ConvProblem(
                    batch, width, size, size, width, (3, 3), padding=(1, 1), relu=True,
                    has_residual=shortcut is None, projection=shortcut,
                )
            )  # fmt: skip
    return [*problems, HeadProblem(batch, 512, 7, 7, 1000)]


def resnet50(batch: int) -> list[Problem]:
    problems: list[Problem] = [_stem(batch)]
    c_in, size = 64, 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            shortcut = Projection(c_in, size, size, (stride, stride)) if block == 0 else None
            problems.append(ConvProblem(batch, c_in, size, size, width, (1, 1), relu=True))
            first = ConvProblem(batch, width, size, size, width, (3, 3), (stride, stride), (1, 1), relu=True)
            problems.append(
                BottleneckProblem(first, 4 * width, has_residual=shortcut is None, projection=shortcut, relu=True)
            )
            c_in, size = 4 * width, size // stride
    return [*problems, HeadProblem(batch, 2048, 7, 7, 1000)]


NETWORKS: dict[str, Callable[[int], list[Problem]]] = {"resnet18": resnet18, "resnet50": resnet50}

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
