"""Fuse conv -> relu -> max-pool, the stem of an ImageNet ResNet, into one `conv2d_bias_relu_maxpool`."""

from __future__ import annotations

from torch import fx

from export.fusion.nodes import (
    args_of,
    aten,
    copy_meta,
    duplicate,
    fused_args,
    fused_call,
    is_call,
    module_path,
    named_args,
    only_reader,
    pair,
    resnet_deploy,
)
from kernels.operators.conv2d_bias_act import Conv2dBiasAct
from kernels.operators.conv2d_bias_relu_maxpool import Conv2dBiasReluMaxpool


def fuse_stem(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Let each convolution with ReLU take the 3x3 max-pool of stride 2 and padding 1 that alone reads it.

    A max-pool after a convolution that is of another form stays, and says which.
    """
    graph_module = duplicate(graph_module)
    for pool in list(graph_module.graph.nodes):
        if not is_call(pool, aten.max_pool2d.default):
            continue
        conv = args_of(pool)[0]
        if not is_call(conv, resnet_deploy.conv2d_bias_act.default):
            continue
        reason = _why_not_fusible(conv, pool)
        if reason is None:
            _replace(graph_module, conv, pool)
        else:
            pool.meta["refused"] = f"not fused with {module_path(conv)}: {reason}"
    graph_module.recompile()
    return graph_module


def _why_not_fusible(conv: fx.Node, pool: fx.Node) -> str | None:
    a, p = fused_args(Conv2dBiasAct, conv), named_args(pool)
    if only_reader(conv) is not pool:
        return f"the convolution's output has {len(conv.users)} readers"
    if a.residual is not None:
        return "the convolution's output is a sum"
    if not a.relu:
        return "there is no ReLU between them"
    if a.groups != 1 or a.dilation != (1, 1):
        return "the convolution is grouped or dilated"
    kernel, padding, dilation = (pair(p[name]) for name in ("kernel_size", "padding", "dilation"))
    stride = pair(p["stride"]) if p["stride"] else kernel
    if (kernel, stride, padding, dilation) != ((3, 3), (2, 2), (1, 1), (1, 1)) or p["ceil_mode"]:
        return "expected kernel 3, stride 2, padding 1, dilation 1 and no ceil_mode"
    return None


def _replace(graph_module: fx.GraphModule, conv: fx.Node, pool: fx.Node) -> None:
    a = fused_args(Conv2dBiasAct, conv)
    with graph_module.graph.inserting_before(pool):
        stem = Conv2dBiasReluMaxpool(a.x, a.weight, a.bias, stride=a.stride, padding=a.padding)
        new = fused_call(graph_module.graph, stem)
    parts = [*conv.meta["fused"], module_path(pool)]
    new.meta = {"nn_module_stack": conv.meta["nn_module_stack"], "fused": parts, "weights": conv.meta["weights"]}
    copy_meta(new, pool)
    pool.replace_all_uses_with(new)
    graph_module.graph.erase_node(pool)
    graph_module.graph.erase_node(conv)
