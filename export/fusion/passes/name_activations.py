"""Write activations that are spelled out in arithmetic as the one operator that they are."""

from __future__ import annotations

from typing import Any

from torch import fx

from export.fusion.nodes import args_of, aten, constant, copy_meta, duplicate, is_call, named_args, only_reader

_SIXTH = 1 / 6
ACTIVATIONS = (
    *(aten.relu.default, aten.hardtanh.default, aten.leaky_relu.default, aten.prelu.default, aten.gelu.default),
    *(aten.hardsigmoid.default, aten.hardswish.default, aten.sigmoid.default, aten.silu.default),
)


def name_activations(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace, from the inside out:

        clamp(x, 0)                            by relu(x)
        clip(x, 0, 6)                          by relu6(x)
        relu6(x + 3) / 6                       by hardsigmoid(x)
        x * relu6(x + 3) / 6, in any order     by hardswish(x)
        x * sigmoid(x)                         by silu(x)
        x * hardsigmoid(x)                     by hardswish(x)

    Nothing else may read what lies between. ReLU6 is written as hardtanh(x, 0, 6), as PyTorch itself does.
    """
    graph_module = duplicate(graph_module)
    for node in list(graph_module.graph.nodes):
        found = _found(graph_module, node)
        if found is None:
            continue
        target, arguments = found
        with graph_module.graph.inserting_before(node):
            new = graph_module.graph.call_function(target, arguments)
        copy_meta(new, node)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
        graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def is_relu6(node: object) -> bool:
    return is_call(node, aten.hardtanh.default) and [*map(float, _limits(node))] == [0.0, 6.0]


def _limits(hardtanh: fx.Node) -> tuple[float, float]:
    a = named_args(hardtanh)
    return a["min_val"], a["max_val"]


def _found(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator that `node` ends, and its arguments."""
    if is_call(node, aten.relu6.default):
        return aten.hardtanh.default, (args_of(node)[0], 0.0, 6.0)
    if is_call(node, aten.clamp.default, aten.clamp_min.default):
        return _clamped(node)
    if is_call(node, aten.div.Tensor, aten.mul.Tensor):
        return _scaled(graph_module, node) or _gated(node)
    return None


def _clamped(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    a = named_args(node)
    if a["min"] != 0 or a.get("max") not in (None, 6):
        return None
    return (aten.relu.default, (a["self"],)) if a.get("max") is None else (aten.hardtanh.default, (a["self"], 0.0, 6.0))


def _number(graph_module: fx.GraphModule, value: object) -> float | None:
    """A number, or the constant of one value."""
    if isinstance(value, int | float):
        return float(value)
    held = constant(graph_module, value)
    return held.item() if held is not None and held.numel() == 1 and held.dim() == 0 else None


def _scaled(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """A sixth of relu6(x + 3), or of x times that."""
    value, by = args_of(node)[:2]
    if is_call(node, aten.mul.Tensor) and not isinstance(value, fx.Node):
        value, by = by, value
    number = _number(graph_module, by)
    factor = None if not number else number if is_call(node, aten.mul.Tensor) else 1 / number
    if factor is None or abs(factor - _SIXTH) > 1e-6 or not isinstance(value, fx.Node):
        return None
    if only_reader(value) is not node:
        return None
    x = _shifted(graph_module, value)
    if x is not None:
        return aten.hardsigmoid.default, (x,)
    if is_call(value, aten.mul.Tensor):
        for gate, other in (args_of(value)[:2], args_of(value)[1::-1]):
            if isinstance(gate, fx.Node) and only_reader(gate) is value and _shifted(graph_module, gate) is other:
                return aten.hardswish.default, (other,)
    return None


def _shifted(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """x of relu6(x + 3), the sum having no other reader."""
    if not is_relu6(node):
        return None
    addition = args_of(node)[0]
    if not is_call(addition, aten.add.Tensor) or only_reader(addition) is not node or addition.kwargs:
        return None
    left, right = args_of(addition)[:2]
    x, number = (left, right) if isinstance(left, fx.Node) and _number(graph_module, left) is None else (right, left)
    return x if isinstance(x, fx.Node) and _number(graph_module, number) == 3 else None


def _gated(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """x times a function of x alone."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for gate, x in (args_of(node)[:2], args_of(node)[1::-1]):
        if isinstance(gate, fx.Node) and only_reader(gate) is node and isinstance(x, fx.Node):
            if is_call(gate, aten.sigmoid.default) and args_of(gate)[0] is x:
                return aten.silu.default, (x,)
            if is_call(gate, aten.hardsigmoid.default) and args_of(gate)[0] is x:
                return aten.hardswish.default, (x,)
    return None
