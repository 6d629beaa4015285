"""Execute a graph node by node, with some operators replaced and its values in view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from export.fusion.nodes import aten

_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


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


def _rounded_once(target: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    wide = x.dtype if x.dtype.itemsize > 2 else torch.float32
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(wide), (args, kwargs))
    y: Tensor = target(x.to(wide), *args, **kwargs)
    return y.to(x.dtype)


# PyTorch on a CPU adds up the overlapping windows of a float16 transposed convolution in float16. These accumulate in
# float32 and round once, as a GPU and every other layer does.
ON_CPU: dict[Any, Callable] = {target: partial(_rounded_once, target) for target in _TRANSPOSED}
