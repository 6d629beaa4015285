"""The operators of ATen that are written node by node, each in one node as torch.onnx.export makes it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import fx

from export.fusion.nodes import args_of, aten, is_call, schema_name
from export.lowering.onnx_pools import max_pool2d


def _add(op: Any, x: Any, y: Any) -> Any:
    return op.Add(x, y)


def _relu(op: Any, x: Any) -> Any:
    return op.Relu(x)


def _mean(op: Any, x: Any, axes: list[int], keepdim: bool = False) -> Any:
    return op.ReduceMean(x, op.Constant(value_ints=axes), keepdims=int(keepdim))


def _reshape(op: Any, x: Any, shape: list[int]) -> Any:
    return op.Reshape(x, op.Constant(value_ints=shape), allowzero=1)


def _linear(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.Gemm(x, weight, bias, transB=1)


ATEN_LOWERINGS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.relu.default: _relu,
    aten.max_pool2d.default: max_pool2d,
    aten.mean.dim: _mean,
    aten.reshape.default: _reshape,
    aten.linear.default: _linear,
}


def is_written_alike(node: fx.Node) -> bool:
    """Whether a call is one of these, and one that the exporter neither merges with others nor writes otherwise."""
    if node.target not in ATEN_LOWERINGS or node.kwargs:
        return False
    x, *others = args_of(node)
    match schema_name(node):
        case "add":
            return len(node.all_input_nodes) == 2
        case "relu":
            return is_call(x, aten.add.Tensor)
        case "max_pool2d":
            return len(others) < 5 or not others[4]
        case "reshape":  # of means, [N, C, 1, 1] to [N, C]
            (size, *flat), shape = others[0], x.meta["val"].shape
            return is_call(x, aten.mean.dim) and isinstance(size, int) and len(shape) > 2 and flat == [prod(shape[1:])]
        case "linear":
            return len(others) == 2 and x.meta["val"].dim() == 2
    return True
