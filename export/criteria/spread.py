"""How far rounding may move a value that follows from others through any operators, where none has a formula.

Each value on the way is moved by one roundoff of what is summed in it, up or down by chance, and the end looked at: a
sum that cancels, a norm or a softmax then count what they do to the errors of what they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from export.fusion.nodes import QUANTISATION, constant, is_call, moves_data, schema_name

_DRAWS = 8
# Sums of products: the square root of the sum of their squares is rounded, which may be far more than the result.
_WEIGHTED = ("bmm", "conv1d", "conv2d", "conv2d_bias_act", "conv_transpose2d", "linear", "matmul")


def spread(graph_module: fx.GraphModule, value: fx.Node, leaves: Mapping[str, Tensor], roundoff: float) -> Tensor:
    """The root mean square of what one roundoff in every operator does to `value`, in its own units and shape.

    Args: as of `draws`.
    """
    exact = _run(graph_module, value, leaves, 0.0, None)
    errors = torch.stack([y - exact for y in draws(graph_module, value, leaves, roundoff)])
    return errors.square().mean(0).sqrt()


def draws(
    graph_module: fx.GraphModule, value: fx.Node, leaves: Mapping[str, Tensor], roundoff: float
) -> Iterator[Tensor]:
    """What `value` may be where every operator that it follows from is one roundoff off.

    Args:
        graph_module: float64.
        value: of any type.
        leaves: node -> its value, which is exact.
        roundoff: of the type that values between the leaves and `value` are held in.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        yield _run(graph_module, value, leaves, roundoff, generator)


def _run(
    graph_module: fx.GraphModule,
    value: fx.Node,
    leaves: Mapping[str, Tensor],
    roundoff: float,
    generator: torch.Generator | None,
) -> Tensor:
    known: dict[fx.Node, Any] = {}

    def moved(x: Any, summed: Tensor | None = None) -> Any:
        if generator is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        sign = torch.randint(2, x.shape, generator=generator, dtype=torch.int8) * 2 - 1
        return x + roundoff * (x.abs() if summed is None else summed) * sign

    wanted, waiting = set[fx.Node](), [value]
    while waiting:
        node = waiting.pop()
        if node not in wanted:
            wanted.add(node)
            waiting += [] if node.name in leaves else node.all_input_nodes
    for node in graph_module.graph.nodes:
        if node not in wanted:
            continue
        if node.name in leaves:
            known[node] = leaves[node.name]
            continue
        if node.op == "get_attr":
            held = constant(graph_module, node)  # scales are exact
            known[node] = held if all(is_call(reader, *QUANTISATION) for reader in node.users) else moved(held)
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        target: Any = node.target
        result, summed = target(*args, **kwargs), None
        if schema_name(node) in _WEIGHTED:
            squares = [x.square() if isinstance(x, Tensor) else x for x in args]
            summed = (result.square() + target(*squares, **kwargs)).sqrt()
        known[node] = result if moves_data(node) else moved(result, summed)
    end: Tensor = known[value]
    return end
