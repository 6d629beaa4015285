"""A captured graph, freed of what it was traced with: batch size, memory layout, constants made on the way."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from export.base.errors import ExportError
from export.fusion.nodes import (
    add_constant,
    args_of,
    aten,
    constant,
    is_call,
    module_path,
    named_args,
    schema_name,
)

NOTES = "notes"  # key of a graph's meta: what differs from the model, a line each


def refuse_random(graph_module: fx.GraphModule) -> None:
    """Raises ExportError for what draws random numbers, such as a dropout that is told to."""
    for node in graph_module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            given = named_args(node)
            if given.get("train", given.get("training", given.get("dropout_p", True))):
                raise ExportError(
                    f"{module_path(node)} draws random numbers ({schema_name(node)}), in eval mode too: expected a "
                    "pure function of its input; pass training=self.training, or remove it"
                )


def narrowed(graph_module: fx.GraphModule) -> list[str]:
    """A note of a forward that computes in 16 bits by itself; what is exported computes in the precision asked for."""
    for node in graph_module.graph.nodes:
        types = {value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)}
        if types & {torch.float16, torch.bfloat16}:
            return ["autocast, or a cast to 16 bits in forward, is ignored: the export chooses the precision"]
    return []


def fold_created(graph_module: fx.GraphModule, own: Collection[str]) -> fx.GraphModule:
    """Make constants of what forward creates from nothing, such as an arange, in the type it is created in.

    `own` are the names of the model's parameters and buffers, which take part in nothing of that.
    """
    graph = graph_module.graph
    created: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target not in own:
            created.add(node)
        makes = node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
        if not makes or not created.issuperset(node.all_input_nodes):
            continue
        target: Any = node.target
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: constant(graph_module, n))
        with graph.inserting_before(node):
            new = add_constant(graph_module, f"created_{node.name}", target(*arguments[0], **arguments[1]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        created.add(new)
    return graph_module


_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def _squeezed(node: fx.Node) -> list[int]:
    """The dimensions that a squeeze drops where they are 1."""
    rank = args_of(node)[0].meta["val"].dim()
    asked = args_of(node)[1] if len(node.args) > 1 else range(rank)
    return [d % rank for d in ([asked] if isinstance(asked, int) else asked)] if rank else []


def _has_default_type(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call computes floating-point numbers from whole ones alone, in torch's default type."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if not schema_name(node) or named_args(node).get("dtype") is not None:
        return False
    read = [n.meta.get("val") if n.op != "get_attr" else constant(graph_module, n) for n in node.all_input_nodes]
    whole = [isinstance(x, torch.SymInt) or (isinstance(x, Tensor) and not x.is_floating_point()) for x in read]
    return bool(whole) and all(whole)


def drops_single(node: fx.Node) -> bool:
    """Whether a node squeezes the first dimension, where that is 1."""
    return is_call(node, *_SQUEEZES) and 0 in _squeezed(node) and args_of(node)[0].meta["val"].shape[0] == 1


def for_any_batch(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Free the graph of the memory layout and batch size it was traced with.

    view(x, [batch, ...]) becomes reshape(x, [-1, ...]), which any layout allows and which lowers to one
    Reshape of constant shape; as_strided reads an input laid out as it was traced; the batch size is read from the
    input, so that no other value is read for it. A squeeze names the dimensions that it drops, the batch not among
    them: a single image keeps its batch dimension, which `meta[NOTES]` says. What is made of whole numbers names its
    type, so that it can be another one.
    """
    graph, notes = graph_module.graph, narrowed(graph_module)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    x = placeholders[0]
    batch: fx.Node | None = None
    whole = str(x.meta["val"].shape[0])

    for node in list(graph.nodes):
        value = node.meta.get("val")
        if is_call(node, *_VIEWS):
            shape = [length if isinstance(length, int) else -1 for length in value.shape]
            node.target = aten.reshape.default
            node.args = (node.args[0], shape if shape.count(-1) < 2 else args_of(node)[1])
        elif is_call(node, *_SQUEEZES):
            sizes = args_of(node)[0].meta["val"].shape
            asked = _squeezed(node)
            if any(not isinstance(sizes[d], int) for d in asked):
                dropped = [d for d in asked if isinstance(sizes[d], int) and sizes[d] == 1]
                node.target, node.args = aten.squeeze.dims, (node.args[0], dropped)
                if not dropped:
                    node.replace_all_uses_with(args_of(node)[0])
                notes.append(f"{module_path(node)}: squeeze keeps the batch dimension of a single image")
        elif is_call(node, aten.as_strided.default):
            with graph.inserting_before(node):
                traced = graph.call_function(aten.contiguous.default, (node.args[0],))
            traced.meta = dict(args_of(node)[0].meta)
            node.replace_input_with(args_of(node)[0], traced)
        elif is_call(node, aten.sym_size.int) and args_of(node)[0] is not x and str(value) == whole:
            if batch is None:
                with graph.inserting_after(placeholders[-1]):
                    batch = graph.call_function(aten.sym_size.int, (x, 0))
                batch.meta = dict(node.meta)
            node.replace_all_uses_with(batch)
        elif _has_default_type(graph_module, node):
            if "dtype" in named_args(node):  # zeros(batch, ...)
                node.kwargs = {**node.kwargs, "dtype": value.dtype}
                continue
            with graph.inserting_after(node):  # a count times 0.5
                cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": value.dtype})
            cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast, cast.__ne__)
    graph.eliminate_dead_code()
    graph_module.recompile()
    graph_module.meta[NOTES] = notes
    return graph_module
