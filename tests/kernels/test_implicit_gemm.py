"""The Triton kernel, through its launcher, against the float64 oracle."""

import ast
import inspect
import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import implicit_gemm
from kernels.config import TARGETS, ConvConfig, ConvProblem, select_config
from kernels.implicit_gemm import _input_corner, _pixel_offset, _swizzled_block
from kernels.launch import launch_conv2d_bias_act
from tests.kernels.conv_cases import DTYPES, NETWORK_CASES, ODD_CASES
from tests.kernels.oracle import Inputs, conv_arguments, make_inputs, p1_failures

POISONS = (float("nan"), 1e30)
# Elements on either side of an output: more than a tile of 128 rows of 2048 channels.
GUARD = 2**18


def power_of_two(size: int, most: int) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))


def config_for(problem: ConvProblem, device: torch.device) -> ConvConfig | None:
    """On a GPU the launcher's own choice. In the interpreter few large tiles, and long slices where they fit."""
    if device.type == "cuda":
        return None
    selected = select_config(problem, TARGETS["sm_80"])
    return replace(
        selected,
        block_m=power_of_two(problem.gemm_m, 128),
        block_n=power_of_two(problem.gemm_n, 512),
        block_k=256 if problem.c_in_per_group >= 256 else selected.block_k,
    )


def launch(problem: ConvProblem, inputs: Inputs, config: ConvConfig | None, poison: float = POISONS[0]) -> Tensor:
    """Run the kernel into poisoned memory, and see that it leaves the memory on either side alone."""
    shape = (problem.batch, problem.out_height, problem.out_width, problem.c_out)
    size = math.prod(shape)
    poison = min(poison, torch.finfo(problem.dtype).max)
    memory = torch.full((GUARD + size + GUARD,), poison, dtype=problem.dtype, device=inputs.x.device)
    out = memory[GUARD : GUARD + size].view(shape).permute(0, 3, 1, 2)
    launch_conv2d_bias_act(
        inputs.x, inputs.weight, inputs.bias, inputs.residual, out, **conv_arguments(problem), config=config
    )
    around = torch.cat([memory[:GUARD], memory[GUARD + size :]])
    assert torch.equal(around.nan_to_num(7.0), torch.full_like(around, poison).nan_to_num(7.0))
    return out


def check(problem: ConvProblem, device: torch.device, config: ConvConfig | None = None) -> None:
    inputs = make_inputs(problem, device)
    given = inputs.clone()
    config = config or config_for(problem, device)
    first, second = (launch(problem, inputs, config, poison) for poison in POISONS)
    assert p1_failures(first, problem, given) == []
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(inputs.tensors(), given.tensors(), strict=True))


def is_quick(problem: ConvProblem) -> bool:
    return problem.groups == 1 and problem.c_out * problem.gemm_k <= 2**18


@pytest.mark.parametrize("name", NETWORK_CASES)
def test_every_convolution_of_the_networks_in_fp16(name: str, device: torch.device) -> None:
    check(NETWORK_CASES[name], device)


