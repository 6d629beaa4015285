"""Take the residual addition out of the convolutions again, for runtimes that quantise both of its summands."""

from __future__ import annotations

from torch import fx

from export.fusion.nodes import aten, copy_meta, duplicate, is_call, named_args, resnet_deploy


def split_addition(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace each `conv2d_bias_act` with a residual by a convolution, an addition and, where it has one, a ReLU."""
    graph_module = duplicate(graph_module)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not is_call(node, resnet_deploy.conv2d_bias_act.default) or named_args(node)["residual"] is None:
            continue
        a = named_args(node)
        with graph.inserting_before(node):
            conv = graph.call_function(
                resnet_deploy.conv2d_bias_act.default,
                (a["x"], a["weight"], a["bias"], None, a["stride"], a["padding"], a["dilation"], a["groups"], False),
            )
            last = graph.call_function(aten.add.Tensor, (conv, a["residual"]))
            chain = [conv, last]
            if a["relu"]:
                last = graph.call_function(aten.relu.default, (last,))
                chain.append(last)
        for part in chain:
            copy_meta(part, node)
        conv.meta["source"] = node.meta["summand"]
        if a["relu"]:
            chain[1].meta["source"] = None
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    graph_module.recompile()
    return graph_module
