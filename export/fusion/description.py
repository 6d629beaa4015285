"""The fused graph as plain facts: every operator, and what flows between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from export.fusion.nodes import FUSED_OPERATORS, input_nodes, is_call, module_path, named_args, schema_name, spoken_name
from export.fusion.program import operator_nodes, output_names, output_nodes


def describe_graph(master: fx.GraphModule) -> dict[str, Any]:
    """The operators of a fused graph in execution order, between its input and its outputs.

    What only moves data, and quantisation, is passed through: an edge leads to the operator that computed the value.

    Returns:
        `nodes`, each with its `role` (`input`, `fused`, `left`, `output`), `name` in the user's model, `kind` of
        operator, `parts` (the modules it replaced), `reason` (why it was left) and `shape` of its value, empty where
        it has several; and `edges`, each `from` and `to` a position in `nodes`, with a `role`: `residual` or
        `projection` for the shortcut of a fused operator, else empty.
    """
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []
    origins: dict[fx.Node, list[int]] = {}  # node -> the operators that its value comes from

    def connect(value: object, role: str) -> None:
        """Let the last of `nodes` read what `value`, an argument, holds."""
        for origin in _origins(value, origins):
            edge = {"from": origin, "to": len(nodes) - 1, "role": role}
            if edge not in edges:
                edges.append(edge)

    operators = set(operator_nodes(master))
    inputs = {node: name for name, node in input_nodes(master).items()}
    for node in master.graph.nodes:
        if node.op == "output":
            for name, value in zip(output_names(master), output_nodes(master), strict=True):
                nodes.append(_facts("output", name, "", value))
                connect(value, "")
        elif node.op == "placeholder":
            origins[node] = [len(nodes)]
            nodes.append(_facts("input", inputs[node], "", node))
        elif node not in operators:
            origins[node] = _origins((node.args, node.kwargs), origins)
        else:
            origins[node] = [len(nodes)]
            fused = is_call(node, *FUSED_OPERATORS)
            role, name = ("fused", module_path(node)) if fused else ("left", spoken_name(node))
            facts = _facts(role, name, schema_name(node), node)
            told = {"parts": list(node.meta["fused"])} if fused else {"reason": str(node.meta.get("refused", ""))}
            nodes.append(facts | told)
            for argument, value in named_args(node).items():
                connect(value, _edge_role(node, argument) if fused else "")
    return {"nodes": nodes, "edges": edges}


def _facts(role: str, name: str, kind: str, value: object) -> dict[str, Any]:
    return {"role": role, "name": name, "kind": kind, "parts": [], "reason": "", "shape": _shape(value)}


def _shape(value: object) -> list[int | str]:
    """A size that varies is `N`: it is the batch."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return [size if isinstance(size, int) else "N" for size in tensor.shape] if isinstance(tensor, Tensor) else []


def _origins(value: Any, origins: dict[fx.Node, list[int]]) -> list[int]:
    found: list[int] = []
    fx.node.map_arg(value, lambda node: found.extend(origins.get(node, [])))
    return list(dict.fromkeys(found))


def _edge_role(node: fx.Node, argument: str) -> str:
    if argument not in ("residual", "shortcut"):
        return ""
    return "projection" if named_args(node).get("shortcut_weight") is not None else "residual"
