"""Execute a graph node by node, with some operators replaced and its values in view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from export.fusion.nodes import resnet_deploy
from kernels.operators.registry import OPERATORS

# The fused operators on a CPU without a dispatcher in between, so that modes see what they are made of.
REFERENCES: dict[Any, Callable[..., Tensor]] = {
    getattr(resnet_deploy, name).default: operator.computed for name, operator in OPERATORS.items()
}


def computes(node: fx.Node) -> Any:
    """What a node calls, a fused operator as above."""
    return REFERENCES.get(node.target, node.target)


class GraphInterpreter(fx.Interpreter):
    """Calls `operators[target]` for each target that has one; keeps every tensor while `values` is a dict."""

    def __init__(self, graph_module: fx.GraphModule, operators: Mapping[Any, Callable]) -> None:
        super().__init__(graph_module)
        self._operators = operators
        self.values: dict[str, Tensor] | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.values is not None and n.op != "get_attr" and isinstance(value, Tensor):
            self.values[n.name] = value
        return value

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return super().call_function(self._operators.get(target, target), args, kwargs)
