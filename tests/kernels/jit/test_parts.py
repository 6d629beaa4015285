"""What no run of a small problem shows of the kernels: large addresses, the order of blocks, masked lanes."""

# mypy: allow-untyped-defs
# What a kernel is called with is given types by Triton.

import ast
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import kernels.jit
from kernels.jit.parts import _pixel_offset, _pixels, _swizzled_block
from kernels.jit.splits import _sum_of_splits

JIT_FILES = sorted(Path(kernels.jit.__file__).parent.glob("*.py"))
# What masked lanes hold: what a sum leaves as it is, a quotient, or a maximum.
NEUTRAL = {"elementwise": ("0.0", "1.0"), "pooling": ("0.0", "neutral")}


def loads(path: Path) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "tl.load"]


@pytest.mark.parametrize("path", JIT_FILES, ids=lambda path: path.stem)
def test_every_masked_load_says_what_masked_lanes_are(path: Path) -> None:
    """The interpreter fills them with 0 in any case, so no run of it can show that `other` is missing."""
    for load in loads(path):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}
        assert len(load.args) == 1, "pass mask and other by name"
        assert "mask" not in keywords or keywords.get("other") in NEUTRAL.get(path.stem, ("0.0",)), ast.unparse(load)


def test_masked_loads_are_found() -> None:
    names = [keyword.arg for path in JIT_FILES for load in loads(path) for keyword in load.keywords]
    assert names.count("mask") >= 7


@triton.jit
def _address_kernel(pixel_ptr, out_ptr, P, Q, H, W, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    n, p, q = _pixels(tl.load(pixel_ptr + lane), P, Q)
    tl.store(out_ptr + lane, _pixel_offset(n, p * 2 - 3, q * 2 - 3, H, W, CHANNELS))


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
def _swizzle_kernel(out_ptr, blocks_m, blocks_n):
    pid = tl.program_id(0)
    block_m, block_n = _swizzled_block(pid, blocks_m, blocks_n)
    tl.store(out_ptr + pid * 2, block_m)
    tl.store(out_ptr + pid * 2 + 1, block_n)


@pytest.mark.parametrize("blocks", [(1, 1), (8, 3), (11, 4), (21, 2)], ids=str)
def test_the_swizzle_visits_every_block_once(blocks: tuple[int, int], device: torch.device) -> None:
    """The first 8 programs have the same column of blocks and 8 different rows."""
    blocks_m, blocks_n = blocks
    out = torch.full((blocks_m * blocks_n, 2), -1, dtype=torch.int32, device=device)
    _swizzle_kernel[(blocks_m * blocks_n,)](out, blocks_m, blocks_n)
    assert sorted(out.tolist()) == [[m, n] for m in range(blocks_m) for n in range(blocks_n)]
    assert out[:8].tolist() == [[m, 0] for m in range(8)] or blocks_m < 8


@triton.jit
def _split_kernel(partials_ptr, counters_ptr, out_ptr, tile, rows, N: tl.constexpr, SIZE: tl.constexpr):
    """The sum over 3 splits of 1 + split times each element's number, from 1 on; -1 from a program without it."""
    lane, split = tl.arange(0, SIZE), tl.program_id(0)
    place = lane[:, None] * SIZE + lane[None, :]
    acc = (1 + place) * (1.0 + split)
    total, last = _sum_of_splits(acc, partials_ptr, counters_ptr, tile, split, lane < rows, 0, N, 3, SIZE, SIZE)
    tl.store(out_ptr + split * SIZE * SIZE + place, tl.where(last, total, -1.0))


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (5, 10)])
def test_partial_sums_fill_whole_sectors_and_nothing_beyond_the_output(
    rows: int, columns: int, device: torch.device
) -> None:
    size, tile = 32, 2
    partials = torch.full((4, 3, size * size), torch.nan, device=device)
    counters = torch.zeros(4, dtype=torch.int32, device=device)
    out = torch.empty(3, size, size, device=device)
    _split_kernel[(3,)](partials, counters, out, tile, rows, columns, size)
    number = torch.arange(1.0, size * size + 1).view(size, size)
    (total,) = (found for found in out.cpu() if not bool((found == -1).all()))
    assert torch.equal(total[:rows, :columns], 6 * number[:rows, :columns]) and not counters.any()

    partials = partials.cpu()
    written, moved = partials.isfinite(), -(-columns // 4) * 4  # in whole fours
    assert int(written.sum()) == 3 * rows * moved, "other tiles"
    first = partials[tile, 0]
    assert sorted(first[first.isfinite()].tolist()) == number[:rows, :moved].flatten().tolist()
    assert all(torch.equal(partials[tile, split].nan_to_num(), (1 + split) * first.nan_to_num()) for split in (1, 2))
    if columns < size:
        return
    where = first.argsort().view(size, size)  # of each element
    for held in (4, 8):  # columns of a thread, which moves 4 of them at a time
        for fours in where.reshape(-1, held // 4, 4).unbind(1):
            assert bool((fours == fours[:, :1] + torch.arange(4)).all()) and not (fours[:, 0] % 4).any()
            for warp in fours.split(32):
                assert len((warp // 8).unique()) == warp.numel() // 8, "sectors of 8 that one request touches"
