"""A problem and its configuration as kernel launches: everything but the tensors.

launch.py runs these launches, compile.py builds the same kernels without a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.configs.config import (
    BottleneckConfig,
    Config,
    ConvConfig,
    HeadConfig,
    PairConfig,
    StemConfig,
    block_mid,
    conv_k_blocks,
    k_blocks,
)
from kernels.configs.targets import Target
from kernels.jit.bottleneck import _conv2d_conv1x1_kernel
from kernels.jit.box_gemm import _conv2d_boxes_kernel
from kernels.jit.head import _mean_linear_kernel
from kernels.jit.implicit_gemm import _conv2d_gathered_kernel
from kernels.jit.stem import _conv2d_bias_relu_maxpool_kernel
from kernels.problems import BottleneckProblem, ConvProblem, HeadProblem, Problem, Projection, StemProblem

# Pixels whose channels one step of the head's mean adds up: more in flight, more registers.
_PIXELS_PER_STEP = 4
_IEEE = "ieee"


@dataclass(frozen=True)
class Operand:
    """A tensor parameter of a kernel: a pointer to `dtype`, or with a block a TMA descriptor of such blocks."""

    dtype: torch.dtype
    block: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of one kernel.

    Attributes:
        kernel: the @triton.jit function.
        problem, config: what it computes and how.
        operands: its tensor parameters by name; None is passed as None.
        scalars: every other parameter by name.
        grid: programs along each axis.
        options: num_warps, num_stages and the other options of the compiler.
        tiles, partials: of a split K: counters, and float32 elements of partial sums; else 0.
    """

    kernel: Any
    problem: Problem
    config: Config
    operands: Mapping[str, Operand | None]
    scalars: Mapping[str, Any]
    grid: tuple[int, ...]
    options: Mapping[str, int | bool]
    tiles: int = 0
    partials: int = 0


def plan(problem: Problem, config: Config, target: Target | None) -> tuple[KernelLaunch, ...]:
    """The launches of `problem` under a configuration that is valid for it, in order. No target: the interpreter."""
    if isinstance(problem, BottleneckProblem) and isinstance(config, PairConfig):
        return (*plan(problem.first, config.first, target), *plan(problem.second, config.second, target))
    use_pdl = target is not None and target.has_pdl
    builders: dict[type, Callable[..., KernelLaunch]] = {
        ConvConfig: _conv,
        BottleneckConfig: _bottleneck,
        StemConfig: _stem,
        HeadConfig: _head,
    }
    if isinstance(problem, ConvProblem) and isinstance(config, ConvConfig) and config.box is not None:
        multiprocessors = target.multiprocessors if target is not None else 1
        return (_boxes(problem, config, use_pdl, multiprocessors),)
    return (builders[type(config)](problem, config, use_pdl),)


