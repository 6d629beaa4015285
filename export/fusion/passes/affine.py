"""What multiplies by and adds constants, one of each per channel: x * s + t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from export.fusion.nodes import (
    add_constant,
    args_of,
    aten,
    constant,
    first_output,
    is_call,
    module_path,
    named_args,
    same_shape,
)

_ARITHMETIC = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.rsub.Scalar)
BATCH_NORM = (aten._native_batch_norm_legit_no_training.default, aten.native_batch_norm.default)


@dataclass(frozen=True)
class Affine:
    """`output` = `x` * `scale` + `shift`, with a scale and a shift of shape [C] for axis 1 of x.

    Attributes:
        call: the BatchNorm, or the multiplication or addition, which then is the output too.
    """

    call: fx.Node
    x: fx.Node
    scale: Tensor
    shift: Tensor
    output: fx.Node

    @property
    def is_batch_norm(self) -> bool:
        return is_call(self.call, *BATCH_NORM)


def is_inference_batch_norm(node: object) -> bool:
    """Whether a call normalises by running statistics, not by those of the batch."""
    return is_call(node, *BATCH_NORM) and not named_args(node).get("training")


def affine_of(graph_module: fx.GraphModule, node: fx.Node) -> Affine | None:
    """What `node` multiplies with and adds; None where it does something else or with what is computed.

    A BatchNorm by running statistics is one. So is the sum with, product with or difference from a constant that is a
    number or has one value per channel, and the quotient by one.
    """
    if is_inference_batch_norm(node):
        scale_shift, output = batch_norm_scale_and_shift(graph_module, node), first_output(node)
        if scale_shift is None or output is None:
            return None
        return Affine(node, args_of(node)[0], *scale_shift, output)
    return _of_arithmetic(graph_module, node)


def batch_norm_scale_and_shift(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """s = gamma / sqrt(var + eps) and t = beta - mean * s; gamma 1 and beta 0 where affine=False.

    None where they are computed in the forward pass.
    """
    (_, gamma_node, beta_node, mean_node, var_node), eps = args_of(node)[:5], args_of(node)[-1]
    mean, var = constant(graph_module, mean_node), constant(graph_module, var_node)
    gamma, beta = constant(graph_module, gamma_node), constant(graph_module, beta_node)
    computed = [n for n in (gamma_node, beta_node) if n is not None and constant(graph_module, n) is None]
    if mean is None or var is None or computed:
        return None
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = gamma * scale
    shift = -mean * scale
    if beta is not None:
        shift = beta + shift
    return scale, shift


def multiply_add(graph_module: fx.GraphModule, affine: Affine) -> fx.Node:
    """A BatchNorm as x * s + t: exact in any type, and standard operators when lowered."""
    graph, name = graph_module.graph, module_path(affine.call)
    channel_shape = (-1, *[1] * (affine.x.meta["val"].dim() - 2))
    with graph.inserting_before(affine.call):
        scale = add_constant(graph_module, f"{name}.scale", affine.scale.reshape(channel_shape))
        shift = add_constant(graph_module, f"{name}.shift", affine.shift.reshape(channel_shape))
        scaled = graph.call_function(aten.mul.Tensor, (affine.x, scale))
        scaled.meta = {**affine.output.meta, "source": None}  # the captured graph has no such value
        return graph.call_function(aten.add.Tensor, (scaled, shift))


def _of_arithmetic(graph_module: fx.GraphModule, node: fx.Node) -> Affine | None:
    if not is_call(node, aten.neg.default, *_ARITHMETIC):
        return None
    operands: list[Any] = [*args_of(node)[:2]]
    if is_call(node, aten.neg.default):
        operands.append(-1.0)
    elif len(node.args) > 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    x = next((n for n in operands if isinstance(n, fx.Node) and constant(graph_module, n) is None), None)
    if x is None or not same_shape(x, node):
        return None
    others = [n for n in operands if n is not x]
    value = _per_channel(graph_module, others[0], x) if len(others) == 1 else None
    if value is None:
        return None
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    if is_call(node, aten.mul.Tensor, aten.neg.default):
        scale, shift = value, zero
    elif is_call(node, aten.add.Tensor):
        scale, shift = one, value
    elif is_call(node, aten.rsub.Scalar) or (is_call(node, aten.sub.Tensor) and operands[1] is x):
        scale, shift = -one, value
    elif is_call(node, aten.sub.Tensor):
        scale, shift = one, -value
    elif operands[0] is x and bool((value != 0).all()):
        scale, shift = 1 / value, zero
    else:
        return None
    return Affine(node, x, scale, shift, node)


def _per_channel(graph_module: fx.GraphModule, value: object, x: fx.Node) -> Tensor | None:
    """A number or constant as [C] float64, where along every axis but the channels' it has one value."""
    like = x.meta["val"]
    if like.dim() not in (2, 4) or not isinstance(like.shape[1], int) or isinstance(value, bool):
        return None
    held = constant(graph_module, value) if isinstance(value, fx.Node) else torch.tensor(value, dtype=torch.float64)
    if held is None or held.dim() > like.dim() or not held.is_floating_point():
        return None
    channels = like.shape[1]
    shape = (*[1] * (like.dim() - held.dim()), *held.shape)
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1) or shape[1] not in (1, channels):
        return None
    return held.detach().double().reshape(-1).expand(channels)
