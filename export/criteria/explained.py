"""What an operator should compute, by the captured graph in float64, and what rounding explains of its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from export.base.precision import Precision
from export.criteria.bounds import BOUNDS, Call
from export.fusion.interpreter import computes
from export.fusion.nodes import (
    args_of,
    aten,
    constant,
    is_call,
    is_size,
    moves_data,
    named_args,
    size_at,
    source_name,
    tensor_inputs,
)
from export.fusion.program import FusedProgram
from kernels.rounding import Bound, Rounding


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def laid_out(value: Tensor) -> Tensor:
    """Channels last, as convolutions are computed fastest."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def subnormal(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where values are below the smallest normal number of a type."""
    return values.abs() < torch.finfo(dtype).tiny


def evaluate(source: fx.GraphModule, name: str, leaves: Mapping[str, Tensor]) -> Tensor:
    """The value of the node `name` of the captured graph, given the values of `leaves`.

    Raises:
        ValueError: it also depends on something that is not among the leaves.
    """
    if name in leaves:
        raise ValueError("it would be compared with itself")
    nodes = {node.name: node for node in source.graph.nodes}
    known: dict[str, Any] = {}
    waiting = [nodes[name]]  # no function that calls itself: that would keep all values until a garbage collection
    while waiting:
        node = waiting[-1]
        if node.name in known:
            pass
        elif node.name in leaves:
            known[node.name] = leaves[node.name]
        elif node.op == "get_attr":
            known[node.name] = _exact(constant(source, node))
        elif node.op == "call_function" and is_size(node):
            known[node.name] = size_at(node, _batch_of(nodes, leaves))
        elif node.op != "call_function":
            raise ValueError(f"it does not follow from {', '.join(leaves)}")
        elif unknown := [n for n in node.all_input_nodes if n.name not in known]:
            waiting += unknown
            continue
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n.name])
            known[node.name] = computes(node)(*args, **kwargs)
        waiting.pop()
    return known[name]


def _exact(constant: Tensor | None) -> Tensor | None:
    """In float64, convolution weights channels_last."""
    if constant is None or not constant.is_floating_point():
        return constant
    layout = torch.channels_last if constant.dim() == 4 else torch.contiguous_format
    return constant.to(torch.float64, memory_format=layout)


def _batch_of(nodes: Mapping[str, fx.Node], leaves: Mapping[str, Tensor]) -> int:
    """The batch size that `leaves` were computed for."""
    for name, value in leaves.items():
        for size, length in zip(nodes[name].meta["val"].shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt):
                return length // size_at(size, 1)  # as many as there are per image
    raise ValueError(f"its size does not follow from {', '.join(leaves)}")


def bound_of(program: FusedProgram, node: fx.Node) -> Callable[[Call], Bound] | None:
    """The error model of a call, None where it has none: other operators, axes or computed parameters."""
    if is_call(node, aten.mean.dim):
        x = args_of(node)[0].meta["val"]
        if x.dim() != 4 or sorted(d % 4 for d in args_of(node)[1]) != [2, 3]:
            return None
    target: Any = node.target
    return BOUNDS.get(target)


def activations(node: fx.Node) -> list[fx.Node]:
    """The tensors a node computes from, its parameters apart."""
    return tensor_inputs(node)


_REARRANGES = (aten.cat.default, aten.stack.default, aten.pixel_shuffle.default, aten.channel_shuffle.default)


def value_in(node: fx.Node, trace: Mapping[str, Tensor]) -> Any:
    """What the candidate holds for `node`; what only moves values follows from those that it moves."""
    if node.name in trace:
        return trace[node.name]
    if is_call(node, aten._to_copy.default):
        return value_in(args_of(node)[0], trace)  # of another type, to which whoever reads it rounds it
    inputs = node.all_input_nodes
    moved = node.op == "call_function" and (moves_data(node) or is_call(node, *_REARRANGES))
    if not moved or not inputs or any(n.op == "get_attr" for n in inputs):
        return None
    x = next(n for n in node.graph.nodes if n.op == "placeholder")
    found: dict[fx.Node, Any] = {}
    for n in inputs:
        found[n] = value_in(n, trace) if not is_size(n) else size_at(n, len(trace[x.name])) if x.name in trace else None
    if any(value is None for value in found.values()):
        return None
    target: Any = node.target
    return target(*fx.node.map_arg(node.args, found.__getitem__), **fx.node.map_arg(node.kwargs, found.__getitem__))


def allowed_error(
    program: FusedProgram,
    precision: Precision,
    node: fx.Node,
    values: Mapping[str, Tensor],
    separate_addition: bool,
    pre: Tensor | None = None,
    weights_too: bool = True,
    truncates: bool = False,
) -> Bound:
    """What rounding explains of an operator's error; `pre` is what its activation reads, if it is known already."""
    read = {n: rounded(values[n.name], precision.dtype) for n in activations(node)}
    if pre is None:
        leaves = {str(source_name(n)): x.double() for n, x in read.items()}
        pre = expected_of_leaves(program.source, node, leaves)[1]

    arguments = float_arguments(program, node, read)
    given, bound = named_args(node), bound_of(program, node)
    weights = [given["weight"]] if "weight" in given else list(given.values())
    held = any(constant(program.master, weight) is not None for weight in weights)
    rounds_weights = weights_too and precision.name != "fp32" and held
    assert bound is not None  # who asks has seen to it
    rounding = Rounding(precision.roundoff, rounds_weights, separate_addition, truncates=truncates)
    return bound(Call(arguments, pre.float(), rounding))


def float_arguments(program: FusedProgram, node: fx.Node, read: Mapping[fx.Node, Tensor]) -> dict[str, Any]:
    """Those of an operator by name, its tensors in float32: what it reads, and its weights as they are."""

    def value_of(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        value = constant(program.master, argument)
        return (read[argument] if value is None else value).float()

    return {key: value_of(argument) for key, argument in named_args(node).items()}


def expected_of_leaves(source: fx.GraphModule, fused: fx.Node, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """y64, and the value before the activation and the pool behind that (y64 itself where there is none)."""
    target, before = str(source_name(fused)), fused.meta.get("before_activation")
    if before is not None:
        pre = evaluate(source, before, leaves)
        return evaluate(source, target, {**leaves, before: pre}), pre
    node = last = next(n for n in source.graph.nodes if n.name == target)
    while is_call(node, aten.relu.default, aten.max_pool2d.default) and args_of(node)[0].name not in leaves:
        node = args_of(node)[0]
    pre = evaluate(source, node.name, leaves)
    return (pre if node is last else evaluate(source, target, {node.name: pre})), pre
