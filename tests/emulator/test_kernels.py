"""What the compiler makes of the kernels, executed: right, and free of races and of reads of what nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from kernels.configs.config import Config
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.activations import ACTIVATIONS
from kernels.oracle import make_inputs, p1_failures
from kernels.plan import plan
from kernels.problems import Problem
from tests.effort import TIMES
from tests.emulator.conftest import Run
from tests.kernels.cases import CASES, DTYPES, ODD, SMALL
from tests.kernels.families import FAMILIES, FUSED_KERNELS, GATHERED, device_of, family
from tests.kernels.whole_numbers import expected_of, integers

EXECUTED = ("sm_87", "sm_90", "sm_120")


def targets_of(name: str) -> list[str]:
    return [target for target in EXECUTED if family(name, torch.float16, TARGETS[target])]


def cells() -> Iterator[tuple[str, str, str]]:
    """(family, target, dtype): every family on every target that runs it and in every dtype, not in all pairs of them.

    With more effort, in all.
    """
    for first, name in enumerate(FAMILIES):
        targets = targets_of(name)
        spread = [(targets[k % len(targets)], [*DTYPES][(first + k) % 3]) for k in range(3)]
        for target, dtype in spread if TIMES == 1 else product(targets, DTYPES):
            if family(name, DTYPES[dtype], TARGETS[target]):
                yield name, target, dtype


def launched(name: str, dtype: torch.dtype, target: str) -> tuple[Problem, Config, Target]:
    device = device_of(name, target)
    found = family(name, dtype, device)
    assert found is not None
    return *found, device


def on_targets(names: list[str]) -> list[tuple[str, str]]:
    """Each on one target, in turn."""
    return [(name, EXECUTED[index % len(EXECUTED)]) for index, name in enumerate(names)]


def assert_right(problem: Problem, config: Config, target: Target, run: Run) -> None:
    inputs = make_inputs(problem)
    found = run(plan(problem, config, target), target, inputs)
    assert found.defects == []
    assert p1_failures(found.y, problem, inputs) == []


def test_every_kernel_and_way_of_running_is_executed_in_every_type() -> None:
    assert {(name, dtype) for name, _, dtype in cells()} == {*product(FAMILIES, DTYPES)}
    found = (launched(name, torch.float16, "sm_90") for name in FAMILIES)
    assert {launch.kernel for one in found for launch in plan(*one)} == FUSED_KERNELS


@pytest.mark.parametrize(("name", "target", "dtype"), [*cells()])
def test_a_compiled_kernel_is_right_and_without_hazards(name: str, target: str, dtype: str, run: Run) -> None:
    """P1 on random inputs, integer arithmetic bit for bit on whole numbers."""
    problem, config, device = launched(name, DTYPES[dtype], target)
    assert_right(problem, config, device, run)
    whole = integers(problem, torch.device("cpu"))
    assert torch.equal(run(plan(problem, config, device), device, whole).y, expected_of(problem, whole))


@pytest.mark.parametrize(("name", "target"), on_targets([*ODD, "stem wide-image", "head resnet20"]))
def test_odd_sizes_as_the_rules_launch_them(name: str, target: str, run: Run) -> None:
    assert_right(CASES[name], heuristic_config(CASES[name], TARGETS[target]), TARGETS[target], run)


@pytest.mark.parametrize(("activation", "target"), on_targets([*ACTIVATIONS]))
def test_activations(activation: str, target: str, run: Run) -> None:
    assert_right(replace(SMALL, relu=False, activation=activation), GATHERED, TARGETS[target], run)


WARPS = [(name, target) for name, target, dtype in cells() if dtype == "fp16" and name != "pair"]


@pytest.mark.parametrize(("name", "target"), WARPS)
def test_warps_do_not_change_a_bit(name: str, target: str, run: Run) -> None:
    """Each accumulator adds up in the same order on 4 and on 8, of random numbers too."""
    problem, config, device = launched(name, torch.float16, target)
    inputs = make_inputs(problem)
    four, eight = (
        run(plan(problem, config.with_size(problem, "num_warps", warps), device), device, inputs) for warps in (4, 8)
    )
    assert eight.defects == []
    assert torch.equal(four.y, eight.y)
