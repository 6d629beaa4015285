"""An ONNX model of a graph that we know all operators of, node by node: what torch.onnx.export makes of it.

That traces the graph again, decomposes it, and reads first what it knows of all of ATen. Its model and this one are
the same to the byte where only fused operators compute; between others the values that nobody has a name for are
numbered otherwise.
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
from export.fusion.nodes import QUANTISATION, args_of, aten, input_nodes, is_call, resnet_deploy, schema_name
from export.fusion.program import output_nodes
from export.lowering.onnx_aten import ATEN_LOWERINGS, is_written_alike
from export.lowering.onnx_operators import LOWERINGS, QUANTISED_LOWERINGS

# Conv admits bfloat16 from opset 22 on; TensorRT 10.3, the oldest supported, reads up to opset 20.
_OPSETS = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
_QUANTISED_OPSET = 19  # the first in which quantisation has 16-bit floating-point scales
_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int32: onnx.TensorProto.INT32,
}
_WRITTEN = 18  # the opset whose attributes the exporter writes, whatever it converts to, but for quantisation
_TYPED_BY = {"QuantizeLinear": 2, "DequantizeLinear": 1}  # the input whose type the result has, if not the first
_IR_VERSION = 10
_MERGED = 1024  # elements: the exporter writes equal constants of so few once
_FUSED = {getattr(resnet_deploy, arguments.operator).default: arguments for arguments in LOWERINGS}
_OTHERS = {**ATEN_LOWERINGS, **QUANTISED_LOWERINGS}
_OWNER = "graph_module."  # of every weight, as what is traced has it
_IDENTITIES = (aten.contiguous.default, aten.clone.default)


def opset(graph_module: fx.GraphModule, precision: Precision) -> int:
    """The one in which the graph is written."""
    quantised = any(is_call(node, *QUANTISATION) for node in graph_module.graph.nodes)
    return _QUANTISED_OPSET if quantised else _OPSETS[precision.dtype]


def traced_name(name: str) -> str:
    """What an input is called until everything has its name: like no value that is named on the way."""
    return f"{INPUT}.{name}"


@dataclass(eq=False)
class _Value:
    """What a node computes or reads; `dtype` as ONNX numbers types, `fixed` where no input changes it."""

    dtype: int
    name: str = ""
    fixed: bool = False


def _schema(operator: str) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(operator, _QUANTISED_OPSET if operator in _TYPED_BY else _WRITTEN)


class _Folded(Exception):
    """The exporter has no node for what the graph has one for: it is computed beforehand, or merged with another."""


class _Nodes:
    """Makes a node of any operator by its name, as onnxscript's opsets do, and calls it what the exporter does."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._unnamed_nodes = self._unnamed_values = 0
        self._traced: dict[str, int] = {}
        self._waiting: list[tuple[str, tuple[_Value, ...], dict[str, Any], list[_Value]]] = []

    def __getattr__(self, operator: str) -> Any:
        def make(*given: _Value | None, **attributes: Any) -> Any:
            inputs = tuple(x for x in given if x is not None)
            whole = operator == "Constant" and attributes.keys() == {"value_ints"}
            if all(x.fixed for x in inputs) and not whole and operator != "DequantizeLinear":
                raise _Folded
            dtype = onnx.TensorProto.INT64 if whole else inputs[_TYPED_BY.get(operator, 0)].dtype
            outputs = [_Value(dtype, fixed=whole) for _ in _schema(operator).outputs]
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
            for key, attribute in _schema(operator).attributes.items():
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
    weights, results = _weights(graph_module, precision), output_nodes(graph_module)
    if weights is None or not _is_ours(graph_module, results):
        return None
    op, (constants, merged), values = _Nodes(), _merged(weights), dict[fx.Node, _Value]()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target in merged:
            name = merged[node.target]
            values[node] = _Value(constants[name].data_type, name, fixed=True)
    try:
        groups = _made(op, graph_module, values, precision, dict(zip(results, names, strict=True)))
    except _Folded:
        return None
    if _repeats(op):
        return None
    model = onnx.ModelProto(ir_version=_IR_VERSION, producer_name="pytorch", producer_version=torch.__version__)
    model.opset_import.append(onnx.helper.make_opsetid("", opset(graph_module, precision)))
    model.graph.name = "main_graph"
    model.graph.node.extend(op.nodes)
    size: str | int = batch.minimum if batch.static else "batch"
    model.graph.input.extend(_float32(traced_name(name), [size, *shape]) for name, shape in inputs.items())
    model.graph.output.extend(_float32(name, None) for name in names)
    flat = [(values[node], node) for node in graph_module.graph.nodes if is_call(node, aten.reshape.default)]
    known = [onnx.helper.make_tensor_value_info(x.name, x.dtype, [size, *args_of(node)[1][1:]]) for x, node in flat]
    _describe(model, [*constants.values(), *op.constants], known)
    for name, constant in constants.items():
        constant.raw_data = _bytes(weights[name.removeprefix(_OWNER)])
    model.graph.initializer.extend([*constants.values(), *op.constants])
    named = {node.name: node for node in model.graph.node}
    return model, {name: [named[node.name] for node in group] for name, group in groups.items()}


