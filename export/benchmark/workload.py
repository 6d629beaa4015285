"""What a network asks of a GPU: FLOPs, bytes and kernels, counted from its graph.

The floor of a kernel is each input read once and each output written once. Nothing runs: shapes follow from tensors
without storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from export.base.precision import Precision
from export.fusion.casting import converted
from export.fusion.nodes import FUSED_OPERATORS, aten, module_path, moves_data, schema_name
from export.fusion.program import FusedProgram
from kernels.operators.registry import OPERATORS
from kernels.problems import ConvProblem, Problem


@dataclass(frozen=True)
class Work:
    """One operator of a graph at one batch size.

    Attributes:
        name: the module of the user's model.
        kind: the operator.
        flops: multiplications and additions of convolutions and linear layers.
        activation_bytes: read and written.
        weight_bytes: read.
        problem: of a fused operator, what its kernel is asked to compute.
    """

    name: str
    kind: str
    flops: int
    activation_bytes: int
    weight_bytes: int
    problem: Problem | None = None


def eager_workload(program: FusedProgram, precision: Precision, batch: int) -> list[Work]:
    """The user's model as it was captured: one kernel per operator."""
    return _workload(program.source, program, precision, batch)


def fused_workload(program: FusedProgram, precision: Precision, batch: int) -> list[Work]:
    """The fused program: one kernel per fused operator, and one per operator left eager."""
    return _workload(program.master, program, precision, batch)


def pointwise_workload(program: FusedProgram, precision: Precision, batch: int) -> list[Work]:
    """A vendor's convolution kernels with one pointwise kernel behind each, which is what a compiler reaches.

    `program` is fused at level b. A convolution with neither residual nor ReLU has no pointwise kernel: its bias joins
    that of the addition it feeds.
    """
    works = fused_workload(program, precision, batch)
    return [part for work in works for part in (work, *_pointwise_kernel(work))]


def _pointwise_kernel(work: Work) -> list[Work]:
    """What reads a convolution's output and residual and writes the block's output."""
    conv = work.problem
    if not isinstance(conv, ConvProblem) or not (conv.relu or conv.has_residual):
        return []
    output = conv.gemm_m * conv.c_out * conv.dtype.itemsize
    return [Work(work.name, "pointwise", 0, 2 * output, 0)]


def _workload(graph_module: fx.GraphModule, program: FusedProgram, precision: Precision, batch: int) -> list[Work]:
    counter = _Counter(converted(graph_module, precision.dtype))
    x = torch.empty(batch, *program.image_shape, dtype=precision.dtype, device="meta")
    counter.run(x)
    return counter.found


class _Counter(fx.Interpreter):
    """Runs a graph on tensors without storage and notes what every operator reads and writes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module.to("meta"))
        self.found: list[Work] = []
        self._node: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        node = self._node
        if not moves_data(node):
            count = _fused if target in FUSED_OPERATORS else _COUNTS.get(target, _pointwise)
            self.found.append(count(module_path(node), schema_name(node), args, result))
        return result


def _fused(name: str, kind: str, args: tuple, result: Tensor) -> Work:
    problem = OPERATORS[kind].of(*args).problem()
    return Work(name, kind, problem.flops, problem.activation_bytes, problem.weight_bytes, problem=problem)


def _convolution(name: str, kind: str, args: tuple, result: Tensor) -> Work:
    """The floor of a convolution follows from its input and output, whatever its padding is called."""
    x, weight, bias = (*args, None)[:3]
    rows, columns = (min(x.shape[i], result.shape[i] * weight.shape[i]) for i in (2, 3))
    touched = x.shape[0] * x.shape[1] * rows * columns * x.element_size()
    flops = 2 * result.numel() * weight[0].numel()
    return Work(name, kind, flops, touched + _size(result), _size(weight, bias))


def _linear(name: str, kind: str, args: tuple, result: Tensor) -> Work:
    x, weight = args[:2]
    return Work(name, kind, 2 * x.numel() * weight.shape[0], _size(x, result), _size(*args[1:]))


def _batch_norm(name: str, kind: str, args: tuple, result: tuple[Tensor, ...]) -> Work:
    return Work(name, kind, 0, _size(args[0], result[0]), _size(*args[1:5]))


def _pointwise(name: str, kind: str, args: tuple, result: Any) -> Work:
    """Any other operator: every tensor in and out once."""
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    return Work(name, kind, 0, _size(*args, *outputs), 0)


def _size(*values: object) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


_COUNTS: dict[Any, Callable[..., Work]] = {
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.linear.default: _linear,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
}
