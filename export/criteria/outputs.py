"""What each output of a network is: class scores, of which the highest decides, or values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, fx

from export.base.errors import ExportError
from export.fusion.nodes import moves_data, schema_name
from export.fusion.program import output_nodes
from export.runtime.parity.network import EITHER, PROBABILITIES, SCORES, VALUES, OutputKind

_PROBABILITIES = ("softmax", "_softmax")
_SOFTMAX = (*_PROBABILITIES, "log_softmax", "_log_softmax")
# what gives every value a meaning of its own, such as a coordinate in [0, 1] or the probability of one label of several
_EACH = ("sigmoid", "hardsigmoid", "tanh", "relu", "clamp", "hardtanh", "linalg_vector_norm", "norm")
_NORMS = ("linalg_vector_norm", "norm")
_CONSTANT = ("sym_size", "zeros_like", "ones_like", "full_like", "empty_like")


def output_kinds(
    source: fx.GraphModule, names: Sequence[str], said: str, labelled: bool, classes: object
) -> dict[str, OutputKind]:
    """Which outputs are class scores, and why; a wrong guess would only leave out, or ask for, a clear top-1.

    Args:
        source: the captured graph.
        names: of its outputs, in order.
        said: `scores`, `probabilities`, `values` or `auto`.
        labelled: whether accuracy is measured, on the first output.
        classes: names of the classes, None where nobody gave any.

    Raises:
        ExportError: `scores` where no output is [N, classes]; `probabilities` where they already were some.
    """
    found = _kinds(source, names, said, labelled, classes)
    for name, node in zip(names, output_nodes(source), strict=True):
        if found[name].kind == SCORES and _softmax_of(node) is not None:
            found[name] = replace(found[name], softmax=True)
    if said == PROBABILITIES:
        (before,) = output_nodes(source)[0].all_input_nodes
        if _softmax_of(before) is not None:
            raise ExportError(
                "ExportConfig.outputs='probabilities': the model returns probabilities already, a softmax"
            )
    return found


def _softmax_of(node: fx.Node) -> fx.Node | None:
    """The softmax that an output is, but for its shape; None where it is none."""
    node = _moved(node)
    return node if schema_name(node) in _PROBABILITIES else None


def _kinds(
    source: fx.GraphModule, names: Sequence[str], said: str, labelled: bool, classes: object
) -> dict[str, OutputKind]:
    nodes = dict(zip(names, output_nodes(source), strict=True))
    rows = {name: _row(node) for name, node in nodes.items()}
    count = len(classes) if isinstance(classes, list | tuple) else 0
    chosen, why = None, ""
    if said in (SCORES, PROBABILITIES):
        chosen, why = next((name for name, row in rows.items() if row > 1), None), "as told"
        if chosen is None:
            shapes = ", ".join(str(list(node.meta["val"].shape)) for node in nodes.values())
            raise ExportError(
                f"ExportConfig.outputs='scores': expected an output of shape [N, classes], two or more, got {shapes}"
            )
    elif said == VALUES:
        return dict.fromkeys(nodes, OutputKind(VALUES, "as told"))
    elif labelled:
        chosen, why = next(iter(nodes), None), "labelled pictures are given"
    elif count > 1:
        chosen, why = next((name for name, row in rows.items() if row == count), None), f"{count} classes have names"
    found = {name: _found_out(node, rows[name]) for name, node in nodes.items()}
    return found if chosen is None else {**found, chosen: OutputKind(SCORES, why)}


def depends_on_input(source: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values follow from those of the input, and not from its shape alone."""
    found: set[fx.Node] = set()
    for node in source.graph.nodes:
        if node.op == "placeholder" or (
            schema_name(node) not in _CONSTANT and any(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _row(node: fx.Node) -> int:
    """How many values of an image a [N, values] output has; 0 for another shape, or whole numbers."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
        return 0
    return int(value.shape[1])


def _found_out(node: fx.Node, row: int) -> OutputKind:
    if row == 0:
        return OutputKind(VALUES, "it is not [N, classes]")
    if row == 1:
        return OutputKind(VALUES, "one value has no top-1")
    node = _moved(node)
    kind = schema_name(node)
    if kind in _SOFTMAX:
        return OutputKind(SCORES, f"it is a {kind.strip('_')}")
    if kind in _EACH:
        return OutputKind(VALUES, f"it is a {kind}, of each value by itself")
    if kind == "div" and any(schema_name(n) in _NORMS for n in _before(node, 6)):
        return OutputKind(VALUES, "it is normalised, as embeddings are")
    return OutputKind(EITHER, "nobody said; ExportConfig.outputs does")


def _moved(node: fx.Node) -> fx.Node:
    """What computed the values that a node only moves."""
    while moves_data(node) and len(node.all_input_nodes) == 1 and node.op == "call_function":
        (node,) = node.all_input_nodes
    return node


def _before(node: fx.Node, steps: int) -> set[fx.Node]:
    """The nodes from which a node follows in so many steps."""
    found = {node}
    for _ in range(steps):
        found |= {n for reader in found for n in reader.all_input_nodes}
    return found