def _made(
    op: _Nodes,
    graph_module: fx.GraphModule,
    values: dict[fx.Node, _Value],
    precision: Precision,
    results: Mapping[fx.Node, str],
) -> dict[str, list[onnx.NodeProto]]:
    """Make the nodes of the graph; those of each node of it, as of `written`.

    Args:
        op: makes them.
        values: of weights; all others are added.
        results: node -> the output that it is.

    Raises:
        _Folded: the exporter would make others.
    """
    groups: dict[str, list[onnx.NodeProto]] = {}
    single, dtype = precision.dtype == torch.float32, _TYPES[precision.dtype]
    for name, node in input_nodes(graph_module).items():
        values[node], groups[node.name] = _Value(onnx.TensorProto.FLOAT, traced_name(name)), []
        if not single:
            values[node] = op.Cast(values[node], to=dtype)
            values[node].dtype = dtype
            groups[node.name] = op.end("_to_copy")
    for node in graph_module.graph.nodes:
        if is_call(node, *_IDENTITIES):
            values[node] = values[node.all_input_nodes[0]]
        elif node.op == "call_function":
            values[node] = _lowered(op, node, [values[a] if isinstance(a, fx.Node) else a for a in node.args])
            groups[node.name] = op.end(schema_name(node), results.get(node, "") if single else "")
    for node, name in results.items() if not single else ():
        op.Cast(values[node], to=onnx.TensorProto.FLOAT)
        op.end("_to_copy", name)
    return groups


def _repeats(op: _Nodes) -> bool:
    """Whether a node computes what another one does, with which the exporter would merge it."""
    constants = {tensor.name: tensor.raw_data for tensor in op.constants}
    calls = [
        (node.op_type, *(constants.get(x, x) for x in node.input), *(a.SerializeToString() for a in node.attribute))
        for node in op.nodes
    ]
    return len({*calls}) < len(calls)


def _lowered(op: _Nodes, node: fx.Node, read: list[Any]) -> Any:
    if is_call(node, *_FUSED):
        arguments: Any = _FUSED[node.target]
        return LOWERINGS[arguments](op, arguments.of(*read))
    return _OTHERS[node.target](op, *read)


def _float32(name: str, shape: list[str | int] | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def _bytes(tensor: Tensor) -> bytes:
    whole = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # which numpy has not
    return whole.numpy().tobytes()


def _weights(graph_module: fx.GraphModule, precision: Precision) -> dict[str, Tensor] | None:
    """What the graph reads by its name, parameters before buffers; None where the exporter leaves one out."""
    read = [node for node in graph_module.graph.nodes if node.op == "get_attr" and node.users]
    named = dict([*graph_module.named_parameters(), *graph_module.named_buffers()])
    targets = {str(node.target) for node in read}
    weights = {name: tensor.detach() for name, tensor in named.items() if name in targets}
    for node in read:
        x, scales = weights[str(node.target)], all(is_call(reader, *QUANTISATION) for reader in node.users)
        if not scales and not (x.dtype == precision.dtype and x.dim() and bool(x.any())):
            return None
    return weights


def _merged(weights: Mapping[str, Tensor]) -> tuple[dict[str, onnx.TensorProto], dict[str, str]]:
    """Constants to be written by their names, without their values yet, and weight -> which of them it is."""
    constants: dict[str, onnx.TensorProto] = {}
    merged: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in weights.items():
        small = tensor.numel() <= _MERGED
        key = (tensor.dtype, tensor.shape, _bytes(tensor)) if small else name
        merged[name] = first.setdefault(key, f"{_OWNER}{name}")
        if merged[name] not in constants:
            data_type = _TYPES[tensor.dtype]
            constants[merged[name]] = onnx.TensorProto(name=merged[name], data_type=data_type, dims=tensor.shape)
    return constants, merged


def _is_ours(graph_module: fx.GraphModule, results: list[fx.Node]) -> bool:
    """Whether we know all that computes something, and all of it that is returned."""
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    computed = [node for node in calls if not is_call(node, *_IDENTITIES)]
    return (
        all(is_call(node, *_FUSED, *QUANTISATION) or is_written_alike(node) for node in computed)
        and results == [*dict.fromkeys(results)] == list(graph_module.graph.output_node().all_input_nodes)
        and set(results) <= set(computed)
    )


def _describe(model: onnx.ModelProto, constants: list[onnx.TensorProto], reshaped: list[onnx.ValueInfoProto]) -> None:
    """Add types and shapes of constants and values to a model that has no constants yet."""
    known = [onnx.helper.make_tensor_value_info(x.name, x.data_type, x.dims) for x in constants]
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.graph.input.extend(value for value, x in zip(known, constants, strict=True) if not x.raw_data)
    bare.graph.initializer.extend(x for x in constants if x.raw_data)
    bare.graph.value_info.extend(reshaped)  # of a size that is -1 nothing is inferred
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    found = {value.name: value for value in inferred.value_info}
    model.graph.value_info.extend(known)
    for value, shaped in zip(model.graph.output, inferred.output, strict=True):
        value.CopyFrom(found.pop(value.name, shaped))
    model.graph.value_info.extend(found[name] for node in model.graph.node for name in node.output if name in found)
