"""Compute once what depends on parameters alone, such as a weight under a parametrization."""

from __future__ import annotations

import torch
from torch import fx

from export.fusion.nodes import add_constant, constant, copy_meta, duplicate


def fold_constants(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace every deterministic call whose tensor inputs are all parameters by its value."""
    graph_module = duplicate(graph_module)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not _foldable(graph_module, node):
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: constant(graph_module, n))
        value = node.target(*arguments[0], **arguments[1])
        if not isinstance(value, torch.Tensor):
            continue
        with graph.inserting_before(node):
            folded = add_constant(graph_module, node.name, value)
        copy_meta(folded, node)
        node.replace_all_uses_with(folded)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _foldable(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return False
    inputs = node.all_input_nodes
    return bool(inputs) and all(constant(graph_module, n) is not None for n in inputs)
