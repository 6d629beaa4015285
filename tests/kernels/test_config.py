"""Problems, targets, the heuristic, and the one statement of validity."""

from dataclasses import replace

import pytest
import torch

from kernels.config import (
    KERNEL_DTYPES,
    TARGETS,
    ConvConfig,
    ConvProblem,
    conv_output_size,
    flatten_k,
    k_blocks,
    select_config,
    shared_memory_bound,
    unsupported_reason,
)
from tests.kernels.conv_cases import COMPILED_CASES, NETWORK_CASES, ODD_CASES

PROBLEM = ConvProblem(8, 64, 56, 56, 256, (1, 1), has_residual=True)
CONFIG = ConvConfig(128, 64, 32, 4, 3)
TARGET = TARGETS["sm_80"]


def every_problem() -> list[ConvProblem]:
    """Each known shape as tested and at the sizes of use: batches 1 to 128, images up to 224."""
    shapes = [*NETWORK_CASES.values(), *ODD_CASES.values(), *COMPILED_CASES.values()]
    sizes = [(1, 7), (1, 56), (8, 14), (128, 56), (32, 224)]
    resized = [replace(shape, batch=n, height=s, width=s) for shape in shapes for n, s in sizes]
    return shapes + resized


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_selected_config_is_supported(target, dtype: torch.dtype) -> None:
    for problem in every_problem():
        problem = replace(problem, dtype=dtype)
        config = select_config(problem, target)
        assert unsupported_reason(problem, config, target) is None
        assert config.block_n < 2 * max(16, problem.gemm_n), problem
        if target.has_wgmma and dtype != torch.float32:
            assert config.block_m >= 64 and config.num_warps % 4 == 0
        if problem.gemm_k >= 64:
            assert k_blocks(problem, config) > 1


REFUSED = {
    "float64": ("dtype is torch.float64", {"dtype": torch.float64}, {}),
    "int8": ("dtype is torch.int8", {"dtype": torch.int8}, {}),
    "too-many-pixels": (r"output pixels, expected at most 2147483647", {"batch": 2**20}, {}),
    "too-many-groups": ("65536 groups, expected at most 65535", {"c_in": 65536, "c_out": 65536, "groups": 65536}, {}),
    "block_m-48": ("block_m is 48, expected a power of two", {}, {"block_m": 48}),
    "block_n-8": ("block_n is 8, expected a power of two of at least 16", {}, {"block_n": 8}),
    "block_k-0": ("block_k is 0, expected a power of two", {}, {"block_k": 0}),
    "warps-3": ("num_warps is 3", {}, {"num_warps": 3}),
    "stages-0": ("num_stages and group_m are 0 and 8", {}, {"num_stages": 0}),
    "group_m-0": ("num_stages and group_m are 3 and 0", {}, {"group_m": 0}),
    "precision": ("input_precision is 'half'", {}, {"input_precision": "half"}),
    "accumulators": ("128 accumulators per thread, expected at most 64", {}, {"block_m": 256}),
    "shared-memory": ("up to 196608 bytes of shared memory, expected at most 166912 on sm_80", {}, {"num_stages": 16}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_configs_are_refused(name: str) -> None:
    assert unsupported_reason(PROBLEM, CONFIG, TARGET) is None
    message, problem_changes, config_changes = REFUSED[name]
    reason = unsupported_reason(replace(PROBLEM, **problem_changes), replace(CONFIG, **config_changes), TARGET)
    assert reason is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)


def test_hardware_limits_do_not_bind_the_interpreter() -> None:
    assert unsupported_reason(PROBLEM, replace(CONFIG, block_m=1024), None) is None
    assert unsupported_reason(PROBLEM, replace(CONFIG, block_m=1000), None) is not None


def test_what_no_config_can_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no configuration for ConvProblem.* on sm_80: dtype"):
        select_config(replace(PROBLEM, dtype=torch.float64), TARGET)


def test_sizes_and_costs_of_a_problem() -> None:
    stem = ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3))
    assert (stem.out_height, stem.out_width) == (112, 112)
    assert (stem.gemm_m, stem.gemm_n, stem.gemm_k) == (8 * 112 * 112, 64, 147)
    assert stem.flops == 2 * 8 * 112 * 112 * 64 * 147
    assert stem.bytes_moved == 2 * (8 * 224 * 224 * 3 + 64 * 147 + 64 + 8 * 112 * 112 * 64)
    strided = ConvProblem(1, 256, 56, 56, 512, (1, 1), (2, 2), has_residual=True, dtype=torch.float32)
    assert strided.bytes_moved == 4 * (28 * 28 * 256 + 512 * 257 + 2 * 28 * 28 * 512)
    grouped = ConvProblem(1, 128, 8, 8, 128, (3, 3), padding=(1, 1), groups=32)
    assert (grouped.gemm_n, grouped.gemm_k, grouped.flops) == (4, 36, 2 * 64 * 128 * 36)


def test_output_size_is_torchs() -> None:
    for size, kernel, stride, padding, dilation in ((7, 3, 2, 1, 1), (8, 3, 2, 1, 1), (9, 2, 3, 0, 4), (5, 5, 1, 2, 1)):
        y = torch.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, stride, padding, dilation)
        assert conv_output_size(size, kernel, stride, padding, dilation) == y.shape[2]


def test_k_slices_span_taps_only_where_a_tap_is_short() -> None:
    def slices(c_in: int, kernel: int) -> tuple[bool, int]:
        problem = ConvProblem(1, c_in, 8, 8, 64, (kernel, kernel))
        return flatten_k(problem, CONFIG), k_blocks(problem, CONFIG)

    assert slices(3, 7) == (True, 5)
    assert slices(3, 1) == (False, 1)
    assert slices(32, 3) == (False, 9)
    assert slices(100, 3) == (False, 36)


def test_shared_memory_bound_counts_the_larger_phase() -> None:
    assert shared_memory_bound(PROBLEM, CONFIG) == 3 * (128 + 64) * 32 * 2
    assert shared_memory_bound(PROBLEM, replace(CONFIG, block_n=256, block_k=16, num_stages=1)) == 128 * 256 * 2
