"""Merge the 1x1 convolution of a shortcut into the convolution it is added to: `conv2d_projection_bias_act`."""

from __future__ import annotations

from torch import fx

from export.fusion.nodes import (
    add_constant,
    copy_meta,
    duplicate,
    fused_args,
    fused_call,
    is_call,
    module_path,
    only_reader,
    parameter,
    resnet_deploy,
)
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.conv2d_projection_bias_act import Conv2dProjectionBiasAct


def merge_projection(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Where two convolutions are added, let one take the other, a plain 1x1 convolution, as its projection.

    The projection has padding 0, dilation 1, one group, no activation of its own and no other reader; the other
    convolution has one group. Either may be the left summand. Where both qualify as the projection, it is
    the one whose input has other readers: a shortcut leaves the trunk, a branch has its input to itself.
    The bias is the sum of both, in the type of the graph's parameters, float64 in this project.
    """
    graph_module = duplicate(graph_module)
    for node in list(graph_module.graph.nodes):
        summands = _summands(node)
        if summands is None:
            continue
        pairs = [(main, other) for main, other in (summands, summands[::-1]) if _mergeable(graph_module, main, other)]
        if pairs:
            main, projection = min(pairs, key=lambda pair: only_reader(fused_args(Conv2dBiasAct, pair[0]).x) is None)
            _replace(graph_module, node, main, projection)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two convolutions that `node` adds: the one it computes, and the one it alone reads as its residual."""
    if not is_call(node, resnet_deploy.conv2d_bias_act.default):
        return None
    other = fused_args(Conv2dBiasAct, node).residual
    if not is_call(other, resnet_deploy.conv2d_bias_act.default) or only_reader(other) is not node:
        return None
    a = fused_args(Conv2dBiasAct, other)
    return (node, other) if a.residual is None and not a.relu and not a.activation else None


def _mergeable(graph_module: fx.GraphModule, main: fx.Node, projection: fx.Node) -> bool:
    a, p = fused_args(Conv2dBiasAct, main), fused_args(Conv2dBiasAct, projection)
    pointwise = parameter(graph_module, p.weight).shape[2:] == (1, 1)
    plain = (p.padding, p.dilation, p.groups) == ((0, 0), (1, 1), 1)
    return pointwise and plain and a.groups == 1


def _replace(graph_module: fx.GraphModule, node: fx.Node, main: fx.Node, projection: fx.Node) -> None:
    """Put `main`, with `projection` as its shortcut, in the place of `node`, which is one of them."""
    a, p = fused_args(Conv2dBiasAct, main), fused_args(Conv2dBiasAct, projection)
    name, act = module_path(main), fused_args(Conv2dBiasAct, node)
    with graph_module.graph.inserting_before(node):
        total = parameter(graph_module, a.bias) + parameter(graph_module, p.bias)
        bias = add_constant(graph_module, f"{name}.bias", total)
        merged = Conv2dProjectionBiasAct(
            a.x,
            a.weight,
            bias,
            p.x,
            p.weight,
            stride=a.stride,
            padding=a.padding,
            dilation=a.dilation,
            shortcut_stride=p.stride,
            relu=act.relu,
            activation=act.activation,
            negative_slope=act.negative_slope,
            slope=act.slope,
        )
        new = fused_call(graph_module.graph, merged)
    other = next(n for n in (main, projection) if n is not node)
    new.meta = {
        "nn_module_stack": main.meta["nn_module_stack"],
        "fused": [*other.meta["fused"], *node.meta["fused"]],
        "weights": {**node.meta["weights"], **main.meta["weights"], "shortcut_weight": module_path(projection)},
    }
    copy_meta(new, node)
    node.replace_all_uses_with(new)
    graph_module.graph.erase_node(node)
    graph_module.graph.erase_node(other)
