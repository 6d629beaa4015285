"""One small launch of each way there is to run a kernel, which the interpreter, the emulator and a GPU all run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

import kernels.jit
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemWindowsConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, PairConfig
from kernels.operators.mean_linear import HeadConfig, HeadProblem
from kernels.problems import Problem
from tests.kernels.cases import ONE_OF_EACH, SMALL, STEM_CASES

JIT_FILES = sorted(Path(kernels.jit.__file__).parent.glob("*.py"))
# `file.function`. What lies between operators is tests/kernels/between's, and executed where kernel engines are.
FUSED_KERNELS = {
    f"{path.stem}.{name}"
    for path in JIT_FILES
    if path.stem not in ("elementwise", "pooling")
    for name in re.findall(r"def (_\w+_kernel)\(\n", path.read_text())
}
GATHERED = ConvConfig(64, 32, 32, 4, 3)
HELD = replace(GATHERED, block_n=64)  # wide enough to leave HMMA's registers as it is held there
BOXES = ConvConfig(64, 64, 32, 4, 3, box=(1, 8, 8))  # of 64 filters: fewer are no rows for sm_90's tensor cores
FUSED = BottleneckConfig(64, 32, 32, 4, 2)
WIDE = replace(SMALL, c_in=64)
DEEP = replace(SMALL, c_in=256, height=3, width=4)
HEAD = HeadProblem(5, 70, 4, 4, 33)  # of 16 pixels: a mean over 49 is rounded however whole it is
# None: the configuration that the rules choose for the target.
FAMILIES: dict[str, tuple[Problem, Config | None]] = {
    "gathered": (SMALL, GATHERED),
    "gathered-held": (SMALL, HELD),
    "gathered-wide-slices": (WIDE, replace(GATHERED, block_k=64)),
    "gathered-slices-of-128": (DEEP, ConvConfig(64, 32, 128, 4, 2)),
    "gathered-groups": (replace(SMALL, groups=2), replace(GATHERED, block_k=16)),
    "gathered-split": (SMALL, replace(HELD, split_k=3)),
    "gathered-projection": (ONE_OF_EACH["projection"], HELD),
    "boxes": (SMALL, BOXES),
    "boxes-wide-slices": (WIDE, replace(BOXES, block_k=64)),
    "boxes-dense": (replace(SMALL, kernel=(1, 1), padding=(0, 0)), replace(BOXES, block_n=32, box=(1, 1, 64))),
    "boxes-persistent": (replace(SMALL, batch=4), replace(BOXES, programs_per_sm=1)),
    "boxes-split": (SMALL, replace(BOXES, split_k=3)),
    "boxes-slices-of-128": (DEEP, ConvConfig(64, 64, 128, 4, 2, box=(4, 4, 4))),
    "boxes-projection": (ONE_OF_EACH["projection"], replace(BOXES, block_k=16)),
    "bottleneck": (ONE_OF_EACH["bottleneck-residual"], FUSED),
    "bottleneck-projection": (ONE_OF_EACH["bottleneck-projection"], FUSED),
    "bottleneck-boxes": (ONE_OF_EACH["bottleneck-projection"], replace(FUSED, box=(1, 8, 8))),
    "pair": (ONE_OF_EACH["bottleneck-residual"], PairConfig(GATHERED, replace(GATHERED, split_k=2))),
    "stem": (ONE_OF_EACH["stem"], StemConfig(32, 64, 32, 2, 4, 2)),
    "stem-windows": (STEM_CASES["resnet-even"].with_batch(1), StemWindowsConfig(32, 64, 32, 2, 4, 2)),
    "head": (HEAD, None),
    "head-shares": (HEAD, HeadConfig(4, 16, 16, 4, shares=2)),
}


def family(name: str, dtype: torch.dtype, target: Target | None) -> tuple[Problem, Config] | None:
    """A family's problem and configuration; None where the target cannot run it. No target: the interpreter."""
    problem, config = FAMILIES[name]
    problem = problem.with_dtype(dtype)
    if config is None:
        config = select_config(problem, target or TARGETS["sm_90"])
    return (problem, config) if config.unsupported_reason(problem, target) is None else None


def device_of(name: str, target: str) -> Target:
    """A target; for a persistent kernel, which goes round only where blocks are more than multiprocessors, with few."""
    return replace(TARGETS[target], multiprocessors=2) if "persistent" in name else TARGETS[target]
