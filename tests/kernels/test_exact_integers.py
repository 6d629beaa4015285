"""Whole numbers add up exactly in any order: every operator agrees with integer arithmetic, without a tolerance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.configs.config import Config
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS
from kernels.launch import target_of
from kernels.problems import Problem
from tests.kernels.cases import CASES, DTYPES, ODD, ONE_OF_EACH, SMALL
from tests.kernels.families import FAMILIES, HEAD, family
from tests.kernels.launching import launch, on_device, operator, quick_config
from tests.kernels.whole_numbers import BENT, expected_of, integers

PROBLEMS: dict[str, Problem] = {**ONE_OF_EACH, **{name: CASES[name] for name in ODD}, "head": HEAD} | {
    name: replace(SMALL, relu=False, activation=name, negative_slope=2.0 * (name == "leaky_relu")) for name in BENT
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operator_agrees_with_integer_arithmetic(dtype: str, name: str, device: torch.device) -> None:
    """In its reference and in its kernels, in few large tiles and as a GPU's rule chooses them."""
    problem = PROBLEMS[name].with_dtype(DTYPES[dtype])
    inputs = integers(problem, device)
    expected = expected_of(problem, inputs)
    assert torch.equal(operator(inputs).cpu(), expected)
    for config in (quick_config(problem), heuristic_config(problem, TARGETS["sm_90"])):
        assert torch.equal(launch(problem, inputs, on_device(config, device)).cpu(), expected), config


def family_on(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Problem, Config]:
    found = family(name, dtype, target_of(device) if device.type == "cuda" else None)
    if found is None:
        pytest.skip("this GPU cannot run it")
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_of_running_agrees_with_integer_arithmetic(dtype: str, name: str, device: torch.device) -> None:
    problem, config = family_on(name, DTYPES[dtype], device)
    inputs = integers(problem, device)
    assert torch.equal(launch(problem, inputs, config).cpu(), expected_of(problem, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "pair"])  # of two kernels, each a family
def test_warps_do_not_change_a_bit_on_a_gpu(name: str) -> None:
    problem, config = family_on(name, torch.float16, torch.device("cuda"))
    inputs = integers(problem, torch.device("cuda"))
    four, eight = (launch(problem, inputs, config.with_size(problem, "num_warps", warps)) for warps in (4, 8))
    assert torch.equal(four, eight) and torch.equal(eight.cpu(), expected_of(problem, inputs))