def _options(num_warps: int, num_stages: int, use_pdl: bool) -> dict[str, int | bool]:
    """Contraction to FMA is asked for by name: its default differs between Triton versions."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return {**options, "launch_pdl": True} if use_pdl else options


def _geometry(problem: ConvProblem) -> dict[str, int]:
    return {
        "R": problem.kernel[0],
        "S": problem.kernel[1],
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0],
        "PAD_W": problem.padding[1],
    }


def _dilation(problem: ConvProblem) -> dict[str, int]:
    return {"DILATION_H": problem.dilation[0], "DILATION_W": problem.dilation[1]}


def _sizes(problem: ConvProblem, projection: Projection | None) -> dict[str, int]:
    return {
        "N": problem.batch,
        "H": problem.height,
        "W": problem.width,
        "P": problem.out_height,
        "Q": problem.out_width,
        "H_S": projection.height if projection else 0,
        "W_S": projection.width if projection else 0,
    }


def _projection(projection: Projection | None, block_k: int) -> dict[str, int]:
    return {
        "C_S": projection.c_in if projection else 0,
        "STRIDE_S_H": projection.stride[0] if projection else 1,
        "STRIDE_S_W": projection.stride[1] if projection else 1,
        "K_BLOCKS_S": k_blocks(1, projection.c_in, block_k) if projection else 0,
        "HAS_PROJECTION": projection is not None,
    }


def _tile(box: tuple[int, int, int] | None) -> dict[str, int]:
    return dict(zip(("TILE_N", "TILE_P", "TILE_Q"), box or (0, 0, 0), strict=True))


def _conv(problem: ConvProblem, config: ConvConfig, use_pdl: bool) -> KernelLaunch:
    tensor = Operand(problem.dtype)
    blocks = -(-problem.gemm_m // config.block_m) * -(-problem.gemm_n // config.block_n)
    tiles = blocks * problem.groups if config.split_k > 1 else 0
    return KernelLaunch(
        kernel=_conv2d_gathered_kernel,
        problem=problem,
        config=config,
        operands={
            "x_ptr": tensor,
            "weight_ptr": tensor,
            "bias_ptr": tensor,
            "residual_ptr": tensor if problem.has_residual else None,
            "shortcut_ptr": tensor if problem.projection else None,
            "shortcut_weight_ptr": tensor if problem.projection else None,
            "partials_ptr": Operand(torch.float32) if config.split_k > 1 else None,
            "counters_ptr": Operand(torch.int32) if config.split_k > 1 else None,
            "y_ptr": tensor,
        },
        scalars={
            **_sizes(problem, problem.projection),
            "C_IN": problem.c_in_per_group,
            "C_OUT": problem.gemm_n,
            "GROUPS": problem.groups,
            **_geometry(problem),
            **_dilation(problem),
            **_projection(problem.projection, config.block_k),
            "K_BLOCKS": conv_k_blocks(problem, config.block_k)[0],
            "HAS_RESIDUAL": problem.has_residual,
            "APPLY_RELU": problem.relu,
            "INPUT_PRECISION": config.input_precision,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
            "SPLIT_K": config.split_k,
            "USE_PDL": use_pdl,
        },
        grid=(blocks * config.split_k, problem.groups),
        options=_options(config.num_warps, config.num_stages, use_pdl),
        tiles=tiles,
        partials=tiles * config.split_k * config.block_m * config.block_n,
    )


def _boxes(problem: ConvProblem, config: ConvConfig, use_pdl: bool, multiprocessors: int) -> KernelLaunch:
    assert config.box is not None
    tensor = Operand(problem.dtype)
    x_block = Operand(problem.dtype, (*config.box, config.block_k))
    weight_block = Operand(problem.dtype, (config.block_n, config.block_k))
    # A dense convolution is a matrix product: one image of one row, with every pixel in it.
    sizes = (problem.batch, problem.out_height, problem.out_width)
    n, p, q = (1, 1, problem.gemm_m) if problem.is_dense else sizes
    blocks = -(-problem.c_out // config.block_n)
    for size, side in zip((n, p, q), config.box, strict=True):
        blocks *= -(-size // side)
    projection = problem.projection
    scalars = {
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
        "INPUT_PRECISION": config.input_precision,
        **_tile(config.box),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "USE_PDL": use_pdl,
    }
    return KernelLaunch(
        kernel=_conv2d_boxes_kernel,
        problem=problem,
        config=config,
        operands={
            "x_desc": x_block,
            "weight_desc": weight_block,
            "bias_ptr": tensor,
            "residual_ptr": tensor if problem.has_residual else None,
            "shortcut_desc": x_block if projection else None,
            "shortcut_weight_desc": weight_block if projection else None,
            "y_ptr": tensor,
        },
        scalars=scalars,
        grid=(min(blocks, config.programs_per_sm * multiprocessors) if config.programs_per_sm else blocks,),
        options=_options(config.num_warps, config.num_stages, use_pdl),
    )


def _bottleneck(problem: BottleneckProblem, config: BottleneckConfig, use_pdl: bool) -> KernelLaunch:
    first, tensor = problem.first, Operand(problem.dtype)
    mid = block_mid(problem)
    x, weight, rows = tensor, tensor, -(-first.gemm_m // config.block_m)
    if config.box is not None:
        x = Operand(problem.dtype, (*config.box, config.block_k))
        weight = Operand(problem.dtype, (mid, config.block_k))
        rows = 1
        for size, side in zip((first.batch, first.out_height, first.out_width), config.box, strict=True):
            rows *= -(-size // side)
    return KernelLaunch(
        kernel=_conv2d_conv1x1_kernel,
        problem=problem,
        config=config,
        operands={
            "x": x,
            "weight": weight,
            "bias_ptr": tensor,
            "expand_weight_ptr": tensor,
            "expand_bias_ptr": tensor,
            "residual_ptr": tensor if problem.has_residual else None,
            "shortcut_ptr": tensor if problem.projection else None,
            "shortcut_weight_ptr": tensor if problem.projection else None,
            "y_ptr": tensor,
        },
        scalars={
            **_sizes(first, problem.projection),
            "C_IN": first.c_in,
            "C_MID": first.c_out,
            "C_OUT": problem.c_out,
            **_geometry(first),
            **_dilation(first),
            **_projection(problem.projection, config.block_k),
            "K_BLOCKS": conv_k_blocks(first, config.block_k)[0],
            "HAS_RESIDUAL": problem.has_residual,
            "APPLY_RELU": problem.relu,
            "INPUT_PRECISION": config.input_precision,
            "USE_BOXES": config.box is not None,
            **_tile(config.box),
            "BLOCK_M": config.block_m,
            "BLOCK_MID": mid,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "USE_PDL": use_pdl,
        },
        grid=(rows,),
        options=_options(config.num_warps, config.num_stages, use_pdl),
    )


def _stem(problem: StemProblem, config: StemConfig, use_pdl: bool) -> KernelLaunch:
    conv, tensor = problem.conv, Operand(problem.dtype)
    _, c_out, pool_p, pool_q = problem.out_shape
    sizes = {"H": conv.height, "W": conv.width, "P": conv.out_height, "Q": conv.out_width}
    return KernelLaunch(
        kernel=_conv2d_bias_relu_maxpool_kernel,
        problem=problem,
        config=config,
        operands=dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), tensor),
        scalars={
            **sizes,
            "POOL_P": pool_p,
            "POOL_Q": pool_q,
            "C_IN": conv.c_in,
            "C_OUT": c_out,
            **_geometry(conv),
            "K_BLOCKS": conv_k_blocks(conv, config.block_k)[0],
            "INPUT_PRECISION": _IEEE,
            "BLOCK_Q": config.block_q,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "POOL_ROWS": config.pool_rows,
            "USE_PDL": use_pdl,
        },
        grid=(
            problem.batch * -(-pool_p // config.pool_rows),
            -(-pool_q // (config.block_q // 2 - 1)),
            -(-c_out // config.block_n),
        ),
        options=_options(config.num_warps, config.num_stages, use_pdl),
    )


def _head(problem: HeadProblem, config: HeadConfig, use_pdl: bool) -> KernelLaunch:
    tensor = Operand(problem.dtype)
    blocks_m = -(-problem.batch // config.block_m)
    splits = -(-problem.c_in // config.block_k)
    tiles = blocks_m * -(-problem.c_out // config.block_n)
    return KernelLaunch(
        kernel=_mean_linear_kernel,
        problem=problem,
        config=config,
        operands={
            "x_ptr": tensor,
            "weight_ptr": tensor,
            "bias_ptr": tensor,
            "partials_ptr": Operand(torch.float32),
            "counters_ptr": Operand(torch.int32),
            "y_ptr": tensor,
        },
        scalars={
            "N": problem.batch,
            "PIXELS": problem.height * problem.width,
            "C_IN": problem.c_in,
            "C_OUT": problem.c_out,
            "INPUT_PRECISION": _IEEE,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_P": _PIXELS_PER_STEP,
            "SPLIT_K": splits,
            "USE_PDL": use_pdl,
        },
        grid=(blocks_m * splits,),
        options=_options(config.num_warps, num_stages=1, use_pdl=use_pdl),
        tiles=tiles,
        partials=tiles * splits * config.block_m * config.block_n,
    )
