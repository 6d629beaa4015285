"""From tensors to a launch of the kernels in implicit_gemm.py.

`kernel_arguments`, `launch_grid` and `launch_options` are the whole launch apart from the tensors; compile.py builds
the same kernel from them without a GPU.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.checks import check_conv2d_arguments, is_channels_last
from kernels.config import (
    KERNEL_DTYPES,
    TARGETS,
    ConvConfig,
    ConvProblem,
    Target,
    flatten_k,
    select_config,
    unsupported_reason,
)
from kernels.implicit_gemm import _conv2d_bias_act_kernel

# Without a GPU (Triton's interpreter) any target's choice is as good as another's.
_INTERPRETED_AS = TARGETS["sm_80"]


def kernel_arguments(problem: ConvProblem, config: ConvConfig) -> dict[str, int | bool | str]:
    """Every argument of `_conv2d_bias_act_kernel` but the pointers, by name."""
    return {
        "N": problem.batch,
        "H": problem.height,
        "W": problem.width,
        "P": problem.out_height,
        "Q": problem.out_width,
        "C_IN": problem.c_in_per_group,
        "C_OUT": problem.gemm_n,
        "GROUPS": problem.groups,
        "R": problem.kernel[0],
        "S": problem.kernel[1],
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0],
        "PAD_W": problem.padding[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
        "HAS_RESIDUAL": problem.has_residual,
        "APPLY_RELU": problem.relu,
        "FLATTEN_K": flatten_k(problem, config),
        "INPUT_PRECISION": config.input_precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


def launch_grid(problem: ConvProblem, config: ConvConfig) -> tuple[int, int]:
    """(blocks of M times blocks of N, groups)."""
    return -(-problem.gemm_m // config.block_m) * -(-problem.gemm_n // config.block_n), problem.groups


def launch_options(config: ConvConfig) -> dict[str, int | bool]:
    """The compiler's options. Contraction to FMA is asked for by name: its default differs between Triton versions."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


@functools.lru_cache
def target_of(device: torch.device) -> Target:
    """The target a CUDA device is; one that `TARGETS` does not list is described by its own properties.

    Raises:
        ValueError: the device is older than compute capability 8.0.
    """
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the opt-in shared memory
    capability = properties.major * 10 + properties.minor
    if capability < 80:
        raise ValueError(f"{properties.name} is sm_{capability}, expected sm_80 or newer")
    name = f"sm_{capability}"
    return TARGETS.get(name) or Target(
        name, capability, properties.shared_memory_per_block_optin, properties.multi_processor_count
    )


def launch_conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    config: ConvConfig | None = None,
) -> None:
    """out = act(conv2d(x, weight) + bias + residual), by the Triton kernel, on x's device and its current stream.

    Tensors as for `conv2d_bias_act`, without float64; out is (N, C_OUT, P, Q), channels_last, dtype and device of x,
    and shares no memory with x, weight or bias. CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 when the
    package is imported). `config` defaults to `select_config`.

    Raises:
        ValueError: an argument is not as above, or config cannot run this convolution on this device.
    """
    shape = check_conv2d_arguments(x, weight, bias, residual, stride, padding, dilation, groups, KERNEL_DTYPES)
    if (tuple(out.shape), out.dtype, out.device) != (shape, x.dtype, x.device) or not is_channels_last(out):
        raise ValueError(
            f"out is {tuple(out.shape)}, {out.dtype}, {out.device}, strides {out.stride()},"
            f" expected {shape}, {x.dtype}, {x.device}, channels_last"
        )
    problem = _problem(x, weight, residual, stride, padding, dilation, groups, relu)
    _launch(x, weight, bias, residual, out, problem, config)


def conv2d_bias_act_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """`launch_conv2d_bias_act` into a new tensor: what the operator does on a GPU."""
    shape = check_conv2d_arguments(x, weight, bias, residual, stride, padding, dilation, groups, KERNEL_DTYPES)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    problem = _problem(x, weight, residual, stride, padding, dilation, groups, relu)
    _launch(x, weight, bias, residual, out, problem, config=None)
    return out


def _problem(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
) -> ConvProblem:
    batch, c_in, height, width = x.shape
    return ConvProblem(
        batch=batch,
        c_in=c_in,
        height=height,
        width=width,
        c_out=weight.shape[0],
        kernel=(weight.shape[2], weight.shape[3]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        dtype=x.dtype,
        has_residual=residual is not None,
        relu=relu,
    )


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    problem: ConvProblem,
    config: ConvConfig | None,
) -> None:
    on_gpu = x.device.type == "cuda"
    if not on_gpu and isinstance(_conv2d_bias_act_kernel, JITFunction):
        raise ValueError(f"x is on {x.device}, expected a CUDA device (or TRITON_INTERPRET=1 from the start)")
    if problem.gemm_m == 0:
        return
    if not on_gpu and x.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 operands as the integers that hold them and truncates where a GPU rounds.
        # float32 holds operands and products exactly, and leaves the one rounding to torch.
        wide = out.float()
        wide_residual = None if residual is None else residual.float()
        wide_problem = replace(problem, dtype=torch.float32)
        _launch(x.float(), weight.float(), bias.float(), wide_residual, wide, wide_problem, config)
        out.copy_(wide)
        return
    target = target_of(x.device) if on_gpu else None
    if config is None:
        config = select_config(problem, target or _INTERPRETED_AS)
    elif (reason := unsupported_reason(problem, config, target)) is not None:
        raise ValueError(f"{config} cannot run this convolution: {reason}")
    with torch.cuda.device(x.device) if on_gpu else contextlib.nullcontext():
        _conv2d_bias_act_kernel[launch_grid(problem, config)](
            x, weight, bias, residual, out, **kernel_arguments(problem, config), **launch_options(config)
        )
