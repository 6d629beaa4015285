"""How a convolution is launched: over gathered pointers, its K split between programs, or over TMA boxes."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.configs.config import (
    BARRIER_BYTES,
    Box,
    Config,
    KernelLaunch,
    Operand,
    box_reason,
    conv_k_blocks,
    k_blocks,
    launch_options,
    partial_sum_bytes,
    pixel_reason,
    uses_pdl,
    warps_of,
)
from kernels.configs.targets import Target
from kernels.problems import ConvProblem, Projection

# CUDA's limit on the second and third grid axis; groups lie on the second.
MAX_GROUPS = 65535


@dataclass(frozen=True)
class BoxedConfig(Config):
    """A configuration whose rows are pixels of a convolution, which boxes can load.

    Attributes:
        block_m: rows of the tile.
        block_n: its columns.
        block_k: reduction indices of one slice.
        box: (images, rows, columns) of one row block, loaded by TMA; None gathers through pointers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    box: Box | None = None

    def box_reason(self, conv: ConvProblem, target: Target | None) -> str | None:
        reason = None if self.box is None else box_reason(conv, self.box, self.block_m, self.block_k, target)
        return reason or pixel_reason(conv.gemm_m, self.block_m)

    def changes(self, problem: ConvProblem) -> Iterator[Config]:
        yield from super().changes(problem)
        yield replace(self, box=None if self.box else box_of(problem.convolution, self.block_m))

    def with_size(self, problem: ConvProblem, name: str, value: int) -> Config:
        """A box goes with its rows."""
        changes: dict[str, Any] = {name: value}
        changed = replace(self, **changes)
        return replace(changed, box=box_of(problem.convolution, changed.block_m)) if self.box else changed

    def without_boxes(self) -> Config:
        return replace(self, box=None)


