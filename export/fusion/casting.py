"""A graph in another floating-point type: all of it, or all but some operators that compute in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export.base.errors import ExportError
from export.fusion.nodes import (
    add_constant,
    aten,
    copy_meta,
    deep_copy,
    module_path,
    moves_data,
    parameter,
    schema_name,
)

_Types = dict[fx.Node, torch.dtype]
# Numbers that bound values or stand in for them, such as the -1e9 of a mask before a softmax, and take part in no sum.
_SELECTS = ("clamp", "clamp_max", "clamp_min", "constant_pad_nd", "fill", "full", "full_like", "hardtanh",
            "masked_fill", "new_full", "pad", "where")  # fmt: skip


def converted(
    graph_module: fx.GraphModule,
    dtype: torch.dtype,
    stays: Callable[[fx.Node], bool] = lambda node: False,
    *,
    refuse: bool = True,
) -> fx.GraphModule:
    """A copy with every floating-point constant and type argument cast, once, to `dtype`.

    A number beyond the range of the type, where it only bounds or replaces values, becomes the end of the range.
    Convolution weights become channels_last, all else contiguous: the layouts the operators require.

    Args:
        graph_module: left as it was.
        dtype: of the input and of all that does not stay.
        stays: says which operators compute in float32. A cast lies wherever one reads what the other type holds; what
            the graph returns is of the type it was computed in.
        refuse: what the type cannot hold; else it becomes infinite, as in a module that is cast.

    Raises:
        ExportError: a finite constant has no finite value in its type; names it and the layer that reads it.
    """
    constants = [*graph_module.parameters(), *graph_module.buffers()]
    result = deep_copy(graph_module, shared=constants)  # until each is cast
    types = _types(result, dtype, stays)
    for node in result.graph.nodes:
        if schema_name(node) in _SELECTS:
            node.args = fx.node.map_aggregate(node.args, partial(_within, types[node]))
            node.kwargs = fx.node.map_aggregate(node.kwargs, partial(_within, types[node]))
        node.args = fx.node.map_aggregate(node.args, partial(_with_type, types[node]))
        node.kwargs = fx.node.map_aggregate(node.kwargs, partial(_with_type, types[node]))
    _separate_constants(result, types)
    _cast_between(result, types)
    readers = {str(node.target): node for node in result.graph.nodes if node.op == "get_attr"}
    for name, tensor in [
        *result.named_parameters(remove_duplicate=False),
        *result.named_buffers(remove_duplicate=False),
    ]:
        if tensor.is_floating_point():
            reader = readers.get(name)
            layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            cast = tensor.detach().to(types[reader] if reader else dtype, memory_format=layout)
            if refuse and not bool(torch.isfinite(cast).all()):
                _refuse(tensor, cast.dtype, name, reader)
            owner, _, attribute = name.rpartition(".")
            value = nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast
            setattr(result.get_submodule(owner), attribute, value)
    result.recompile()
    return result


def types_of(graph_module: fx.GraphModule) -> set[torch.dtype]:
    """The floating-point types that a graph names: those of its constants and of its operators' arguments."""
    constants = [tensor.dtype for tensor in (*graph_module.parameters(), *graph_module.buffers())]
    arguments = pytree.tree_leaves([(node.args, node.kwargs) for node in graph_module.graph.nodes])
    named = [value for value in (*constants, *arguments) if isinstance(value, torch.dtype)]
    return {dtype for dtype in named if dtype.is_floating_point}


def with_constants_of(original: fx.GraphModule, copy: fx.GraphModule) -> fx.GraphModule:
    """`copy`, which `converted` made of `original`, holding the constants as they were before; it is changed itself."""
    for names in (original.named_parameters(remove_duplicate=False), original.named_buffers(remove_duplicate=False)):
        for name, tensor in names:
            owner, _, attribute = name.rpartition(".")
            setattr(copy.get_submodule(owner), attribute, tensor)
    return copy


def _types(graph_module: fx.GraphModule, dtype: torch.dtype, stays: Callable[[fx.Node], bool]) -> _Types:
    """Node -> the type it computes in; what only moves data has the type of what it moves."""
    types: _Types = {}
    for node in graph_module.graph.nodes:
        types[node] = dtype
        if node.op == "call_function" and moves_data(node):
            types[node] = next((types[moved] for moved in node.all_input_nodes), dtype)
        elif node.op == "call_function" and stays(node):
            types[node] = torch.float32
    return types


def _separate_constants(graph_module: fx.GraphModule, types: _Types) -> None:
    """Give the operators that stay constants of their own, which are cast but once."""
    for node in [node for node in graph_module.graph.nodes if node.op == "get_attr"]:
        own = [reader for reader in node.users if types[reader] != types[node]]
        if not own:
            continue
        with graph_module.graph.inserting_before(node):
            separate = add_constant(graph_module, f"{node.target}_float32", parameter(graph_module, node))
        separate.meta, types[separate] = dict(node.meta), types[own[0]]
        for reader in own:
            reader.replace_input_with(node, separate)
        if not node.users:
            graph_module.graph.erase_node(node)
            if all(other.target != node.target for other in graph_module.graph.nodes):
                owner, _, name = str(node.target).rpartition(".")
                delattr(graph_module.get_submodule(owner), name)


def _cast_between(graph_module: fx.GraphModule, types: _Types) -> None:
    """Cast each value once for all its readers of the other type."""
    for node in list(graph_module.graph.nodes):
        value = node.meta.get("val")
        if node.op == "get_attr" or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        readers = [reader for reader in node.users if reader.op == "call_function" and types[reader] != types[node]]
        if readers:
            with graph_module.graph.inserting_after(node):
                cast = graph_module.graph.call_function(aten._to_copy.default, (node,), {"dtype": types[readers[0]]})
            copy_meta(cast, node)
            for reader in readers:
                reader.replace_input_with(node, cast)


def _refuse(tensor: Tensor, dtype: torch.dtype, name: str, node: fx.Node | None) -> NoReturn:
    peak, limit = tensor.abs().max().item(), torch.finfo(dtype).max
    layer = module_path(next(iter(node.users))) if node is not None and node.users else name
    kept = f"; ExportConfig.keep_fp32=({layer!r},) leaves the layer in float32" if dtype.itemsize == 2 else ""
    raise ExportError(f"{layer}: {name} reaches {peak:.4g}: expected at most {limit:.4g}, the range of {dtype}{kept}")


def _with_type(dtype: torch.dtype, value: Any) -> Any:
    return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def _within(dtype: torch.dtype, value: Any) -> Any:
    """A number as it is, or the end of the type's range beyond which it lies."""
    limit = torch.finfo(dtype).max
    return min(max(value, -limit), limit) if isinstance(value, float) and math.isfinite(value) else value
