"""Runs kernels the way every test of them does: into poisoned memory, twice, judged by the float64 oracle."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.launch
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.launch import Workspace, target_of
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemProblem, StemWindowsConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem
from kernels.operators.mean_linear import HeadConfig, HeadProblem
from kernels.operators.registry import Arguments
from kernels.oracle import make_inputs, oracle, p1_failures
from kernels.problems import ConvProblem, Problem

POISONS = (float("nan"), 1e30)
# Elements on either side of an output: more than a tile of 128 rows of 2048 channels.
GUARD = 2**18


def power_of_two(size: int, most: int) -> int:
    """The smallest of at least 16 and at most `most` that reaches `size`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def quick_config(problem: Problem) -> Config:
    """Few large tiles and few slices of K, without boxes: what the interpreter runs fastest."""
    if isinstance(problem, HeadProblem):
        return HeadConfig(16, power_of_two(problem.c_out, 1024), power_of_two(problem.c_in, 512), num_warps=4)
    assert isinstance(problem, ConvProblem | StemProblem | BottleneckProblem)
    conv = problem.convolution
    block_k = min(512, 1 << (conv.c_in_per_group.bit_length() - 1))
    if conv.c_in_per_group < 16 or conv.groups > 8:  # a slice across all taps, else one within a tap
        block_k = power_of_two(conv.gemm_k, 512)
    if isinstance(problem, StemProblem):
        height, width = problem.out_shape[2:]
        columns = power_of_two(2 * width + 2, 128)
        sizes = (columns, power_of_two(conv.c_out, 512), block_k, min(height, 4), 4, 2)
        windows = StemWindowsConfig(*sizes)  # where they are aligned; float32 always is, and takes the other
        if problem.dtype == torch.float32 or windows.unsupported_reason(problem, None):
            return StemConfig(*sizes)
        return windows
    rows = power_of_two(conv.gemm_m, 256)
    if isinstance(problem, BottleneckProblem):
        return BottleneckConfig(rows, power_of_two(problem.c_out, 512), block_k, num_warps=4, num_stages=2)
    return ConvConfig(rows, power_of_two(conv.gemm_n, 512), block_k, num_warps=4, num_stages=2)


def on_device(config: Config, device: torch.device) -> Config | None:
    """On a GPU the launcher's own choice, since what is quick in the interpreter does not fit there."""
    return None if device.type == "cuda" else config


def run(
    inputs: Arguments[Tensor],
    config: Config | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    return kernels.launch.run(inputs.operator, *inputs.values(), out=out, config=config, workspace=workspace)


def operator(inputs: Arguments[Tensor]) -> Tensor:
    """As PyTorch dispatches it."""
    y: Tensor = getattr(torch.ops.resnet_deploy, inputs.operator)(*inputs.values())
    return y


def fake(inputs: Arguments[Tensor]) -> Tensor:
    with FakeTensorMode() as mode:
        return operator(inputs.map(mode.from_tensor))


def composition(
    problem: Problem, inputs: Arguments[Tensor], relu: bool = True, hidden: Callable[[Tensor], Tensor] = F.relu
) -> Tensor:
    """The operator in torch's own words: in float64, rounded where it rounds.

    Without `relu` its last ReLU is left out; `hidden` is what a bottleneck has between its convolutions.
    """
    wide = inputs.map(Tensor.double)
    i = wide.tensors()
    if isinstance(problem, HeadProblem):
        mean = F.adaptive_avg_pool2d(i["x"], 1).flatten(1).to(problem.dtype).double()
        return F.linear(mean, i["weight"], i["bias"]).to(problem.dtype)
    assert isinstance(problem, ConvProblem | StemProblem | BottleneckProblem)
    conv = problem.convolution
    y = F.conv2d(i["x"], i["weight"], i["bias"], conv.stride, conv.padding, conv.dilation, conv.groups)
    if isinstance(problem, StemProblem):
        return F.max_pool2d(F.relu(y) if relu else y, 3, 2, 1).to(problem.dtype)
    if isinstance(problem, BottleneckProblem):
        y = F.conv2d(hidden(y).to(problem.dtype).double(), i["expand_weight"], i["expand_bias"])
    if problem.projection:
        y = y + F.conv2d(i["shortcut"], i["shortcut_weight"], stride=problem.projection.stride)
    if problem.has_residual:
        y = y + wide.operands()["residual"]
    return (F.relu(y) if relu and problem.relu else y).to(problem.dtype)


def launch(
    problem: Problem,
    inputs: Arguments[Tensor],
    config: Config | None,
    poison: float = POISONS[0],
    workspace: Workspace | None = None,
) -> Tensor:
    """Run the kernels into an output full of poison, and see that they leave the memory on either side alone."""
    device = inputs.tensors()["x"].device
    box = getattr(getattr(config, "first", config), "box", None)
    if box is not None and device.type == "cuda" and not target_of(device).has_tma:
        pytest.skip("boxes need sm_90 or newer")
    poison, size = min(poison, torch.finfo(problem.dtype).max), math.prod(problem.out_shape)
    memory = torch.full((GUARD + size + GUARD,), poison, dtype=problem.dtype, device=device)
    out = memory[GUARD : GUARD + size]
    if len(problem.out_shape) == 4:
        n, c, height, width = problem.out_shape
        out = out.view(n, height, width, c).permute(0, 3, 1, 2)
    else:
        out = out.view(problem.out_shape)
    assert run(inputs, config, out=out, workspace=workspace) is out
    for guard in (memory[:GUARD], memory[GUARD + size :]):
        untouched = guard.isnan() if math.isnan(poison) else guard == torch.full_like(guard, poison)
        assert bool(untouched.all()), f"{int((~untouched).sum())} elements beside the output were written"
    return out


def assert_like(faked: Tensor | str, y: Tensor | str) -> None:
    """The same refusal, or shaped and laid out alike; along an axis of one element any stride will do."""
    if isinstance(y, str) or isinstance(faked, str):
        assert faked == y
        return
    strides = [(a, b) for a, b, size in zip(y.stride(), faked.stride(), y.shape, strict=True) if size > 1]
    assert (faked.shape, faked.dtype, faked.layout) == (y.shape, y.dtype, y.layout)
    assert all(a == b for a, b in strides), f"{y.stride()} of {tuple(y.shape)}, faked {faked.stride()}"
    assert faked.storage_offset() == y.storage_offset() and faked.requires_grad == y.requires_grad


def same(a: Arguments[Tensor], b: Arguments[Tensor]) -> bool:
    mine, others = a.tensors(), b.tensors()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def check(problem: Problem, device: torch.device, config: Config | None = None) -> None:
    """P1, the same bits from memory that held NaN and 1e30 before, and inputs left as they were."""
    inputs = make_inputs(problem, device)
    given = inputs.map(Tensor.clone)
    config = config or on_device(quick_config(problem), device)
    first, second = (launch(problem, inputs, config, poison) for poison in POISONS)
    assert p1_failures(first, problem, given, oracle(problem, given)) == []
    assert torch.equal(first, second)
    assert same(inputs, given)
