"""A problem and its configuration as kernel launches: everything but the tensors.

launch.py runs these launches, compile.py builds the same kernels without a GPU.
"""

import functools
import importlib
from typing import Any

from kernels.configs.config import Config, KernelLaunch
from kernels.configs.targets import Target
from kernels.problems import Problem


def plan(problem: Problem, config: Config, target: Target | None) -> tuple[KernelLaunch, ...]:
    """The launches of `problem` under a configuration that is valid for it, in order. No target: the interpreter."""
    return config.launches(problem, target)


def kernel_of(launch: KernelLaunch) -> Any:
    """The @triton.jit function that a launch names."""
    return _kernel(launch.kernel)


@functools.cache
def _kernel(name: str) -> Any:
    module, function = name.split(".")
    return getattr(importlib.import_module(f"kernels.jit.{module}"), function)
