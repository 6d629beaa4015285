"""Which layers 8 bits cost most."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from export.base.progress import Progress, silent, sparsely
from export.fusion.capture import plain_torch
from export.fusion.casting import converted
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import QUANTISATION, is_call, module_path
from export.quantisation.quantise import quantisable, quantise
from export.quantisation.scheme import TENSORRT, Range
from export.runtime.parity.rungs import LayerCost


def layer_costs(
    graph_module: fx.GraphModule,
    ranges: Mapping[str, Range],
    shown: Mapping[str, Tensor],
    progress: Progress = silent,
) -> list[LayerCost]:
    """Quantise each layer on its own, as TensorRT's scheme has it, and see how far the first output moves.

    What lies before the layer is computed once; what lies behind it, about half of the network, for each of them.

    Args:
        graph_module: fused at level b, float64.
        ranges: calibrated.
        shown: name -> [N, ...] float32; a few images are enough.
        progress: called with what is being done.

    Returns:
        One cost per layer, the highest first.
    """
    names, say = [module_path(layer) for layer in quantisable(graph_module)], sparsely(progress)
    values: dict[str, Tensor] = {}
    reference = _first_output(graph_module, shown, values)
    costs = []
    for index, name in enumerate(names):
        say(f"quantise one layer at a time: {index} of {len(names)} done")
        alone = quantise(graph_module, ranges, TENSORRT, kept=set(names) - {name})
        error = (_first_output(alone, shown, values) - reference).norm() / reference.norm().clamp(min=1e-30)
        costs.append(LayerCost(name, error.item()))
    return sorted(costs, key=lambda cost: cost.error, reverse=True)


def _first_output(graph_module: fx.GraphModule, shown: Mapping[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    """The first output. `values`, node -> what it has in floating point, hold up to the first node of 8 bits.

    Where there are none yet, all are put there.
    """
    single = converted(graph_module, torch.float32)
    unchanged = itertools.takewhile(lambda node: not is_call(node, *QUANTISATION), single.graph.nodes)
    interpreter = GraphInterpreter(single, {})
    interpreter.values = None if values else values
    with plain_torch():
        known = {node: values[node.name] for node in unchanged if node.name in values}
        outputs = interpreter.run(*shown.values(), initial_env=known)
    leaves: list[Tensor] = pytree.tree_leaves(outputs)
    return next((y for y in leaves if y.is_floating_point()), leaves[0].float())
