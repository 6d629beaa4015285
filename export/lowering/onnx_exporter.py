"""An ONNX model of any graph by torch.onnx.export, which traces it, decomposes it and knows all of ATen."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset18, opset19
from torch import Tensor, fx, nn
from torch.fx import traceback

from export.base.batch import Batch
from export.base.errors import ExportError, first_line
from export.base.precision import Precision
from export.fusion.capture import plain_torch, uncollected
from export.fusion.interpreter import GraphInterpreter
from export.fusion.nodes import input_nodes, resnet_deploy
from export.fusion.program import returned_tensors
from export.lowering.onnx_operators import LOWERINGS, QUANTISED_LOWERINGS
from export.lowering.onnx_pools import POOLS
from export.lowering.onnx_writer import opset, traced_name
from kernels.operators.registry import Arguments

_FX_NODE = "pkg.torch.onnx.fx_node"
# They warn of every operator of a torchvision that is not installed, and of each argument of a translation.
_NOISY = ("_registration", "_schemas")
_ORIGIN = "fused_node"  # what a traced node is stamped with: the node of the fused graph that it computes


class _Boundary(nn.Module):
    """float32 in and out around a graph of another precision; outputs flattened, behind them the values of `shown`.

    Every node that is traced carries the name of the node of the graph that it computes.
    """

    def __init__(self, graph_module: fx.GraphModule, dtype: torch.dtype, shown: Sequence[str]) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.dtype, self.shown = dtype, shown
        for node in graph_module.graph.nodes:
            node.meta["custom"] = {_ORIGIN: node.name}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        cast = []
        with traceback.preserve_node_meta():
            for node, x in zip(input_nodes(self.graph_module).values(), inputs, strict=True):
                with traceback.annotate(node.meta["custom"]):
                    cast.append(x.to(self.dtype))
            interpreter = GraphInterpreter(self.graph_module, {})
            interpreter.values = {}
            outputs = returned_tensors(self.graph_module, interpreter.run(*cast))
        wide: list[Tensor] = []
        for y in outputs:
            y = y.float() if y.is_floating_point() else y
            wide.append(y.clone() if any(y is other for other in wide) else y)  # a value has one name
        return (*wide, *(interpreter.values[name] for name in self.shown))


def exported(
    graph_module: fx.GraphModule,
    inputs: Mapping[str, tuple[int, ...]],
    batch: Batch,
    precision: Precision,
    names: tuple[str, ...],
    shown: Sequence[str] = (),
) -> tuple[onnx.ModelProto, dict[str, list[onnx.NodeProto]]]:
    """The model as `torch.onnx.export` writes it; arguments and result as of `onnx_writer.written`.

    `shown` names nodes whose values no optimisation may touch.
    """
    size = batch.minimum if batch.static else max(2, batch.optimum)
    traced_inputs = tuple(torch.zeros(size, *shape, dtype=torch.float32) for shape in inputs.values())
    dim = None if batch.static else {0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)}
    dynamic = None if dim is None else (tuple(dim for _ in inputs),)
    logs = [logging.getLogger(f"torch.onnx._internal.exporter.{name}") for name in _NOISY]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with plain_torch(), uncollected(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.onnx.export(
                _Boundary(graph_module, precision.dtype, shown).eval(),
                traced_inputs,
                dynamo=True,
                opset_version=opset(graph_module, precision),
                custom_translation_table=_TRANSLATIONS,
                input_names=[traced_name(name) for name in inputs],
                output_names=[*names, *map(shown_name, shown)],
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"cannot be written as ONNX: {first_line(_reason(error))}") from error
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
    assert found is not None and found.exported_program is not None  # None only for a file written elsewhere
    model: onnx.ModelProto = found.model_proto
    extra = {shown_name(name) for name in shown}
    for value in [value for value in model.graph.output if value.name in extra]:
        model.graph.output.remove(value)
    results = {*names, *extra}
    return model, _groups(graph_module, found.exported_program.graph, model, results)


def shown_name(node: str) -> str:
    """What the value of a node that is to be shown is called."""
    return f"value.{node}"


def _reason(error: BaseException) -> BaseException:
    """What one of our translations says, else what the exporter does."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ExportError):
            return cause
        cause = cause.__cause__
    return error.__cause__ or error


def _groups(
    graph_module: fx.GraphModule, traced: fx.Graph, model: onnx.ModelProto, results: Collection[str]
) -> dict[str, list[onnx.NodeProto]]:
    """As in `exported`. A node of which the last step was merged into another one is left out.

    Args:
        traced: what the exporter translated, each node stamped with the one of `graph_module` that it computes.
        results: the names that the exporter was told to give to outputs.
    """
    written: dict[str, list[onnx.NodeProto]] = {}
    for onnx_node in model.graph.node:
        text = next((entry.value for entry in onnx_node.metadata_props if entry.key == _FX_NODE), "")
        written.setdefault(text.partition(" ")[0].lstrip("%"), []).append(onnx_node)
    steps: dict[str, list[str]] = {}
    for node in traced.nodes:
        origin = (node.meta.get("custom") or {}).get(_ORIGIN)
        if origin is not None and node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            steps.setdefault(origin, []).append(node.name)
    groups = {}
    for node in graph_module.graph.nodes:
        names = steps.get(node.name, [])
        group = [onnx_node for name in names for onnx_node in written.get(name, [])]
        if node.op == "placeholder" or (group and group[-1].output[0] in {names[-1], *results}):
            groups[node.name] = group
    return groups


def _of_values(arguments: type[Arguments[Any]], lowering: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A lowering as the exporter calls it: with the operator's arguments one by one, whose names it looks up."""

    def translate(*values: Any) -> Any:
        return lowering(opset18, arguments.of(*values))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, kind) for name in arguments.names()]
    translate.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    return translate


def _written_in(op: Any, lowering: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering as the exporter calls it, which looks its other arguments' names up."""

    def translate(*values: Any, **named: Any) -> Any:
        return lowering(op, *values, **named)

    translate.__signature__ = inspect.signature(functools.partial(lowering, op))  # type: ignore[attr-defined]
    return translate


_TRANSLATIONS: dict[Callable, Callable] = {
    **{getattr(resnet_deploy, a.operator).default: _of_values(a, lowering) for a, lowering in LOWERINGS.items()},
    **{target: _written_in(opset19, lowering) for target, lowering in QUANTISED_LOWERINGS.items()},
    **{target: _written_in(opset18, lowering) for target, lowering in POOLS.items()},
}
