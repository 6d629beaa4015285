"""The fused program: what every lowering starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from export.capture import DEFAULT_BATCH, Batch, capture, plain_torch
from export.errors import ExportError
from export.graph import converted, is_call, module_path, moves_data, schema_name
from export.passes import PASSES
from export.passes.fuse_epilogue import FUSED
from export.precision import PRECISIONS, Precision


@dataclass(frozen=True)
class Operator:
    """One line of the coverage report.

    Attributes:
        name: the module of the user's model it comes from.
        kind: the operator that computes it.
        parts: for a fused operator, the modules it replaces, in order.
        reason: for an operator left eager, why no pass took it; empty where none was meant to.
    """

    name: str
    kind: str
    parts: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Which operators of a model were fused, and which run as they were."""

    fused: tuple[Operator, ...]
    left: tuple[Operator, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused operators, {len(self.left)} left as they were"]
        lines += [f"  fused  {op.name}: {' + '.join(op.parts)}" for op in self.fused]
        lines += [f"  left   {op.name}: {op.kind}{f' ({op.reason})' if op.reason else ''}" for op in self.left]
        return "\n".join(lines)


class FusedProgram(nn.Module):
    """A captured model, fused. Calling it computes what the model computes, in float32.

    Attributes:
        source: the captured graph before any pass, float64: what the operators are checked against.
        master: the fused graph with float64 parameters: each precision is cast from it, once.
        coverage: what was fused and what was left, by the names of the user's modules.
        batch: the batch sizes it accepts.
        image_shape: (C, H, W).
    """

    source: fx.GraphModule
    master: fx.GraphModule

    def __init__(self, source: fx.GraphModule, master: fx.GraphModule, batch: Batch) -> None:
        super().__init__()
        self.__dict__.update(source=source, master=master)  # kept out of parameters() and of .to()
        self.batch = batch
        self.image_shape = tuple(next(n for n in source.graph.nodes if n.op == "placeholder").meta["val"].shape[1:])
        self.coverage = _coverage(master)
        self.graph_module = self.at(PRECISIONS["fp32"])

    def at(self, precision: Precision) -> fx.GraphModule:
        """The fused graph in `precision`: input, parameters and output in its type.

        Raises:
            ExportError: a folded weight is outside the range of the type; names it.
        """
        return converted(self.master, precision.dtype)

    def forward(self, x: Tensor) -> object:
        """Run the fused network on [N, C, H, W].

        Raises:
            ExportError: the batch size or image shape is not one it was captured for.
        """
        if tuple(x.shape[1:]) != self.image_shape or not self.batch.minimum <= len(x) <= self.batch.maximum:
            raise ExportError(
                f"expected an input of shape [{self.batch}, *{list(self.image_shape)}], got {list(x.shape)}"
            )
        with plain_torch():
            return self.graph_module(x)


def fuse(model: nn.Module, example: Tensor, batch: Batch = DEFAULT_BATCH) -> FusedProgram:
    """Capture `model` and fuse its convolutions with BatchNorm, addition and ReLU.

    Args:
        model: any nn.Module in eval mode with one tensor input; left as it was.
        example: [N, C, H, W], floating point; left as it was.
        batch: the batch sizes the program must accept.

    Raises:
        ExportError: the model cannot be captured; says why in one line.
    """
    source = converted(capture(model, example, batch), torch.float64)
    master = source
    with plain_torch():
        for apply in PASSES:
            master = apply(master)
    return FusedProgram(source, master, batch)


def _coverage(master: fx.GraphModule) -> Coverage:
    fused, left = [], []
    for node in master.graph.nodes:
        if is_call(node, FUSED):
            parts = tuple(node.meta["fused"])
            fused.append(Operator(module_path(node), "conv2d_bias_act", parts))
        elif node.op == "call_function" and not moves_data(node):
            left.append(Operator(module_path(node), schema_name(node), reason=node.meta.get("refused", "")))
    return Coverage(tuple(fused), tuple(left))
