"""An ONNX model of a graph in which all is ours, node by node: to the byte what torch.onnx.export makes of it.

That traces the graph again, decomposes it, and reads first what it knows of all of ATen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from export.base.batch import INPUT, Batch
from export.base.precision import Precision
from export.fusion.nodes import aten, input_nodes, is_call, parameter, resnet_deploy
from export.fusion.program import output_nodes
from export.lowering.onnx_operators import LOWERINGS

# Conv admits bfloat16 from opset 22 on; TensorRT 10.3, the oldest supported, reads up to opset 20.
OPSETS = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}
_WRITTEN = 18  # the opset whose attributes the exporter writes, whatever it converts to
_IR_VERSION = 10
_MERGED = 1024  # elements: the exporter writes equal constants of so few once
_FUSED = {getattr(resnet_deploy, arguments.operator).default: arguments for arguments in LOWERINGS}


def traced_name(name: str) -> str:
    """What an input is called until everything has its name: like no value that is named on the way."""
    return f"{INPUT}.{name}"


@dataclass(eq=False)
class _Value:
    """What a node computes or reads; `dtype` as ONNX numbers types, `fixed` where no input changes it."""

    dtype: int
    name: str = ""
    fixed: bool = False


class _Folded(Exception):
    """The exporter computes beforehand what the graph has a node for."""


class _Nodes:
    """Makes a node of any operator by its name, as onnxscript's opsets do, and calls it what the exporter does."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._unnamed_nodes = self._unnamed_values = 0
        self._traced: dict[str, int] = {}
        self._waiting: list[tuple[str, tuple[_Value, ...], dict[str, Any], list[_Value]]] = []

    def __getattr__(self, operator: str) -> Any:
        def make(*inputs: _Value, **attributes: Any) -> Any:
            axes = operator == "Constant" and attributes.keys() == {"value_ints"}
            if all(x.fixed for x in inputs) and not axes:
                raise _Folded
            dtype = onnx.TensorProto.INT64 if axes else inputs[0].dtype
            outputs = [_Value(dtype, fixed=axes) for _ in onnx.defs.get_schema(operator, _WRITTEN).outputs]
            self._waiting.append((operator, inputs, attributes, outputs))
            return outputs[0] if len(outputs) == 1 else outputs

        return make

    def end(self, traced: str, result: str = "") -> list[onnx.NodeProto]:
        """The nodes made since the last call, which one call of a traced operator is; the last one gives `result`."""
        count = self._traced[traced] = self._traced.get(traced, -1) + 1
        name, group = f"{traced}_{count}" if count else traced, []
        for operator, inputs, attributes, outputs in self._waiting:
            last = outputs is self._waiting[-1][-1]
            called = f"node_{name}" if last else f"node_{operator}_{self._unnamed_nodes}"
            self._unnamed_nodes += not last
            for value in outputs:
                value.name = (result or name) if last and value is outputs[0] else f"val_{self._unnamed_values}"
                self._unnamed_values += not (last and value is outputs[0])
            if operator == "Constant":
                values = np.array(attributes["value_ints"], np.int64)
                self.constants.append(onnx.numpy_helper.from_array(values, outputs[0].name))
                continue
            node = onnx.NodeProto(op_type=operator, name=called, input=[x.name for x in inputs])
            node.output.append(outputs[0].name)
            for key, attribute in onnx.defs.get_schema(operator, _WRITTEN).attributes.items():
                if key in attributes:
                    node.attribute.append(onnx.helper.make_attribute(key, attributes[key]))
                elif attribute.default_value.type:
                    node.attribute.append(attribute.default_value)
            group.append(node)
        self._waiting.clear()
        self.nodes += group
        return group


def written(
    graph_module: fx.GraphModule,
    inputs: Mapping[str, tuple[int, ...]],
    batch: Batch,
    precision: Precision,
    names: tuple[str, ...],
) -> tuple[onnx.ModelProto, dict[str, list[onnx.NodeProto]]] | None:
    """The model, and fused-graph node -> the ONNX nodes that compute it, in order; none for an input that is not cast.

    Args:
        graph_module: in `precision`.
        inputs: name -> shape without the batch.
        batch: the sizes it accepts.
        precision: of weights and activations.
        names: of the outputs.

    Returns:
        None where something in the graph is not ours, or the exporter would write it otherwise than it is.
    """
    weights = _weights(graph_module, precision)
    results = output_nodes(graph_module)
    if weights is None or not _is_ours(graph_module, results):
        return None
    try:
        return _written(graph_module, inputs, batch, precision, names, weights, results)
    except _Folded:
        return None


