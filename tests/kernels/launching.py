"""Runs kernels the way every test of them does: into poisoned memory, twice, judged by the float64 oracle."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels.launch
from kernels.configs.config import BottleneckConfig, Config, ConvConfig, HeadConfig, PairConfig, StemConfig
from kernels.configs.heuristic import box_of
from kernels.launch import Workspace, target_of
from kernels.oracle import Inputs, make_inputs, operator_call, p1_failures
from kernels.problems import BottleneckProblem, ConvProblem, HeadProblem, Problem, StemProblem

POISONS = (float("nan"), 1e30)
# Elements on either side of an output: more than a tile of 128 rows of 2048 channels.
GUARD = 2**18


def power_of_two(size: int, most: int) -> int:
    """The smallest of at least 16 and at most `most` that reaches `size`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def quick_config(problem: Problem) -> Config:
    """Few large tiles and few slices of K, without boxes: what the interpreter runs fastest."""
    if isinstance(problem, StemProblem):
        pool_height, pool_width = problem.out_shape[2:]
        return StemConfig(
            block_q=power_of_two(2 * pool_width + 2, 128),
            block_n=power_of_two(problem.conv.c_out, 512),
            block_k=_quick_block_k(problem.conv),
            pool_rows=min(pool_height, 4),
            num_warps=4,
            num_stages=2,
        )
    if isinstance(problem, HeadProblem):
        return HeadConfig(16, power_of_two(problem.c_out, 1024), power_of_two(problem.c_in, 512), num_warps=4)
    conv = problem.first if isinstance(problem, BottleneckProblem) else problem
    block_m, block_n, block_k = power_of_two(conv.gemm_m, 256), power_of_two(problem.c_out, 512), _quick_block_k(conv)
    if isinstance(problem, BottleneckProblem):
        return BottleneckConfig(block_m, block_n, block_k, num_warps=4, num_stages=2)
    return ConvConfig(block_m, power_of_two(conv.gemm_n, 512), block_k, num_warps=4, num_stages=2)


def _quick_block_k(conv: ConvProblem) -> int:
    """A slice across all taps where a tap is short or groups are many, else one within a tap."""
    if conv.c_in_per_group < 16 or conv.groups > 8:
        return power_of_two(conv.gemm_k, 512)
    return min(512, 1 << (conv.c_in_per_group.bit_length() - 1))


def quick_pair(problem: BottleneckProblem) -> PairConfig:
    first, second = quick_config(problem.first), quick_config(problem.second)
    assert isinstance(first, ConvConfig) and isinstance(second, ConvConfig)
    return PairConfig(first, second)


def quick_boxes(problem: ConvProblem | BottleneckProblem) -> Config:
    """As `quick_config`, over boxes: of a bottleneck for its first convolution."""
    conv = problem.first if isinstance(problem, BottleneckProblem) else problem
    config = quick_config(problem)
    assert isinstance(config, (ConvConfig, BottleneckConfig))
    channels = math.gcd(conv.c_in, 256, conv.projection.c_in if conv.projection else 0)
    return replace(config, block_k=channels, box=box_of(conv, config.block_m))


def on_device(config: Config, device: torch.device) -> Config | None:
    """On a GPU the launcher's own choice, since what is quick in the interpreter does not fit there."""
    return None if device.type == "cuda" else config


def poisoned(problem: Problem, device: torch.device, poison: float) -> tuple[Tensor, Tensor, Tensor]:
    """(an output full of poison, the memory before it, the memory after it)."""
    size = math.prod(problem.out_shape)
    poison = min(poison, torch.finfo(problem.dtype).max)
    memory = torch.full((GUARD + size + GUARD,), poison, dtype=problem.dtype, device=device)
    out = memory[GUARD : GUARD + size].view(problem.out_shape)
    if out.ndim == 4:
        n, c, height, width = problem.out_shape
        out = memory[GUARD : GUARD + size].view(n, height, width, c).permute(0, 3, 1, 2)
    return out, memory[:GUARD], memory[GUARD + size :]


def launch(
    problem: Problem,
    inputs: Inputs,
    config: Config | None,
    poison: float = POISONS[0],
    workspace: Workspace | None = None,
) -> Tensor:
    """Run the kernels into poisoned memory, and see that they leave the memory on either side alone."""
    device = inputs.x.device
    box = getattr(getattr(config, "first", config), "box", None)
    if box is not None and device.type == "cuda" and not target_of(device).has_tma:
        pytest.skip("boxes need sm_90 or newer")
    out, before, after = poisoned(problem, device, poison)
    name, arguments = operator_call(problem, inputs)
    result = kernels.launch.run(name, *arguments, out=out, config=config, workspace=workspace)
    assert result is out
    expected = min(poison, torch.finfo(problem.dtype).max)
    for guard in (before, after):
        untouched = guard.isnan() if math.isnan(poison) else guard == torch.full_like(guard, expected)
        assert bool(untouched.all()), f"{int((~untouched).sum())} elements beside the output were written"
    return out


def check(problem: Problem, device: torch.device, config: Config | None = None) -> None:
    """P1, the same bits from memory that held NaN and 1e30 before, and inputs left as they were."""
    inputs = make_inputs(problem, device)
    given = inputs.clone()
    config = config or on_device(quick_config(problem), device)
    first, second = (launch(problem, inputs, config, poison) for poison in POISONS)
    assert p1_failures(first, problem, given) == []
    assert torch.equal(first, second)
    assert inputs.equal(given)
