"""Fuse conv -> relu -> 1x1 conv, the last two convolutions of a bottleneck, into one `conv2d_conv1x1_bias_act`."""

from __future__ import annotations

from typing import Any

from torch import fx

from export.fusion.nodes import (
    copy_meta,
    duplicate,
    fused_args,
    fused_call,
    is_call,
    only_reader,
    parameter,
    resnet_deploy,
)
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.conv2d_conv1x1_bias_act import Conv2dConv1x1BiasAct
from kernels.operators.conv2d_projection_bias_act import Conv2dProjectionBiasAct


def fuse_bottleneck(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Let each 1x1 convolution take the convolution with ReLU before it, where it alone reads that one.

    The first has one group, no residual and a kernel larger than 1x1. The second has stride 1, padding 0
    and one group, no activation but ReLU, may have a shortcut or a projection, and reads the first as its input and
    nowhere else.
    """
    graph_module = duplicate(graph_module)
    for expand in list(graph_module.graph.nodes):
        if not _expands(graph_module, expand):
            continue
        conv: fx.Node = _expand_args(expand).x
        if _feeds(graph_module, conv, expand):
            _replace(graph_module, conv, expand)
    graph_module.recompile()
    return graph_module


def _expands(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if not is_call(node, resnet_deploy.conv2d_bias_act.default, resnet_deploy.conv2d_projection_bias_act.default):
        return False
    a = _expand_args(node)
    pointwise = parameter(graph_module, a.weight).shape[2:] == (1, 1)
    return pointwise and not a.activation and (a.stride, a.padding, getattr(a, "groups", 1)) == ((1, 1), (0, 0), 1)


def _expand_args(node: fx.Node) -> Conv2dBiasAct[Any] | Conv2dProjectionBiasAct[Any]:
    if is_call(node, resnet_deploy.conv2d_bias_act.default):
        return fused_args(Conv2dBiasAct, node)
    return fused_args(Conv2dProjectionBiasAct, node)


def _feeds(graph_module: fx.GraphModule, conv: fx.Node, expand: fx.Node) -> bool:
    if not is_call(conv, resnet_deploy.conv2d_bias_act.default) or only_reader(conv) is not expand:
        return False
    a = fused_args(Conv2dBiasAct, conv)
    pointwise = parameter(graph_module, a.weight).shape[2:] == (1, 1)
    return a.relu and a.groups == 1 and a.residual is None and not pointwise


def _replace(graph_module: fx.GraphModule, conv: fx.Node, expand: fx.Node) -> None:
    a, e = fused_args(Conv2dBiasAct, conv), _expand_args(expand)
    pair = Conv2dConv1x1BiasAct(
        a.x,
        a.weight,
        a.bias,
        e.weight,
        e.bias,
        *((e.shortcut, e.shortcut_weight) if isinstance(e, Conv2dProjectionBiasAct) else (e.residual, None)),
        stride=a.stride,
        padding=a.padding,
        dilation=a.dilation,
        shortcut_stride=e.shortcut_stride if isinstance(e, Conv2dProjectionBiasAct) else (1, 1),
        relu=e.relu,
    )
    with graph_module.graph.inserting_before(expand):
        new = fused_call(graph_module.graph, pair)
    owners = {
        name if name == "shortcut_weight" else f"expand_{name}": owner for name, owner in expand.meta["weights"].items()
    }
    new.meta = {
        "nn_module_stack": expand.meta["nn_module_stack"],
        "fused": [*conv.meta["fused"], *expand.meta["fused"]],
        "weights": {**conv.meta["weights"], **owners},
    }
    copy_meta(new, expand)
    expand.replace_all_uses_with(new)
    graph_module.graph.erase_node(expand)
    graph_module.graph.erase_node(conv)
