"""The search for configurations, on invented times."""

import dataclasses
import math

import pytest

from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.configs.heuristic import heuristic_config
from kernels.configs.targets import TARGETS
from kernels.configs.tuning import neighbours, tune
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem, PairConfig
from kernels.problems import ConvProblem, Problem
from tests.kernels.cases import ONE_OF_EACH

FIRST = ConvProblem(32, 64, 56, 56, 64, (3, 3), padding=(1, 1), relu=True)
BOTTLENECK = BottleneckProblem(FIRST, 256, has_residual=True, relu=True)
SM_90 = TARGETS["sm_90"]


def differences(a: Config, b: Config) -> set[str]:
    """Fields in which two configurations differ; rows and box are one decision."""
    names = {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}
    return names - {"box"} if "block_m" in names else names


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_neighbours_are_valid_and_one_decision_away(name: str, target: str) -> None:
    problem, t = ONE_OF_EACH[name].with_batch(1024), TARGETS[target]
    start = heuristic_config(problem, t)
    found = list(neighbours(problem, start, t))
    assert len(found) >= 3 and len(set(found)) == len(found) and start not in found
    for config in found:
        assert config.unsupported_reason(problem, t) is None
        assert len(differences(start, config)) == 1, config


def test_the_search_finds_the_fastest() -> None:
    goal = ConvConfig(64, 32, 32, 8, 2)

    def measure(problem: Problem, config: Config) -> float:
        assert isinstance(config, ConvConfig)
        sides = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
        steps = [abs(math.log2(getattr(config, side) / getattr(goal, side))) for side in sides]
        return 1 + sum(steps) + (config.box != goal.box)

    config, seconds, measured = tune(FIRST, SM_90, measure)
    assert config == goal and seconds == 1 and 5 < measured < 100


def test_what_fails_is_not_taken() -> None:
    start = heuristic_config(FIRST, SM_90)
    assert tune(FIRST, SM_90, lambda problem, config: 1.0 if config == start else None)[0] == start
    with pytest.raises(ValueError, match=r"no configuration of ConvProblem.* gives a right result on sm_90"):
        tune(FIRST, SM_90, lambda problem, config: None)


@pytest.mark.parametrize("fused_is_faster", [True, False], ids=["fused", "pair"])
def test_a_bottleneck_is_one_kernel_or_two_whichever_is_faster(fused_is_faster: bool) -> None:
    def measure(problem: Problem, config: Config) -> float:
        return 1.0 if isinstance(config, BottleneckConfig) == fused_is_faster else 2.0

    config, seconds, _ = tune(BOTTLENECK, SM_90, measure)
    assert isinstance(config, BottleneckConfig if fused_is_faster else PairConfig) and seconds == 1.0
    assert config.unsupported_reason(BOTTLENECK, SM_90) is None
