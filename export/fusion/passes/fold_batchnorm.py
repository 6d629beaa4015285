"""Fold inference BatchNorm, and constant scales and shifts, into the layer before or behind it.

With s and t of `affine.py`, for BatchNorm s = gamma / sqrt(var + eps) and t = beta - mean * s:

    behind a layer    W' = W * s  and  b' = b * s + t                      per output channel
    before it         W' = W * s  and  b' = b + sum of W * t               per input channel
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from export.fusion.nodes import (
    add_constant,
    args_of,
    aten,
    constant,
    copy_meta,
    duplicate,
    is_call,
    module_path,
    named_args,
    only_reader,
    parameter,
)
from export.fusion.passes.affine import (
    BATCH_NORM,
    Affine,
    affine_of,
    batch_norm_scale_and_shift,
    is_inference_batch_norm,
    multiply_add,
)

_BATCH_STATISTICS = (aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit.default)
_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
_TRANSPOSED = aten.conv_transpose2d.input
_LAYERS = (*_CONVOLUTIONS, _TRANSPOSED, aten.linear.default)
# A number, unlike a BatchNorm, may make weights of any size: not below this, where float16 loses digits of the smaller
# ones (its smallest normal number is 2^-14).
_SMALLEST_WEIGHT = 2.0**-8
# Root mean square. What is normalised has values of about 1; were its mean several of them, weights that are rounded
# would be multiplied by the mean too, which the network never does.
_LARGEST_SHIFT = 2.0
# Root mean square. A bias is rounded once for all images: of a constant that is several times what it is added to, such
# as a mean age, that would be an error that all share.
_LARGEST_BIAS = 8.0


def fold_batchnorm(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Fold each BatchNorm, scale and shift that alone reads a convolution, transposed or not, or linear layer.

    What is left of BatchNorm is written as x * s + t, and folded into the layer behind it where that is exact: padding
    sees no shift. Computed in the type of the graph's parameters, float64 in this project. A BatchNorm that uses the
    statistics of the batch itself (track_running_stats=False) is not a constant map and stays.
    """
    graph_module = duplicate(graph_module)
    for node in list(graph_module.graph.nodes):
        _fold_behind(graph_module, node)
    graph_module.graph.eliminate_dead_code()
    for node in list(graph_module.graph.nodes):
        _fold_before(graph_module, node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def constant_channels(graph_module: fx.GraphModule) -> list[str]:
    """One line for each BatchNorm with a running variance of 0: only eps then limits what it multiplies with."""
    found = []
    for node in graph_module.graph.nodes:
        scale_shift = batch_norm_scale_and_shift(graph_module, node) if is_inference_batch_norm(node) else None
        if scale_shift is not None:
            constant_ones = parameter(graph_module, args_of(node)[4]) == 0
            if bool(constant_ones.any()):
                gain = scale_shift[0][constant_ones].abs().max().item()
                count = f"running_var is 0 in {int(constant_ones.sum())} of {len(constant_ones)} channels"
                found.append(f"{module_path(node)}: {count}, which are multiplied by up to {gain:.4g}")
    return found


def _fold_behind(graph_module: fx.GraphModule, node: fx.Node) -> None:
    if is_call(node, *_BATCH_STATISTICS) or (is_call(node, *BATCH_NORM) and not is_inference_batch_norm(node)):
        node.meta["refused"] = "BatchNorm without running statistics depends on the batch"
        return
    affine = affine_of(graph_module, node)
    if affine is None:
        if is_inference_batch_norm(node):
            node.meta["refused"] = "BatchNorm parameters are computed in the forward pass"
        return
    reason = _why_not_foldable(graph_module, affine)
    if reason is None:
        new = _with_output_scaled(graph_module, affine)
    elif affine.is_batch_norm:
        new = multiply_add(graph_module, affine)
        new.meta["refused"] = f"BatchNorm not folded: {reason}"
    else:
        return
    copy_meta(new, affine.output)
    affine.output.replace_all_uses_with(new)
    for erased in dict.fromkeys((affine.output, affine.call)):
        graph_module.graph.erase_node(erased)


def _why_not_foldable(graph_module: fx.GraphModule, affine: Affine) -> str | None:
    layer = affine.x
    if not is_call(layer, *_LAYERS):
        return "its input is not a 2-D convolution"
    kind = "linear layer" if is_call(layer, aten.linear.default) else "convolution"
    if args_of(layer)[0].meta["val"].dim() != (2 if kind == "linear layer" else 4):
        return f"the {kind}'s output is not one {'row' if kind == 'linear layer' else 'map'} per image"
    if len(layer.users) > 1 or only_reader(layer) is None:
        return f"the {kind}'s output has {len(layer.users)} readers"
    reason = _why_not_constant(graph_module, layer, kind)
    if reason is None and not affine.is_batch_norm:
        weight = parameter(graph_module, args_of(layer)[1])
        reason = _why_too_small(weight, _output_scaled(layer, weight, affine.scale))
        if affine.shift.square().mean().sqrt() > _LARGEST_BIAS:
            reason = "what is added is large, and rounded apart"
    return reason


def _why_not_constant(graph_module: fx.GraphModule, layer: fx.Node, kind: str) -> str | None:
    a = named_args(layer)
    if constant(graph_module, a["weight"]) is None:
        return f"the {kind}'s weight is computed in the forward pass"
    if a["bias"] is not None and constant(graph_module, a["bias"]) is None:
        return f"the {kind}'s bias is computed in the forward pass"
    return None


def _why_too_small(weight: Tensor, scaled: Tensor) -> str | None:
    """Why a scaled weight holds less than the weight did in 16 bits."""
    largest = scaled.abs().max().item()
    if 0 < largest < min(_SMALLEST_WEIGHT, weight.abs().max().item()):
        return f"the scaled weights are {largest:.2g} and smaller"
    return None


def _output_scaled(layer: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    if not is_call(layer, _TRANSPOSED):
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = named_args(layer)["groups"]  # [C_IN, C_OUT / groups, R, S]: the first axis goes through the groups
    by_group = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, 1, 1)
    return by_group.reshape(weight.shape)


def _with_output_scaled(graph_module: fx.GraphModule, affine: Affine) -> fx.Node:
    """The layer with what is behind it folded in. Its own parameters are left for other readers."""
    layer = affine.x
    weight, bias = parameter(graph_module, args_of(layer)[1]), constant(graph_module, named_args(layer)["bias"])
    folded_bias = affine.shift if bias is None else bias * affine.scale + affine.shift
    parts = [*layer.meta.get("fused", [module_path(layer)]), module_path(affine.call)]
    return _layer(graph_module, layer, affine.call, _output_scaled(layer, weight, affine.scale), folded_bias, parts)


def _layer(
    graph_module: fx.GraphModule, layer: fx.Node, before: fx.Node, weight: Tensor, bias: Tensor, parts: list[str]
) -> fx.Node:
    """`layer` with other parameters, ahead of the node `before`."""
    name, target = module_path(layer), cast(Callable[..., Any], layer.target)
    with graph_module.graph.inserting_before(before):
        weight_node = add_constant(graph_module, f"{name}.weight", weight)
        bias_node = add_constant(graph_module, f"{name}.bias", bias)
        new = graph_module.graph.call_function(
            target, (args_of(layer)[0], weight_node, bias_node, *args_of(layer)[3:]), dict(layer.kwargs)
        )
    new.meta = {"nn_module_stack": layer.meta.get("nn_module_stack"), "fused": parts}
    return new


def _fold_before(graph_module: fx.GraphModule, layer: fx.Node) -> None:
    """Fold all that scales and shifts the input of `layer`, as one, into it."""
    if not is_call(layer, *_CONVOLUTIONS, aten.linear.default):
        return
    steps: list[Affine] = []
    node, reader = args_of(layer)[0], layer
    while only_reader(node) is reader and (affine := affine_of(graph_module, node)) is not None:
        steps.append(affine)
        node, reader = affine.x, node
    if (
        not steps
        or _why_not_constant(graph_module, layer, "layer")
        or layer.meta["val"].dim() != node.meta["val"].dim()
    ):
        return
    scale, shift = torch.ones_like(steps[0].scale), torch.zeros_like(steps[0].shift)
    for affine in reversed(steps):
        scale, shift = scale * affine.scale, shift * affine.scale + affine.shift
    weight, bias = parameter(graph_module, args_of(layer)[1]), constant(graph_module, named_args(layer)["bias"])
    scaled = _by_input(layer, weight, scale)
    sees_shift = _pads(graph_module, layer) and bool((shift != 0).any())
    if sees_shift or shift.square().mean().sqrt() > _LARGEST_SHIFT or _why_too_small(weight, scaled):
        return
    shifts = _by_input(layer, weight, shift).flatten(1).sum(1)
    parts = [*(module_path(affine.call) for affine in reversed(steps))]
    parts += layer.meta.get("fused", [module_path(layer)])
    folded_bias = shifts if bias is None else bias + shifts
    new = _layer(graph_module, layer, layer, scaled, folded_bias, list(dict.fromkeys(parts)))
    new.args = (node, *new.args[1:])
    copy_meta(new, layer)
    layer.replace_all_uses_with(new)
    graph_module.graph.erase_node(layer)


def _by_input(layer: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight [C_OUT, C_IN / groups, ...] times one factor per input channel."""
    groups = named_args(layer).get("groups", 1)
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    return (by_group * scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def _pads(graph_module: fx.GraphModule, layer: fx.Node) -> bool:
    """Whether a layer reads beyond its input's border."""
    padding = named_args(layer).get("padding", [0, 0])
    if padding == "same":
        return any(size > 1 for size in parameter(graph_module, args_of(layer)[1]).shape[2:])
    return padding != "valid" and any(size > 0 for size in padding)
