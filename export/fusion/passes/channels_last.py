"""Give every fused operator the channels_last layout it requires."""

from __future__ import annotations

import torch
from torch import fx

from export.fusion.nodes import FUSED_OPERATORS, args_of, aten, copy_meta, duplicate, is_call, named_args

_ACTIVATIONS = ("x", "residual", "shortcut")
_KEEPS_LAYOUT = (aten.relu.default, aten.max_pool2d.default)


def channels_last(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Convert, before a fused operator, each activation that may have another layout.

    The conversion costs nothing at run time where the layout is right already.
    """
    graph_module = duplicate(graph_module)
    known: set[fx.Node] = set()
    converted: dict[fx.Node, fx.Node] = {}
    for node in list(graph_module.graph.nodes):
        if is_call(node, *FUSED_OPERATORS):
            for activation in map(named_args(node).get, _ACTIVATIONS):
                if activation is not None and activation not in known:
                    new = converted.get(activation) or _convert(graph_module, activation, node)
                    converted[activation] = new
                    node.replace_input_with(activation, new)
            known.add(node)
        elif is_call(node, *_KEEPS_LAYOUT) and args_of(node)[0] in known:
            known.add(node)
    graph_module.recompile()
    return graph_module


def _convert(graph_module: fx.GraphModule, activation: fx.Node, reader: fx.Node) -> fx.Node:
    with graph_module.graph.inserting_before(reader):
        new = graph_module.graph.call_function(
            aten.contiguous.default, (activation,), {"memory_format": torch.channels_last}
        )
    copy_meta(new, activation)
    return new
