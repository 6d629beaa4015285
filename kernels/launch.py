"""From an operator's arguments to launches of its kernels."""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.configs.config import BottleneckConfig, Config, ConvConfig, PairConfig, unsupported_reason
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.jit.implicit_gemm import _conv2d_gathered_kernel
from kernels.operators.checks import CHECKS, is_channels_last
from kernels.plan import KernelLaunch, plan
from kernels.problems import KERNEL_DTYPES, PROBLEMS, BottleneckProblem, ConvProblem, Problem, with_dtype

# Triton's interpreter runs one program at a time and pays for each operation: a GPU of one multiprocessor gets few
# programs of large tiles.
_INTERPRETER = Target("interpreter", 80, 163 * 1024, multiprocessors=1)


class Workspace:
    """Device memory that split-K kernels need beside their operands.

    Every kernel leaves the counters at 0, so launches that follow each other on one stream share them; launches that
    may overlap need workspaces of their own.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._counters: list[Tensor] = []  # outgrown ones too: CUDA graphs may still point to them

    def counters(self, count: int) -> Tensor:
        """At least `count` int32 zeros."""
        if not self._counters or count > len(self._counters[-1]):
            self._counters.append(torch.zeros(count, dtype=torch.int32, device=self._device))
        return self._counters[-1]


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


def run(
    name: str,
    *arguments: Any,
    out: Tensor | None = None,
    config: Config | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The operator `resnet_deploy::<name>` by Triton, on x's device and its current stream.

    Args:
        name: of the operator.
        arguments: the operator's, in order. CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 when the
            package is imported).
        out: where the result goes, by default a new tensor; shares no memory with the inputs.
        config: by default `select_config`'s.
        workspace: by default a new one.

    Raises:
        ValueError: an argument is not as the operator says, or config cannot run this problem on this device.
    """
    CHECKS[name](*arguments, dtypes=KERNEL_DTYPES)
    problem = PROBLEMS[name](*arguments)
    parameters = getattr(torch.ops.resnet_deploy, name).default._schema.arguments
    named = {parameter.name: value for parameter, value in zip(parameters, arguments, strict=True)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if isinstance(problem, BottleneckProblem) and problem.has_residual:
        tensors["residual"] = tensors.pop("shortcut")  # what is not projected is added as it is
    return _run(problem, config, tensors, out, workspace)


_Tensors = Mapping[str, Tensor]


def _run(
    problem: Problem, config: Config | None, tensors: _Tensors, out: Tensor | None, workspace: Workspace | None
) -> Tensor:
    """The result of `problem` on the operator's tensors, by name."""
    x = tensors["x"]
    on_gpu = x.device.type == "cuda"
    if not on_gpu and isinstance(_conv2d_gathered_kernel, JITFunction):
        raise ValueError(f"x is on {x.device}, expected a CUDA device (or TRITON_INTERPRET=1 from the start)")
    shape = problem.out_shape
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    dense = is_channels_last(out) if out.ndim == 4 else out.is_contiguous()
    if (tuple(out.shape), out.dtype, out.device) != (shape, x.dtype, x.device) or not dense:
        raise ValueError(
            f"out is {tuple(out.shape)}, {out.dtype}, {out.device}, strides {out.stride()},"
            f" expected {shape}, {x.dtype}, {x.device}, dense {str(layout).removeprefix('torch.')}"
        )
    if out.numel() == 0:
        return out
    if not on_gpu and x.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 operands as the integers that hold them and truncates where a GPU rounds.
        # float32 holds operands and products exactly, and leaves the last rounding to torch.
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        return out.copy_(_run(with_dtype(problem, torch.float32), config, wide, None, workspace))
    target = target_of(x.device) if on_gpu else None
    if config is None:
        config = select_config(problem, target or _INTERPRETER)
    elif (reason := unsupported_reason(problem, config, target)) is not None:
        raise ValueError(f"{config} cannot run {problem}: {reason}")
    workspace = workspace or Workspace(x.device)
    with torch.cuda.device(x.device) if on_gpu else contextlib.nullcontext():
        if isinstance(problem, BottleneckProblem) and isinstance(config, PairConfig):
            hidden = _run(problem.first, config.first, tensors, None, workspace)
            second = {**tensors, "x": hidden, "weight": tensors["expand_weight"], "bias": tensors["expand_bias"]}
            return _run(problem.second, config.second, second, out, workspace)
        config = _without_unaligned_boxes(config, tensors)
        for launch in plan(problem, config, target):
            _launch(launch, tensors, out, workspace)
    return out


def _without_unaligned_boxes(config: Config, tensors: _Tensors) -> Config:
    """TMA wants tensors at multiples of 16 bytes, which a view of another tensor need not be."""
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors.values())
    if isinstance(config, (ConvConfig, BottleneckConfig)) and config.box is not None and not aligned:
        return replace(config, box=None)
    return config


def _launch(launch: KernelLaunch, tensors: _Tensors, out: Tensor, workspace: Workspace) -> None:
    arguments: dict[str, Any] = {"y_ptr": out, "partials_ptr": None, "counters_ptr": None}
    if launch.tiles:
        arguments["partials_ptr"] = torch.empty(launch.partials, dtype=torch.float32, device=out.device)
        arguments["counters_ptr"] = workspace.counters(launch.tiles)
    for parameter, operand in launch.operands.items():
        if parameter in arguments:
            continue
        name = parameter.removesuffix("_ptr").removesuffix("_desc")
        arguments[parameter] = None if operand is None else tensors[name]
        if operand is not None and operand.block is not None:
            view = _blocks_view(launch, name, tensors[name])
            arguments[parameter] = TensorDescriptor(tensors[name], [*view.shape], [*view.stride()], [*operand.block])
    ordered = {parameter: arguments[parameter] for parameter in launch.operands}
    launch.kernel[launch.grid](**ordered, **launch.scalars, **launch.options)


def _blocks_view(launch: KernelLaunch, name: str, tensor: Tensor) -> Tensor:
    """`tensor` as its TMA descriptor sees it: a weight as C_OUT x K, an activation as N, H, W, C.

    Of a projected shortcut only the pixels that its stride reads; of a dense convolution all pixels in one row.
    """
    n, c, height, width = tensor.shape
    # Not the tensor's own strides: along an axis of one element torch allows any, TMA multiples of 16 bytes.
    pixels = tensor.as_strided((n, height, width, c), (height * width * c, width * c, c, 1))
    if name.endswith("weight"):
        return pixels.reshape(n, -1)
    problem = launch.problem
    conv = problem.first if isinstance(problem, BottleneckProblem) else problem
    assert isinstance(conv, ConvProblem)
    if isinstance(problem, ConvProblem) and problem.is_dense:
        return pixels.reshape(1, 1, -1, pixels.shape[3])
    if name == "shortcut" and conv.projection is not None:
        step_h, step_w = conv.projection.stride
        return pixels[:, ::step_h, ::step_w]
    return pixels
