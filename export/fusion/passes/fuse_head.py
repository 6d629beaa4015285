"""Fuse global average pooling and the linear layer behind it into one `mean_linear`."""

from __future__ import annotations

from torch import Tensor, fx

from export.fusion.nodes import (
    add_constant,
    args_of,
    aten,
    constant,
    copy_meta,
    duplicate,
    fused_call,
    is_call,
    module_path,
    named_args,
    only_reader,
    parameter,
)
from kernels.operators.mean_linear import MeanLinear

# Between the two, what leaves the values and their order as they are (dropout in eval mode).
_KEEPS_ORDER = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


def fuse_head(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Let each linear layer with constant parameters take the mean over all pixels that it alone reads.

    Between them may be what brings the mean to [N, C]. A linear layer behind such a mean that is left says
    why.
    """
    graph_module = duplicate(graph_module)
    for linear in list(graph_module.graph.nodes):
        if not is_call(linear, aten.linear.default):
            continue
        between = _between(linear)
        mean = args_of(between[-1] if between else linear)[0]
        if not _averages_pixels(mean):
            continue
        reason = _why_not_fusible(graph_module, mean, between, linear)
        if reason is None:
            _replace(graph_module, mean, between, linear)
        else:
            linear.meta["refused"] = f"not fused with {module_path(mean)}: {reason}"
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _between(linear: fx.Node) -> list[fx.Node]:
    """The calls before `linear` that only reshape, the last first."""
    chain: list[fx.Node] = []
    node = args_of(linear)[0]
    while is_call(node, *_KEEPS_ORDER) and not named_args(node).get("train"):
        chain.append(node)
        node = args_of(node)[0]
    return chain


def _averages_pixels(node: object) -> bool:
    """Whether a call is a mean over height and width, in the type of its input."""
    if not is_call(node, aten.mean.dim) or named_args(node)["dtype"] is not None:
        return False
    x = args_of(node)[0].meta["val"]
    return x.dim() == 4 and sorted(axis % 4 for axis in named_args(node)["dim"]) == [2, 3]


def _why_not_fusible(
    graph_module: fx.GraphModule, mean: fx.Node, between: list[fx.Node], linear: fx.Node
) -> str | None:
    a, x = named_args(linear), args_of(mean)[0].meta["val"]
    if constant(graph_module, a["weight"]) is None:
        return "the weight is computed in the forward pass"
    if a["bias"] is not None and constant(graph_module, a["bias"]) is None:
        return "the bias is computed in the forward pass"
    readers = zip([mean, *reversed(between)], [*reversed(between), linear], strict=True)
    shared = next((node for node, reader in readers if only_reader(node) is not reader), None)
    if shared is not None:
        return f"{module_path(shared)} has {len(shared.users)} readers"
    pooled: Tensor = args_of(linear)[0].meta["val"]
    if [*map(str, pooled.shape)] != [*map(str, x.shape[:2])]:
        return "the mean does not arrive with one row of channels per image"
    return None


def _replace(graph_module: fx.GraphModule, mean: fx.Node, between: list[fx.Node], linear: fx.Node) -> None:
    a, name = named_args(linear), module_path(linear)
    with graph_module.graph.inserting_before(linear):
        bias = a["bias"]
        if bias is None:
            weight = parameter(graph_module, a["weight"])
            bias = add_constant(graph_module, f"{name}.bias", weight.new_zeros(weight.shape[0]))
        new = fused_call(graph_module.graph, MeanLinear(args_of(mean)[0], a["weight"], bias))
    new.meta = {"fused": [module_path(mean), name], "weights": {"weight": name, "bias": name}}
    copy_meta(new, linear)
    linear.replace_all_uses_with(new)
    for node in (linear, *between, mean):
        graph_module.graph.erase_node(node)