@dataclass(frozen=True)
class ConvConfig(BoxedConfig, kind="conv", runs=ConvProblem):
    """One way to launch a ConvProblem.

    Attributes:
        split_k: blocks that share one tile's reduction.
        programs_per_sm: with a box, how many persistent programs a multiprocessor gets; 0 is one program per block.
    """

    split_k: int = 1
    programs_per_sm: int = 0

    def problem_reason(self, problem: ConvProblem, target: Target | None) -> str | None:
        slices = sum(conv_k_blocks(problem, self.block_k))
        if problem.groups > MAX_GROUPS:
            return f"{problem.groups} groups, expected at most {MAX_GROUPS}"
        if problem.projection is not None and problem.groups > 1:
            return f"{problem.groups} groups beside a projection, expected 1"
        if self.split_k > slices:
            return f"split_k is {self.split_k}, expected at most the {slices} slices"
        if self.box is not None and problem.projection is not None and problem.projection.c_in % self.block_k:
            return f"{problem.projection.c_in} projected channels, expected a multiple of block_k {self.block_k}"
        return self.box_reason(problem, target)

    def shared_memory(self, problem: ConvProblem) -> int:
        size = problem.dtype.itemsize
        pipeline = self.num_stages * (self.block_m + self.block_n) * self.block_k * size
        tile = self.block_m * self.block_n
        epilogue = partial_sum_bytes(tile, self.split_k) if self.split_k > 1 else tile * size
        if self.box is None:
            return max(pipeline, epilogue)
        # Boxes of the projection are loaded while those of the convolution are still in place.
        return BARRIER_BYTES + (max(pipeline, epilogue) if problem.projection is None else 2 * pipeline + epilogue)

    def accumulators(self, problem: ConvProblem) -> int:
        return self.block_m * self.block_n // (32 * self.num_warps)

    def changes(self, problem: ConvProblem) -> Iterator[Config]:
        yield from super().changes(problem)
        yield from self._resized(problem, "split_k", self.split_k * 2, self.split_k // 2)
        if self.box is not None:
            for programs in {0, 1, 2} - {self.programs_per_sm}:
                yield replace(self, programs_per_sm=programs)

    def launches(self, problem: ConvProblem, target: Target | None) -> tuple[KernelLaunch, ...]:
        return (self._gathered(problem, target) if self.box is None else self._boxes(problem, self.box, target),)

    def _gathered(self, problem: ConvProblem, target: Target | None) -> KernelLaunch:
        tensor = Operand(problem.dtype)
        blocks = -(-problem.gemm_m // self.block_m) * -(-problem.gemm_n // self.block_n)
        tiles = blocks * problem.groups if self.split_k > 1 else 0
        return KernelLaunch(
            kernel="implicit_gemm._conv2d_gathered_kernel",
            problem=problem,
            config=self,
            operands={
                "x_ptr": tensor,
                "weight_ptr": tensor,
                "bias_ptr": tensor,
                "residual_ptr": tensor if problem.has_residual else None,
                "slope_ptr": tensor if problem.activation == "prelu" else None,
                "shortcut_ptr": tensor if problem.projection else None,
                "shortcut_weight_ptr": tensor if problem.projection else None,
                "partials_ptr": Operand(torch.float32) if self.split_k > 1 else None,
                "counters_ptr": Operand(torch.int32) if self.split_k > 1 else None,
                "y_ptr": tensor,
            },
            scalars={
                **sizes(problem, problem.projection),
                "C_IN": problem.c_in_per_group,
                "C_OUT": problem.gemm_n,
                "GROUPS": problem.groups,
                **geometry(problem),
                **dilation(problem),
                **projected(problem.projection, self.block_k),
                "K_BLOCKS": conv_k_blocks(problem, self.block_k)[0],
                "HAS_RESIDUAL": problem.has_residual,
                "APPLY_RELU": problem.relu,
                "ACTIVATION": problem.activation,
                "NEGATIVE_SLOPE": problem.negative_slope,
                "BLOCK_M": self.block_m,
                "BLOCK_N": self.block_n,
                "BLOCK_K": self.block_k,
                "SPLIT_K": self.split_k,
                **held_by(self, target, problem.dtype),
                "USE_PDL": uses_pdl(target),
            },
            grid=(blocks * self.split_k, problem.groups),
            options=launch_options(self.num_warps, self.num_stages, target),
            tiles=tiles,
            partials=tiles * self.split_k * self.block_m * self.block_n,
        )

    def _boxes(self, problem: ConvProblem, box: Box, target: Target | None) -> KernelLaunch:
        tensor = Operand(problem.dtype)
        # A dense convolution is a matrix product: one image of one row, with every pixel in it.
        shape = (problem.batch, problem.out_height, problem.out_width)
        n, p, q = (1, 1, problem.gemm_m) if problem.is_dense else shape
        x_block = Operand(problem.dtype, (*box, self.block_k), "rows" if problem.is_dense else "pixels")
        weight_block = Operand(problem.dtype, (self.block_n, self.block_k), "filters")
        blocks = -(-problem.c_out // self.block_n) * boxes((n, p, q), box)
        programs = self.programs_per_sm * (target.multiprocessors if target is not None else 1)
        tiles = blocks if self.split_k > 1 else 0
        blocks *= self.split_k
        projection = problem.projection
        return KernelLaunch(
            kernel="box_gemm._conv2d_boxes_kernel",
            problem=problem,
            config=self,
            operands={
                "x_desc": x_block,
                "weight_desc": weight_block,
                "bias_ptr": tensor,
                "residual_ptr": tensor if problem.has_residual else None,
                "slope_ptr": tensor if problem.activation == "prelu" else None,
                "shortcut_desc": replace(x_block, step=projection.stride) if projection else None,
                "shortcut_weight_desc": weight_block if projection else None,
                "partials_ptr": Operand(torch.float32) if self.split_k > 1 else None,
                "counters_ptr": Operand(torch.int32) if self.split_k > 1 else None,
                "y_ptr": tensor,
            },
            scalars={
                "N": n,
                "P": p,
                "Q": q,
                "C_IN": problem.c_in,
                "C_OUT": problem.c_out,
                "R": problem.kernel[0],
                "S": problem.kernel[1],
                "PAD_H": problem.padding[0],
                "PAD_W": problem.padding[1],
                "C_S": projection.c_in if projection else 0,
                "HAS_PROJECTION": projection is not None,
                "HAS_RESIDUAL": problem.has_residual,
                "APPLY_RELU": problem.relu,
                "ACTIVATION": problem.activation,
                "NEGATIVE_SLOPE": problem.negative_slope,
                **tile(box),
                "BLOCK_N": self.block_n,
                "BLOCK_K": self.block_k,
                "SPLIT_K": self.split_k,
                "USE_PDL": uses_pdl(target),
            },
            grid=(min(blocks, programs) if programs else blocks,),
            options=launch_options(self.num_warps, self.num_stages, target),
            tiles=tiles,
            partials=tiles * self.split_k * self.block_m * self.block_n,
        )


def geometry(problem: ConvProblem) -> dict[str, int]:
    return {
        "R": problem.kernel[0],
        "S": problem.kernel[1],
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0],
        "PAD_W": problem.padding[1],
    }


def dilation(problem: ConvProblem) -> dict[str, int]:
    return {"DILATION_H": problem.dilation[0], "DILATION_W": problem.dilation[1]}


def sizes(problem: ConvProblem, projection: Projection | None) -> dict[str, int]:
    return {
        "N": problem.batch,
        "H": problem.height,
        "W": problem.width,
        "P": problem.out_height,
        "Q": problem.out_width,
        "H_S": projection.height if projection else 0,
        "W_S": projection.width if projection else 0,
    }


def projected(projection: Projection | None, block_k: int) -> dict[str, int]:
    return {
        "C_S": projection.c_in if projection else 0,
        "STRIDE_S_H": projection.stride[0] if projection else 1,
        "STRIDE_S_W": projection.stride[1] if projection else 1,
        "K_BLOCKS_S": k_blocks(1, projection.c_in, block_k) if projection else 0,
        "HAS_PROJECTION": projection is not None,
    }


def tile(box: Box | None) -> dict[str, int]:
    return dict(zip(("TILE_N", "TILE_P", "TILE_Q"), box or (0, 0, 0), strict=True))


def held_by(config: ConvConfig, target: Target | None, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns of the warps between which HMMA divides a tile that leaves as they hold it; else 0 of them."""
    rows, columns = warps_of(config.block_m, config.block_n, config.num_warps)
    hmma = dtype != torch.float32 and (target is None or target.matrix_instruction(config.block_m) == "HMMA")
    whole = config.block_m >= 16 * rows and config.block_n >= 32 * columns
    return {"WARP_ROWS": rows, "WARP_COLUMNS": columns} if hmma and whole else {"WARP_ROWS": 0, "WARP_COLUMNS": 0}


def boxes(shape: tuple[int, int, int], box: Box) -> int:
    """How many boxes cover (images, rows, columns) of pixels."""
    return math.prod(-(-size // side) for size, side in zip(shape, box, strict=True))


@functools.cache
def box_of(problem: ConvProblem, block_m: int) -> Box:
    """(images, rows, columns) of block_m output pixels such that the fewest lie outside the output.

    A dense convolution is one image of one row. Of equally good boxes the one with the fewest images is taken, whose
    halo of neighbouring pixels is smallest.
    """
    if problem.is_dense:
        return 1, 1, block_m
    powers = [1 << e for e in range(block_m.bit_length())]
    candidates = [(block_m // (p * q), p, q) for p in powers for q in powers if p * q <= block_m]
    shape = (problem.batch, problem.out_height, problem.out_width)
    return min(candidates, key=lambda box: (boxes(shape, box), box[0], abs(box[1] - box[2])))
