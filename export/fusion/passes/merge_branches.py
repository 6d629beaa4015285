"""Add up convolutions of one input as one convolution, as RepVGG does once it is trained.

With the smaller kernels embedded where their taps lie, W = W1 + W2 and b = b1 + b2. A scaled and shifted copy of the
input is a 1x1 convolution whose weight is diagonal: such is the BatchNorm of an identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
    pair,
    same_shape,
)
from export.fusion.passes.affine import affine_of


@dataclass(frozen=True)
class _Branch:
    """A convolution of `x`; `nodes` compute it, the last first, and nothing else reads them."""

    nodes: tuple[fx.Node, ...]
    x: fx.Node
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    parts: tuple[str, ...]


def merge_branches(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace each sum of two convolutions of one input, undilated and alike in stride and groups, by one convolution.

    One of them may be the input itself, scaled and shifted; an input that is added as it is stays a residual. The taps
    of the smaller kernel must lie within those of the larger. What remains is compared with the next summand.
    """
    graph_module = duplicate(graph_module)
    for addition in list(graph_module.graph.nodes):
        if is_call(addition, aten.add.Tensor) and len(addition.args) == 2 and not addition.kwargs:
            _merge(graph_module, addition)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _merge(graph_module: fx.GraphModule, addition: fx.Node) -> None:
    left, right = args_of(addition)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or not same_shape(left, right):
        return
    if only_reader(left) is not addition or only_reader(right) is not addition:
        return
    branches = [_convolution(graph_module, node) for node in (left, right)]
    main = next((branch for branch in branches if branch is not None), None)
    if main is None:
        return
    copies = [
        branch or _scaled_copy(graph_module, node, main) for branch, node in zip(branches, (left, right), strict=True)
    ]
    if copies[0] is None or copies[1] is None:
        return
    merged = _sum(copies[0], copies[1])
    if merged is None:
        return
    conv = next(node for node in (merged.nodes[0], main.nodes[0]) if is_call(node, aten.conv2d.default))
    name = module_path(conv)
    with graph_module.graph.inserting_before(addition):
        weight = add_constant(graph_module, f"{name}.weight", merged.weight)
        bias = None if merged.bias is None else add_constant(graph_module, f"{name}.bias", merged.bias)
        geometry = ([*merged.stride], [*merged.padding], [1, 1], merged.groups)
        new = graph_module.graph.call_function(aten.conv2d.default, (merged.x, weight, bias, *geometry))
    parts = [*merged.parts, module_path(addition)]
    new.meta = {"nn_module_stack": conv.meta.get("nn_module_stack"), "fused": list(dict.fromkeys(parts))}
    copy_meta(new, addition)
    addition.replace_all_uses_with(new)
    for node in (addition, *merged.nodes):
        graph_module.graph.erase_node(node)


def _convolution(graph_module: fx.GraphModule, conv: fx.Node) -> _Branch | None:
    if not is_call(conv, aten.conv2d.default) or conv.meta["val"].dim() != 4:
        return None
    a = named_args(conv)
    weight, bias = constant(graph_module, a["weight"]), constant(graph_module, a["bias"])
    if weight is None or (bias is None and a["bias"] is not None) or pair(a["dilation"]) != (1, 1):
        return None
    parts = (*conv.meta.get("fused", [module_path(conv)]),)
    return _Branch((conv,), a["input"], weight, bias, pair(a["stride"]), pair(a["padding"]), a["groups"], parts)


def _scaled_copy(graph_module: fx.GraphModule, node: fx.Node, like: _Branch) -> _Branch | None:
    """x * s + t of the input of `like` as a 1x1 convolution of the same groups."""
    nodes: list[fx.Node] = []
    parts: list[str] = []
    scale = shift = None
    reader: fx.Node | None = None
    while node is not like.x:
        affine = affine_of(graph_module, node)
        if affine is None or affine.is_batch_norm or (reader is not None and only_reader(node) is not reader):
            return None
        shift = affine.shift if shift is None or scale is None else scale * affine.shift + shift
        scale = affine.scale if scale is None else scale * affine.scale
        nodes.append(node)
        parts.append(module_path(node))
        node, reader = affine.x, node
    if scale is None or like.stride != (1, 1):
        return None
    channels = len(scale)
    weight = scale.new_zeros(channels, channels // like.groups, 1, 1)
    index = torch.arange(channels)
    weight[index, index % (channels // like.groups), 0, 0] = scale
    names = tuple(dict.fromkeys(reversed(parts)))
    return replace(like, nodes=tuple(nodes), weight=weight, bias=shift, padding=(0, 0), parts=names)


def _sum(a: _Branch, b: _Branch) -> _Branch | None:
    """One convolution of the larger kernel; None where the two do not read the same pixels."""
    if a.weight[0, 0].numel() < b.weight[0, 0].numel():
        return _sum(b, a)
    if a.x is not b.x or (a.stride, a.groups) != (b.stride, b.groups):
        return None
    (top, left), (rows, columns) = (
        [p - q for p, q in zip(a.padding, b.padding, strict=True)],
        [m - n for m, n in zip(a.weight.shape[2:], b.weight.shape[2:], strict=True)],
    )
    if not 0 <= top <= rows or not 0 <= left <= columns:
        return None
    weight = a.weight + F.pad(b.weight, (left, columns - left, top, rows - top))
    biases = [bias for bias in (a.bias, b.bias) if bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    return replace(a, nodes=(*a.nodes, *b.nodes), weight=weight, bias=bias, parts=(*a.parts, *b.parts))
