"""Compute once what depends on parameters alone, such as a weight under a parametrization or standardised."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from export.fusion.nodes import add_constant, args_of, constant, copy_meta, duplicate, is_call


def fold_constants(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace every deterministic call whose tensor inputs are all parameters by its value.

    Of a call with several results, such as the variance and the mean of a weight, each result that is read.
    """
    graph_module = duplicate(graph_module)
    for node in list(graph_module.graph.nodes):
        if not _foldable(graph_module, node):
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: constant(graph_module, n))
        value = node.target(*arguments[0], **arguments[1])
        if isinstance(value, Tensor):
            _replace(graph_module, node, value)
        elif isinstance(value, tuple):
            for result in [user for user in node.users if is_call(user, operator.getitem)]:
                _replace(graph_module, result, value[args_of(result)[1]])
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _replace(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    with graph_module.graph.inserting_before(node):
        folded = add_constant(graph_module, node.name, value)
    copy_meta(folded, node)
    node.replace_all_uses_with(folded)
    graph_module.graph.erase_node(node)


def _foldable(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return False
    inputs = node.all_input_nodes
    return bool(inputs) and all(constant(graph_module, n) is not None for n in inputs)