@pytest.mark.parametrize("name", [name for name, problem in NETWORK_CASES.items() if is_quick(problem)][::2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_convolutions_of_the_networks_in_other_dtypes(name: str, dtype: str, device: torch.device) -> None:
    check(replace(NETWORK_CASES[name], dtype=DTYPES[dtype]), device)


@pytest.mark.parametrize("name", ODD_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(name: str, dtype: str, device: torch.device) -> None:
    check(replace(ODD_CASES[name], dtype=DTYPES[dtype]), device)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue_flags(dtype: str, residual: bool, relu: bool, device: torch.device) -> None:
    for name in ("small", "c_in-5", "groups-2"):
        check(replace(ODD_CASES[name], dtype=DTYPES[dtype], has_residual=residual, relu=relu), device)


@pytest.mark.parametrize(
    "tile",
    [(16, 16, 16, 1), (16, 32, 64, 2), (32, 16, 32, 3), (64, 64, 128, 8)],
    ids=lambda tile: "x".join(map(str, tile)),
)
@pytest.mark.parametrize("name", ["small", "c_in-5", "c_in-13-1x1", "groups-2"])
def test_every_tile_gives_the_same_convolution(
    name: str, tile: tuple[int, int, int, int], device: torch.device
) -> None:
    """Tiles smaller than the problem: block order, tails of M, N and K, and K slices in and across taps."""
    block_m, block_n, block_k, group_m = tile
    check(ODD_CASES[name], device, ConvConfig(block_m, block_n, block_k, 4, 2, group_m))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_inf_in_the_input_propagate(value: float, dtype: str, device: torch.device) -> None:
    for name in ("small", "c_in-5"):
        problem = replace(ODD_CASES[name], dtype=DTYPES[dtype])
        inputs = make_inputs(problem, device)
        inputs.x[0, 2, 3, 4] = value
        inputs.residual[1, 7, 0, 0] = value
        y = launch(problem, inputs, config_for(problem, device)).cpu()
        x, weight, bias, residual = (t.cpu().double() for t in inputs.tensors())
        expected = torch.conv2d(x, weight, bias, padding=1).add(residual).relu()
        touched = ~expected.isfinite()
        assert touched[0, :, 2:5, 3:6].any() and touched.sum() <= 9 * problem.c_out + 1
        torch.testing.assert_close(y[touched].double(), expected[touched], equal_nan=True, rtol=0, atol=0)
        assert y[~touched].isfinite().all()


def test_every_masked_load_says_what_masked_lanes_are() -> None:
    """The interpreter fills them with 0 in any case, so no run of it can show that `other` is missing."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(implicit_gemm))) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) == "tl.load"]
    assert len(loads) == 4
    for load in loads:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}["other"] == "0.0"


@triton.jit
def _address_kernel(pixel_ptr, out_ptr, P, Q, H, W, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    n, h, w = _input_corner(tl.load(pixel_ptr + lane), P, Q, 2, 2, 3, 3)
    tl.store(out_ptr + lane, _pixel_offset(n, h, w, H, W, CHANNELS))


def test_addresses_beyond_2_to_the_31_elements(device: torch.device) -> None:
    """The batch of a stem whose input has 2^31 pixels, with 2048 channels: offsets up to 2^42."""
    size, out_size, channels = 224, 112, 2048
    pixels = torch.tensor([0, 1, 12543, 2**20, 2**28 + 7, 2**29 - 1, 2**29, 536870911], dtype=torch.int32)
    offsets = torch.empty(8, dtype=torch.int64, device=device)
    _address_kernel[(1,)](pixels.to(device), offsets, out_size, out_size, size, size, channels, 8)
    expected = []
    for pixel in pixels.tolist():
        row, column = divmod(pixel, out_size)
        n, row = divmod(row, out_size)
        expected.append(((n * size + row * 2 - 3) * size + column * 2 - 3) * channels)
    assert max(expected) > 2**41
    assert offsets.tolist() == expected


@triton.jit
def _swizzle_kernel(out_ptr, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    pid = tl.program_id(0)
    block_m, block_n = _swizzled_block(pid, blocks_m, blocks_n, GROUP_M)
    tl.store(out_ptr + pid * 2, block_m)
    tl.store(out_ptr + pid * 2 + 1, block_n)


@pytest.mark.parametrize("blocks", [(1, 1), (8, 3), (11, 4), (5, 1)], ids=str)
def test_the_swizzle_visits_every_block_once(blocks: tuple[int, int], device: torch.device) -> None:
    blocks_m, blocks_n = blocks
    out = torch.full((blocks_m * blocks_n, 2), -1, dtype=torch.int32, device=device)
    _swizzle_kernel[(blocks_m * blocks_n,)](out, blocks_m, blocks_n, 4)
    expected = [[m, n] for m in range(blocks_m) for n in range(blocks_n)]
    assert sorted(out.tolist()) == expected
