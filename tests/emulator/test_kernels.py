"""What the compiler makes of the kernels, executed: right, and free of races and of reads of what nobody wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.configs.config import Config
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.activations import ACTIVATIONS
from kernels.oracle import make_inputs, p1_failures
from kernels.problems import Problem
from tests.emulator.conftest import Run
from tests.kernels.cases import CASES, DTYPES, ODD, SMALL
from tests.kernels.families import FAMILIES, GATHERED, family
from tests.kernels.whole_numbers import expected_of, integers

EXECUTED = ("sm_87", "sm_90", "sm_120")
CELLS = [
    pytest.param(name, target, id=f"{name}-{target}")
    for target in EXECUTED
    for name in FAMILIES
    if family(name, torch.float16, TARGETS[target])
]


def launched(name: str, dtype: torch.dtype, target: str) -> tuple[Problem, Config, Target]:
    """A persistent kernel goes round its loop only where blocks are more than multiprocessors."""
    few = replace(TARGETS[target], multiprocessors=2) if "persistent" in name else TARGETS[target]
    found = family(name, dtype, few)
    assert found is not None
    return *found, few


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "target"), CELLS)
def test_a_compiled_kernel_is_right_and_without_hazards(name: str, target: str, dtype: str, run: Run) -> None:
    """P1 on random inputs, integer arithmetic bit for bit on whole numbers."""
    problem, config, device = launched(name, DTYPES[dtype], target)
    inputs = make_inputs(problem)
    random = run(problem, config, device, inputs)
    assert random.defects == []
    assert p1_failures(random.y, problem, inputs) == []
    whole = integers(problem, torch.device("cpu"))
    assert torch.equal(run(problem, config, device, whole).y, expected_of(problem, whole))


@pytest.mark.parametrize("target", EXECUTED)
@pytest.mark.parametrize("name", [*ODD, "stem wide-image", "head resnet20", "conv one-pixel-image"])
def test_odd_sizes_as_the_rules_launch_them(name: str, target: str, run: Run) -> None:
    problem = CASES[name]
    inputs = make_inputs(problem)
    found = run(problem, heuristic_config(problem, TARGETS[target]), TARGETS[target], inputs)
    assert found.defects == []
    assert p1_failures(found.y, problem, inputs) == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, run: Run) -> None:
    problem = replace(SMALL, relu=False, activation=activation)
    inputs = make_inputs(problem)
    found = run(problem, GATHERED, TARGETS["sm_90"], inputs)
    assert found.defects == []
    assert p1_failures(found.y, problem, inputs) == []


@pytest.mark.parametrize("target", EXECUTED)
@pytest.mark.parametrize("name", ["gathered", "gathered-wide-slices", "gathered-split", "boxes", "bottleneck"])
def test_warps_do_not_change_a_bit(name: str, target: str, run: Run) -> None:
    """Each accumulator adds up in the same order on 4 and on 8, of random numbers too."""
    if not family(name, torch.float16, TARGETS[target]):
        pytest.skip("needs TMA")
    problem, config, device = launched(name, torch.float16, target)
    inputs = make_inputs(problem)
    four, eight = (run(problem, config.with_size(problem, "num_warps", warps), device, inputs) for warps in (4, 8))
    assert eight.defects == []
    assert torch.equal(four.y, eight.y)
