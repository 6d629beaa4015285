"""Which layers 8 bits cost most, and the fewest to keep in floating point."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from export.capture import plain_torch
from export.errors import ExportError
from export.graph import converted, module_path
from export.interpreter import GraphInterpreter
from export.passes.quantise import quantisable, quantise
from export.progress import Progress, silent, sparsely
from export.quantisation.facts import LayerCost
from export.quantisation.scheme import TENSORRT, Range


def layer_costs(
    graph_module: fx.GraphModule,
    ranges: Mapping[str, Range],
    images: Tensor,
    progress: Progress = silent,
) -> list[LayerCost]:
    """Quantise each layer on its own, as TensorRT's scheme has it, and see how far the first output moves.

    Args:
        graph_module: fused at level b, float64.
        ranges: calibrated.
        images: [N, C, H, W] float32; a few are enough.
        progress: called with what is being done.

    Returns:
        One cost per layer, the highest first.
    """
    names, say = [module_path(layer) for layer in quantisable(graph_module)], sparsely(progress)
    reference = _first_output(graph_module, images)
    costs = []
    for index, name in enumerate(names):
        say(f"quantise one layer at a time: {index} of {len(names)} done")
        alone = quantise(graph_module, ranges, TENSORRT, kept=set(names) - {name})
        error = (_first_output(alone, images) - reference).norm() / reference.norm().clamp(min=1e-30)
        costs.append(LayerCost(name, error.item()))
    return sorted(costs, key=lambda cost: cost.error, reverse=True)


def _first_output(graph_module: fx.GraphModule, images: Tensor) -> Tensor:
    with plain_torch():
        outputs = GraphInterpreter(converted(graph_module, torch.float32), {}).run(images)
    leaves: list[Tensor] = pytree.tree_leaves(outputs)
    return next((y for y in leaves if y.is_floating_point()), leaves[0].float())


def fewest_kept(costs: Sequence[LayerCost], passes: Callable[[frozenset[str]], bool]) -> frozenset[str]:
    """The smallest set of layers to keep, taken in the order of their costs, with which the network passes.

    Bisection finds how many of the costliest it takes; then each of them that is not needed is given back.

    Args:
        costs: from `layer_costs`.
        passes: whether the network is good enough with these layers kept; with all of them it is not quantised.
    """
    names = [cost.name for cost in costs]
    if passes(frozenset()):
        return frozenset()
    low, high = 0, len(names)  # it fails with the first `low` and passes with the first `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(frozenset(names[:middle])) else (middle, high)
    kept = set(names[:high])
    for name in reversed(names[: high - 1]):  # the last one is needed
        if passes(frozenset(kept - {name})):
            kept.remove(name)
    return frozenset(kept)


def choose(layers: Collection[str], patterns: Collection[str]) -> frozenset[str]:
    """The layers that the names in `patterns` stand for: a layer's own, or that of a module it is part of.

    Raises:
        ExportError: a name that stands for none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {layer for layer in layers if layer == pattern or layer.startswith(f"{pattern}.")}
        if not found:
            near = difflib.get_close_matches(pattern, layers, n=3) or list(layers)[:3]
            hint = f"expected a layer, or a module with layers, such as {', '.join(near)}"
            raise ExportError(f"--keep-fp16: no convolution or linear layer is called {pattern!r}; {hint}")
        chosen |= found
    return frozenset(chosen)
