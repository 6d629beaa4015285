"""Fold inference BatchNorm into the convolution before it.

With s = gamma / sqrt(var + eps):  W' = W * s  and  b' = (b - mean) * s + beta.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from export.fusion.nodes import (
    add_constant,
    args_of,
    aten,
    constant,
    copy_meta,
    duplicate,
    first_output,
    is_call,
    module_path,
    parameter,
)

_BATCH_NORM = aten._native_batch_norm_legit_no_training.default
_BATCH_STATISTICS = (aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit.default)


def fold_batchnorm(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Fold each BatchNorm that is the only reader of a convolution; write the others as x * s + t.

    Computed in the type of the graph's parameters, float64 in this project. A BatchNorm that uses the
    statistics of the batch itself (track_running_stats=False) is not a constant map and stays.
    """
    graph_module = duplicate(graph_module)
    for node in list(graph_module.graph.nodes):
        if is_call(node, *_BATCH_STATISTICS):
            node.meta["refused"] = "BatchNorm without running statistics depends on the batch"
        if not is_call(node, _BATCH_NORM):
            continue
        scale_shift = _scale_and_shift(graph_module, node)
        output = first_output(node)
        if scale_shift is None or output is None:
            node.meta["refused"] = "BatchNorm parameters are computed in the forward pass"
            continue
        reason = _why_not_foldable(graph_module, args_of(node)[0])
        if reason is None:
            new = _fold(graph_module, node, *scale_shift)
        else:
            new = _multiply_add(graph_module, node, output, *scale_shift)
            new.meta["refused"] = f"BatchNorm not folded: {reason}"
        copy_meta(new, output)
        output.replace_all_uses_with(new)
        graph_module.graph.erase_node(output)
        graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def constant_channels(graph_module: fx.GraphModule) -> list[str]:
    """One line for each BatchNorm with a running variance of 0: only eps then limits what it multiplies with."""
    found = []
    for node in graph_module.graph.nodes:
        scale_shift = _scale_and_shift(graph_module, node) if is_call(node, _BATCH_NORM) else None
        if scale_shift is not None:
            constant_ones = parameter(graph_module, args_of(node)[4]) == 0
            if bool(constant_ones.any()):
                gain = scale_shift[0][constant_ones].abs().max().item()
                count = f"running_var is 0 in {int(constant_ones.sum())} of {len(constant_ones)} channels"
                found.append(f"{module_path(node)}: {count}, which are multiplied by up to {gain:.4g}")
    return found


def _scale_and_shift(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """s = gamma / sqrt(var + eps) and t = beta - mean * s; gamma 1 and beta 0 where affine=False."""
    _, gamma_node, beta_node, mean_node, var_node, _, eps = args_of(node)
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


def _why_not_foldable(graph_module: fx.GraphModule, conv: object) -> str | None:
    if not is_call(conv, aten.conv2d.default, aten.conv2d.padding):
        return "its input is not a 2-D convolution"
    if args_of(conv)[0].meta["val"].dim() != 4:
        return "the convolution's input has no batch dimension"
    if len(conv.users) > 1:
        return f"the convolution's output has {len(conv.users)} readers"
    if constant(graph_module, args_of(conv)[1]) is None:
        return "the convolution's weight is computed in the forward pass"
    if len(conv.args) > 2 and args_of(conv)[2] is not None and constant(graph_module, args_of(conv)[2]) is None:
        return "the convolution's bias is computed in the forward pass"
    return None


def _fold(graph_module: fx.GraphModule, node: fx.Node, scale: Tensor, shift: Tensor) -> fx.Node:
    """A convolution with the BatchNorm `node` folded in. Its own parameters are left for other readers."""
    conv = args_of(node)[0]
    weight = parameter(graph_module, args_of(conv)[1])
    bias = constant(graph_module, args_of(conv)[2]) if len(conv.args) > 2 else None
    folded_bias = shift if bias is None else bias * scale + shift
    name = module_path(conv)
    with graph_module.graph.inserting_before(node):
        weight_node = add_constant(graph_module, f"{name}.weight", weight * scale[:, None, None, None])
        bias_node = add_constant(graph_module, f"{name}.bias", folded_bias)
        new = graph_module.graph.call_function(
            conv.target, (args_of(conv)[0], weight_node, bias_node, *args_of(conv)[3:]), dict(conv.kwargs)
        )
    new.meta = {"nn_module_stack": conv.meta.get("nn_module_stack"), "fused": [name, module_path(node)]}
    return new


def _multiply_add(
    graph_module: fx.GraphModule, node: fx.Node, output: fx.Node, scale: Tensor, shift: Tensor
) -> fx.Node:
    """x * s + t per channel: exact in any type, and standard operators when lowered."""
    name, channel_shape = module_path(node), (-1, *[1] * (args_of(node)[0].meta["val"].dim() - 2))
    with graph_module.graph.inserting_before(node):
        scale_node = add_constant(graph_module, f"{name}.scale", scale.reshape(channel_shape))
        shift_node = add_constant(graph_module, f"{name}.shift", shift.reshape(channel_shape))
        scaled = graph_module.graph.call_function(aten.mul.Tensor, (args_of(node)[0], scale_node))
        scaled.meta = {**output.meta, "source": None}  # the captured graph has no such value
        new = graph_module.graph.call_function(aten.add.Tensor, (scaled, shift_node))
    return new