def _written(
    graph_module: fx.GraphModule,
    inputs: Mapping[str, tuple[int, ...]],
    batch: Batch,
    precision: Precision,
    names: tuple[str, ...],
    weights: Mapping[fx.Node, Tensor],
    results: list[fx.Node],
) -> tuple[onnx.ModelProto, dict[str, list[onnx.NodeProto]]]:
    """`written` with what the graph reads and returns; raises _Folded."""
    op, dtype = _Nodes(), _TYPES[precision.dtype]
    single = precision.dtype == torch.float32
    values = {node: _Value(dtype, f"graph_module.{node.target}", fixed=True) for node in weights}
    groups: dict[str, list[onnx.NodeProto]] = {}
    for name, node in input_nodes(graph_module).items():
        values[node], groups[node.name] = _Value(onnx.TensorProto.FLOAT, traced_name(name)), []
        if not single:
            values[node] = op.Cast(values[node], to=dtype)
            values[node].dtype = dtype
            groups[node.name] = op.end("_to_copy")
    for node in graph_module.graph.nodes:
        if is_call(node, aten.contiguous.default):
            values[node] = values[node.all_input_nodes[0]]
        elif is_call(node, *_FUSED):
            arguments: Any = _FUSED[node.target]
            call = arguments.of(*(values[a] if isinstance(a, fx.Node) else a for a in node.args))
            values[node] = LOWERINGS[arguments](op, call)
            result = names[results.index(node)] if single and node in results else ""
            groups[node.name] = op.end(arguments.operator, result)
    for name, node in zip(names, results, strict=True) if not single else ():
        op.Cast(values[node], to=onnx.TensorProto.FLOAT)
        op.end("_to_copy", name)
    model = onnx.ModelProto(ir_version=_IR_VERSION, producer_name="pytorch", producer_version=torch.__version__)
    model.opset_import.append(onnx.helper.make_opsetid("", OPSETS[precision.dtype]))
    model.graph.name = "main_graph"
    model.graph.node.extend(op.nodes)
    size: str | int = batch.minimum if batch.static else "batch"
    model.graph.input.extend(_float32(traced_name(name), [size, *shape]) for name, shape in inputs.items())
    model.graph.output.extend(_float32(name, None) for name in names)
    constants = {values[node].name: tensor for node, tensor in weights.items()}
    _describe(model, constants, dtype, op.constants)
    for name, tensor in constants.items():
        data = _bytes(tensor)
        model.graph.initializer.append(onnx.TensorProto(name=name, data_type=dtype, dims=tensor.shape, raw_data=data))
    model.graph.initializer.extend(op.constants)
    named = {node.name: node for node in model.graph.node}
    return model, {name: [named[node.name] for node in group] for name, group in groups.items()}


def _float32(name: str, shape: list[str | int] | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def _bytes(tensor: Tensor) -> bytes:
    whole = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # which numpy has not
    return whole.numpy().tobytes()


def _weights(graph_module: fx.GraphModule, precision: Precision) -> dict[fx.Node, Tensor] | None:
    """What the graph reads, parameters before buffers; None where the exporter merges some or leaves one out."""
    read = {str(node.target): node for node in graph_module.graph.nodes if node.op == "get_attr" and node.users}
    reading = sum(node.op == "get_attr" and len(node.users) for node in graph_module.graph.nodes)
    named = [name for name, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]]
    weights = {read[name]: parameter(graph_module, read[name]).detach() for name in named if name in read}
    small = [tensor for tensor in weights.values() if tensor.numel() <= _MERGED]
    distinct = len({(*tensor.shape, _bytes(tensor)) for tensor in small}) == len(small)
    usual = all(x.dtype == precision.dtype and x.dim() and bool(x.any()) for x in weights.values())
    return weights if len(weights) == reading and distinct and usual else None


def _is_ours(graph_module: fx.GraphModule, results: list[fx.Node]) -> bool:
    """Whether nothing but fused operators computes anything, each something else, and all of it that is returned."""
    computed = [node for node in graph_module.graph.nodes if is_call(node, *_FUSED)]
    others = [node for node in graph_module.graph.nodes if node.op == "call_function" and node not in computed]
    return (
        all(is_call(node, aten.contiguous.default) for node in others)
        and len({f"{node.target} {node.args}" for node in computed}) == len(computed)
        and results == [*dict.fromkeys(results)] == list(graph_module.graph.output_node().all_input_nodes)
        and set(results) <= set(computed)
    )


def _describe(
    model: onnx.ModelProto, weights: Mapping[str, Tensor], dtype: int, constants: list[onnx.TensorProto]
) -> None:
    """Add types and shapes of weights, constants and values to a model that has no weights yet."""
    known = [onnx.helper.make_tensor_value_info(name, dtype, tensor.shape) for name, tensor in weights.items()]
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.graph.input.extend(known)
    bare.graph.initializer.extend(constants)
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    found = {value.name: value for value in inferred.value_info}
    for tensor in constants:
        known.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.graph.value_info.extend(known)
    model.graph.value_info.extend(found[name] for node in model.graph.node for name in node.output if name in found)
    for value, shaped in zip(model.graph.output, inferred.output, strict=True):
        value.CopyFrom(shaped)
