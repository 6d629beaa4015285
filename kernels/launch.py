"""From an operator's arguments to launches of its kernels."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.configs.config import Config, KernelLaunch, Operand
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.jit.implicit_gemm import _conv2d_gathered_kernel
from kernels.operators.checks import is_channels_last
from kernels.operators.registry import OPERATORS
from kernels.plan import kernel_of, plan
from kernels.problems import KERNEL_DTYPES, Problem

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
    call = OPERATORS[name].of(*arguments)
    call.check(KERNEL_DTYPES)
    return _run(call.problem(), config, call.operands(), out, workspace)


def _run(
    problem: Problem, config: Config | None, tensors: dict[str, Tensor], out: Tensor | None, workspace: Workspace | None
) -> Tensor:
    """The result of `problem` on the operator's tensors, by the names that kernels give them."""
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
        return out.copy_(_run(problem.with_dtype(torch.float32), config, wide, None, workspace))
    target = target_of(x.device) if on_gpu else None
    if config is None:
        config = select_config(problem, target or _INTERPRETER)
    elif (reason := config.unsupported_reason(problem, target)) is not None:
        raise ValueError(f"{config} cannot run {problem}: {reason}")
    workspace = workspace or Workspace(x.device)
    with torch.cuda.device(x.device) if on_gpu else contextlib.nullcontext():
        if any(tensor.data_ptr() % 16 for tensor in tensors.values()):
            config = config.without_boxes()  # TMA wants multiples of 16 bytes, which a view of another need not be
        values = {**tensors, "y": out}
        for launch in plan(problem, config, target):
            _launch(launch, values, workspace)
    return out


def _launch(launch: KernelLaunch, values: dict[str, Tensor], workspace: Workspace) -> None:
    """One launch on tensors by name, among which its output is or from now on will be."""
    arguments = launch_arguments(launch, values, workspace)
    kernel_of(launch)[launch.grid](**arguments, **launch.scalars, **launch.options)


def launch_arguments(launch: KernelLaunch, values: dict[str, Tensor], workspace: Workspace) -> dict[str, Any]:
    """The tensors and descriptors that a launch passes, in order; its output is in `values` from now on."""
    names = launch.tensors or {}
    x = values[names.get("x", "x")]
    if launch.output not in values:
        shape = launch.problem.out_shape
        values[launch.output] = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    arguments: dict[str, Any] = {"y_ptr": values[launch.output], "partials_ptr": None, "counters_ptr": None}
    if launch.tiles:
        arguments["partials_ptr"] = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
        arguments["counters_ptr"] = workspace.counters(launch.tiles)
    for parameter, operand in launch.operands.items():
        if parameter in arguments:
            continue
        name = parameter.removesuffix("_ptr").removesuffix("_desc")
        tensor = None if operand is None else values[names.get(name, name)]
        arguments[parameter] = tensor
        if operand is not None and tensor is not None and operand.block is not None:
            view = _blocks_view(operand, tensor)
            arguments[parameter] = TensorDescriptor(tensor, [*view.shape], [*view.stride()], [*operand.block])
    return {parameter: arguments[parameter] for parameter in launch.operands}


def _blocks_view(operand: Operand, tensor: Tensor) -> Tensor:
    """`tensor` as its TMA descriptor sees it."""
    n, c, height, width = tensor.shape
    # Not the tensor's own strides: along an axis of one element torch allows any, TMA multiples of 16 bytes.
    pixels = tensor.as_strided((n, height, width, c), (height * width * c, width * c, c, 1))
    if operand.view == "filters":
        return pixels.reshape(n, -1)
    if operand.view == "rows":
        return pixels.reshape(1, 1, -1, c)
    return pixels[:, :: operand.step[0], :: operand.step[1]]
