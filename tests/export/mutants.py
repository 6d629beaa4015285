"""Defects made on purpose: each breaks a correct candidate in one place, and every one must be refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx

from export.capture import plain_torch
from export.graph import aten, duplicate
from export.passes import PASSES
from export.program import FusedProgram
from export.runners import Arrays, ProgramRunner
from kernels import conv2d_bias_act_reference

Operator = Callable[..., Tensor]


def fused(x, weight, bias, residual, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    return conv2d_bias_act_reference(
        x, weight, bias, residual, stride=stride, padding=padding, dilation=dilation, groups=groups, relu=relu
    )


def in_one_operator(defect: Operator, applies: Callable[..., bool]) -> Operator:
    """`defect` in the second convolution it applies to, known by its weight; the correct operator elsewhere."""
    seen: list[int] = []

    def operator(*args):  # type: ignore[no-untyped-def]
        weight = args[1].data_ptr()
        if applies(*args) and weight not in seen and len(seen) < 2:
            seen.append(weight)
        return (defect if seen[1:] == [weight] else fused)(*args)

    return operator


def swapped_channels(x, weight, *rest):  # type: ignore[no-untyped-def]
    y = fused(x, weight, *rest)
    order = [1, 0, *range(2, y.shape[1])]
    return y[:, order].contiguous(memory_format=torch.channels_last)


def lost_k_slice(x, weight, *rest):  # type: ignore[no-untyped-def]
    kept = weight.clone()
    kept[:, -max(1, weight.shape[1] // 16) :, -1, -1] = 0
    return fused(x, kept, *rest)


def bf16_arithmetic(x, weight, bias, residual, *rest):  # type: ignore[no-untyped-def]
    residual = None if residual is None else residual.bfloat16()
    return fused(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), residual, *rest).to(x.dtype)


def narrow_accumulation(x, weight, bias, residual, stride, padding, dilation, groups, relu):  # type: ignore[no-untyped-def]
    """Sums of a few products each, added up in the storage type (float16 where that is float32)."""
    narrow = torch.float16 if x.dtype == torch.float32 else x.dtype
    total = None
    for tap in range(weight.shape[2] * weight.shape[3]):
        for start in range(0, weight.shape[1], 4):
            r, s = divmod(tap, weight.shape[3])
            part = torch.zeros_like(weight)
            part[:, start : start + 4, r, s] = weight[:, start : start + 4, r, s]
            product = F.conv2d(x.float(), part.float(), None, stride, padding, dilation, groups).to(narrow)
            total = product if total is None else total + product
    y = total.float() + bias.float()[:, None, None] + (0 if residual is None else residual.float())
    return (y.relu() if relu else y).to(x.dtype).contiguous(memory_format=torch.channels_last)


def corner_pixel(*args):  # type: ignore[no-untyped-def]
    y = fused(*args).clone(memory_format=torch.channels_last)
    y[0, :, -1, -1] = y[0, :, -1, -2]
    return y


def relu_before_addition(x, weight, bias, residual, *geometry_relu):  # type: ignore[no-untyped-def]
    y = fused(x, weight, bias, None, *geometry_relu)
    return y if residual is None else (y + residual).contiguous(memory_format=torch.channels_last)


def dropped_bias(x, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return fused(x, weight, torch.zeros_like(bias), *rest)


def dropped_residual(x, weight, bias, residual, *rest):  # type: ignore[no-untyped-def]
    return fused(x, weight, bias, None, *rest)


def stride_phase(x, weight, bias, residual, stride, *rest):  # type: ignore[no-untyped-def]
    shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
    return fused(shifted.contiguous(memory_format=torch.channels_last), weight, bias, residual, stride, *rest)


def edge_padding(x, weight, bias, residual, stride, padding, *rest):  # type: ignore[no-untyped-def]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode="replicate")
    return fused(padded.contiguous(memory_format=torch.channels_last), weight, bias, residual, stride, [0, 0], *rest)


def transposed_tap(x, weight, *rest):  # type: ignore[no-untyped-def]
    changed = weight.clone()
    changed[:, :, 0, 1], changed[:, :, 1, 0] = weight[:, :, 1, 0], weight[:, :, 0, 1]
    return fused(x, changed, *rest)


def nan_lane(*args):  # type: ignore[no-untyped-def]
    y = fused(*args).clone(memory_format=torch.channels_last)
    y[0, 0, 0, 0] = float("nan")
    return y


def zeros(*args):  # type: ignore[no-untyped-def]
    return torch.zeros_like(fused(*args))


def anywhere(*args):  # type: ignore[no-untyped-def]
    return True


def adds(x, weight, bias, residual, *rest):  # type: ignore[no-untyped-def]
    return residual is not None


def strides(x, weight, bias, residual, stride, *rest):  # type: ignore[no-untyped-def]
    return max(stride) > 1


def pads(x, weight, bias, residual, stride, padding, *rest):  # type: ignore[no-untyped-def]
    return max(padding) > 0


def is_3x3(x, weight, *rest):  # type: ignore[no-untyped-def]
    return weight.shape[2] == 3


OPERATORS: dict[str, tuple[Operator, Callable[..., bool]]] = {
    "two channels swapped": (swapped_channels, anywhere),
    "last K slice lost": (lost_k_slice, anywhere),
    "bfloat16 arithmetic": (bf16_arithmetic, anywhere),
    "narrow accumulation": (narrow_accumulation, is_3x3),
    "one corner pixel wrong": (corner_pixel, anywhere),
    "relu before the addition": (relu_before_addition, adds),
    "bias dropped": (dropped_bias, anywhere),
    "residual dropped": (dropped_residual, adds),
    "stride-2 phase off by one": (stride_phase, strides),
    "padding with the edge value": (edge_padding, pads),
    "one tap transposed": (transposed_tap, is_3x3),
    "one operator returns zeros": (zeros, anywhere),
    "NaN in one lane": (nan_lane, anywhere),
}


class ConstantLogits(ProgramRunner):
    """Answers every image with the first image's logits."""

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        return {name: np.repeat(y[:1], len(y), axis=0) for name, y in super().infer(inputs).items()}


class AllZeros(ProgramRunner):
    """Never writes its output."""

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        return {name: np.zeros_like(y) for name, y in super().infer(inputs).items()}


class StaleOutput(ProgramRunner):
    """Returns what the batch before this one gave."""

    previous: Arrays | None = None

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        outputs = super().infer(inputs)
        stale = self.previous or outputs
        self.previous = outputs
        return {name: np.resize(stale[name], y.shape) for name, y in outputs.items()}


class WritesItsInput(ProgramRunner):
    """Normalises its input in place."""

    def infer(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        outputs = super().infer(inputs)
        np.multiply(inputs["input"], 0.5, out=inputs["input"])
        return outputs


RUNNERS: dict[str, type[ProgramRunner]] = {
    "constant logits": ConstantLogits,
    "all zeros": AllZeros,
    "stale output of the previous batch": StaleOutput,
    "input written to": WritesItsInput,
}


def with_wrong_epsilon(program: FusedProgram) -> FusedProgram:
    """Folded with eps = 1e-3 in place of 1e-5; checked against the right captured graph."""
    graph_module: fx.GraphModule = duplicate(program.source)
    for node in graph_module.graph.nodes:
        if node.target is aten._native_batch_norm_legit_no_training.default:
            node.args = (*node.args[:6], 1e-3)
    graph_module.recompile()
    with plain_torch():
        for apply in PASSES:
            graph_module = apply(graph_module)
    return FusedProgram(program.source, graph_module, program.batch)
