"""Execute a graph node by node, with some operators replaced and its values in view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from export.fusion.nodes import aten


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


class WideConvolutions(TorchDispatchMode):
    """While it is on, convolutions of 16 bits on the CPU accumulate in float32 and round once, as on a GPU.

    PyTorch has a fast float16 convolution on few CPUs, and adds up the overlapping windows of a transposed one in the
    type itself.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.convolution.default:
            dtype = args[0].dtype
            if dtype in (torch.float16, torch.bfloat16) and args[0].device.type == "cpu":
                x, weight, bias, *geometry = args
                bias = None if bias is None else bias.float()
                return func(x.float(), weight.float(), bias, *geometry).to(dtype)
        return func(*args, **(kwargs or {}))
