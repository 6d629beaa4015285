"""A graph that torch.export captured, without in-place operators, where that takes no second trace."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from export.fusion.nodes import args_of, aten, is_call, named_args

# Of what memory of its own holds the result, and what torch.export's own way leaves as it is.
_PURE = (
    aten.adaptive_avg_pool2d.default,
    aten.add.Tensor,
    aten.avg_pool2d.default,
    aten.cat.default,
    aten.conv2d.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.linear.default,
    aten.max_pool2d.default,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.prelu.default,
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.silu.default,
)
_IN_PLACE: dict[Any, Any] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.relu_.default: aten.relu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.silu_.default: aten.silu.default,
}


def made_functional(graph_module: fx.GraphModule) -> bool:
    """Change a captured graph, inputs and parameters by nodes, to what `run_decompositions({})` makes of it.

    That traces everything twice more, three times as long as the capture took. Of what a plain network is made of it
    changes little: an operator in place becomes the one that returns what it computes, and who reads its input from
    then on reads that; BatchNorm, dropout and flatten in eval mode become what they compute.

    Returns:
        Whether the graph holds nothing else; if not, it is of no use any more.
    """
    graph = graph_module.graph
    place = {node: number for number, node in enumerate(graph.nodes)}
    own: set[fx.Node] = set()  # values in memory that no other value shares
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if is_call(node, *_PURE):
            own.add(node)
        elif is_call(node, *_IN_PLACE):
            before = args_of(node)[0]
            if before not in own or len({_dtype(n) for n in node.all_input_nodes}) > 1:
                return False
            own.remove(before)
            own.add(node)
            node.target = _IN_PLACE[node.target]
            before.replace_all_uses_with(node, lambda reader, node=node: place[reader] > place[node])
        elif is_call(node, aten.batch_norm.default, aten.dropout.default, aten.flatten.using_ints):
            given, x = named_args(node), args_of(node)[0]
            if given.get("training", given.get("train", False)):
                return False
            with graph.inserting_before(node):
                new = _computed(graph, node, x, given)
            if new is None:
                return False
            place[new] = place[node]
            if is_call(node, aten.batch_norm.default):
                own.add(new)
            else:
                own.discard(x)  # as its view
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        else:
            return False
    return True


def _dtype(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _computed(graph: fx.Graph, node: fx.Node, x: fx.Node, given: dict[str, Any]) -> fx.Node | None:
    """What a BatchNorm, dropout or flatten of x in eval mode computes; None where that is not so simple."""
    if is_call(node, aten.batch_norm.default):
        roles = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
        arguments = tuple(given[role] for role in roles)
        if None in arguments:
            return None
        norm = graph.call_function(aten._native_batch_norm_legit_no_training.default, arguments)
        norm.meta = {**node.meta, "val": (node.meta["val"],)}
        new = graph.call_function(operator.getitem, (norm, 0))
    elif is_call(node, aten.dropout.default):
        new = graph.call_function(aten.clone.default, (x,))
    else:
        shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        if shape.count(-1) > 1 or len(shape) == x.meta["val"].dim() or not x.meta["val"].is_contiguous():
            return None
        new = graph.call_function(aten.view.default, (x, shape))
    new.meta = dict(node.meta)
    return new
