"""Lower a fused program to one ONNX file of standard operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
from torch import Tensor, fx

from export.base.batch import FLOAT32, UINT8
from export.base.errors import ExportError
from export.base.normalisation import SCALE, Normalisation
from export.base.precision import Precision
from export.fusion.nodes import (
    FUSED_OPERATORS,
    QUANTISATION,
    computed_by,
    input_nodes,
    is_call,
    module_path,
    named_args,
    tensor_inputs,
    weighs,
)
from export.fusion.program import FusedProgram, output_names, variants
from export.lowering.onnx_writer import traced_name, written
from export.runtime.runner import Interface


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model and where the values of the fused graph are in it.

    Attributes:
        model: standard operators only, weights inside, inputs called as those of the program, float32 outputs.
        output_names: in the order of the model's flattened outputs.
        values: fused-graph node name -> ONNX value that holds its result, for the input, every fused
            operator, each convolution and linear layer with what they read, and each operator left eager whose result
            is still there. A value that is not found is missing, never another one.
        normalisation: what the file does to its inputs, bytes [N, H, W, C]; None where they are float32, as the network
            computes with them.
    """

    model: onnx.ModelProto
    output_names: tuple[str, ...]
    values: dict[str, str]
    normalisation: Normalisation | None = None

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape without the batch."""
        shapes = {value.name: value.type.tensor_type.shape.dim for value in self.model.graph.input}
        return {name: tuple(size.dim_value for size in shape[1:]) for name, shape in shapes.items()}

    @property
    def interface(self) -> Interface:
        """What a runner of it, or of an engine built from it, takes and gives."""
        dtype = FLOAT32 if self.normalisation is None else UINT8
        return Interface.of(self.output_names, self.inputs, dtype=dtype)

    def serialize(self) -> bytes:
        """The bytes of the file.

        Raises:
            ExportError: the model exceeds the 2 GB of one ONNX file.
        """
        return self._content

    @cached_property
    def _content(self) -> bytes:
        if self.model.ByteSize() >= 2**31:
            raise ExportError(f"the ONNX file would be {self.model.ByteSize() / 1e9:.1f} GB: expected less than 2.1 GB")
        return self.model.SerializeToString(deterministic=True)


def lower_onnx(
    program: FusedProgram, precision: Precision, metadata: dict[str, str], normalisation: Normalisation | None = None
) -> OnnxFile:
    """Write the fused program, in `precision`, as an ONNX model.

    Args:
        program: from `fuse`.
        precision: of weights and activations.
        metadata: key-value pairs stored in the file.
        normalisation: to be in the file, which then takes bytes; its inputs are images.

    Raises:
        ExportError: the model returns no tensor, or an operator has no translation.
    """
    graph_module = program.at(precision)
    names = output_names(graph_module)
    what = (graph_module, program.inputs, program.batch, precision, names)
    found, twins, hidden = written(*what), _twins(graph_module), []
    if found is None:
        from export.lowering.onnx_exporter import exported, shown_name  # half a second that not every network takes

        found = exported(*what)
        hidden = [name for name in _hidden(graph_module, found[1]) if name not in twins]
        if hidden:  # the exporter merged what is to be checked into its reader: it has to leave these values alone
            found = exported(*what, hidden)
    model, groups = found
    _strip(model, metadata)
    _rename(graph_module, model, groups)
    values = {node.name: name for name, node in input_nodes(graph_module).items()}
    values |= {name: group[-1].output[0] for name, group in groups.items() if group}
    values |= {name: shown_name(name) for name in hidden if name not in values}
    values |= {name: values[twin] for name, twin in twins.items() if name not in values and twin in values}
    file = OnnxFile(model, names, values)
    return file if normalisation is None else _normalising(file, normalisation)


def _normalising(file: OnnxFile, normalisation: Normalisation) -> OnnxFile:
    """The file with bytes as its inputs, and before the network what a host does to them, step by step.

    It is not folded into the first layer. Where that pads, it pads with 0, the mean, which no byte need stand for.
    """
    graph, places = file.model.graph, {}
    taken = {value for node in graph.node for value in node.output}
    taken |= {named.name for named in [*graph.input, *graph.initializer]}

    def free(wanted: str) -> str:
        name = next(name for name in variants(wanted) if name not in taken)
        taken.add(name)
        return name

    constants = []
    for role, constant in (("scale", SCALE), ("mean", normalisation.mean), ("std", normalisation.std)):
        constants.append(onnx.numpy_helper.from_array(np.array(constant, np.float32), free(f"pixel.{role}")))
    scale, mean, std = (tensor.name for tensor in constants)
    nodes = []
    for value in graph.input:
        steps = ("pixels", "scaled", "centred", "deviations", "normalised")
        pixels, scaled, centred, deviations, normalised = (free(f"{value.name}.{step}") for step in steps)
        nodes += [
            onnx.helper.make_node("Cast", [value.name], [pixels], pixels, to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Div", [pixels, scale], [scaled], scaled),
            onnx.helper.make_node("Sub", [scaled, mean], [centred], centred),
            onnx.helper.make_node("Div", [centred, std], [deviations], deviations),
            onnx.helper.make_node("Transpose", [deviations], [normalised], normalised, perm=[0, 3, 1, 2]),
        ]
        places[value.name] = normalised
        graph.value_info.add().CopyFrom(value)
        graph.value_info[-1].name = normalised
        size, channels, height, width = (d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        shape = [size, height, width, channels]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.UINT8, shape))
    network = list(graph.node)
    for node in network:
        node.input[:] = [places.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend([*nodes, *network])
    graph.initializer.extend(constants)
    values = {node: places.get(value, value) for node, value in file.values.items()}
    return replace(file, values=values, normalisation=normalisation)


def _hidden(graph_module: fx.GraphModule, groups: Mapping[str, list[onnx.NodeProto]]) -> list[str]:
    """Convolutions, linear layers and what they read whose values are not in the file."""
    wanted: dict[fx.Node, None] = {}
    for node in graph_module.graph.nodes:
        if weighs(node):
            wanted |= dict.fromkeys([node, *(computed_by(n) for n in tensor_inputs(node))])
    missing = [node for node in wanted if node.op == "call_function" and node.name not in groups]
    return [node.name for node in missing if isinstance(node.meta.get("val"), Tensor)]


def _twins(graph_module: fx.GraphModule) -> dict[str, str]:
    """Node -> an earlier one that makes the same call, which the exporter writes once."""
    first: dict[str, fx.Node] = {}
    known: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        read = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        called = node.op == "call_function"
        known[node] = first.setdefault(f"{node.target} {read}", node) if called else node
    return {node.name: twin.name for node, twin in known.items() if twin is not node}


def _strip(model: onnx.ModelProto, metadata: dict[str, str]) -> None:
    """Remove what the exporter says of this machine's files and store `metadata` instead."""
    for message in [model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info]:
        del message.metadata_props[:]
        message.doc_string = ""
    for value in [*model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
        value.doc_string = ""
    del model.functions[:]
    del model.metadata_props[:]
    model.doc_string = ""
    onnx.helper.set_model_props(model, metadata)


def _rename(graph_module: fx.GraphModule, model: onnx.ModelProto, groups: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Name what the fused operators compute after the user's modules, every weight after its owner, and the inputs."""
    names: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if is_call(node, *FUSED_OPERATORS):
            arguments = named_args(node)
            for argument, owner in node.meta["weights"].items():
                role = "bias" if argument.endswith("bias") else "weight"
                names[f"graph_module.{arguments[argument].target}"] = f"{owner}.{role}"
            slopes = {n.input[1] for n in groups.get(node.name, []) if n.op_type == "PRelu"}  # as it broadcasts
            names |= {slope: f"{node.meta['weights']['slope']}.weight" for slope in slopes}
            names |= _value_names(node, groups.get(node.name, []))
        elif is_call(node, *QUANTISATION):
            names |= _quantisation_names(node, groups.get(node.name, []))
    for tensor in model.graph.initializer:
        names.setdefault(tensor.name, tensor.name.removeprefix("graph_module."))
    inputs = {traced_name(name): name for name in input_nodes(graph_module)}
    for node in model.graph.node:
        names |= {value: value for value in node.output if value in inputs.values() and value not in names}
    outputs = {value.name for value in model.graph.output}
    names = {old: wanted for old, wanted in names.items() if old not in outputs}
    fixed = {*inputs.values(), *outputs}
    taken = {name for node in model.graph.node for name in node.output if name not in names} | fixed
    for old, wanted in names.items():
        names[old] = next(name for name in variants(wanted) if name not in taken)
        taken.add(names[old])
    names |= inputs
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for named in [*model.graph.input, *model.graph.initializer, *model.graph.value_info]:
        named.name = names.get(named.name, named.name)
    _name_layers(model)


def _value_names(node: fx.Node, group: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """ONNX value -> module, for the last value of each module that a fused operator replaces.

    A convolution's is what its activation, or the addition of the other summand, makes of it.
    """
    arguments, parts = named_args(node), node.meta["fused"]
    layers = {name: owner for name, owner in node.meta["weights"].items() if name != "slope"}
    owners = {f"graph_module.{arguments[name].target}": owner for name, owner in layers.items()}
    pools = {"ReduceMean": parts[0], "MaxPool": parts[-1]}
    owner_of: dict[str, str] = {}
    for onnx_node in group:
        weight = onnx_node.input[1] if len(onnx_node.input) > 1 else ""
        inherited = owner_of.get(onnx_node.input[0], module_path(node))
        owner_of[onnx_node.output[0]] = pools.get(onnx_node.op_type) or owners.get(weight, inherited)
    last = {owner: value for value, owner in owner_of.items()}
    return {value: owner for owner, value in last.items()}


def _quantisation_names(node: fx.Node, group: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """The label that the pass gave a value, and names after it for what it is scaled with."""
    label = node.meta["label"]
    names = {onnx_node.output[0]: label for onnx_node in group}
    owner = label.removesuffix(".quantized").removesuffix(".dequantized")
    roles = ("quantized", "scale", "zero_point")
    constants = {role: value for role, value in zip(roles, node.args, strict=True) if isinstance(value, fx.Node)}
    return names | {
        f"graph_module.{v.target}": f"{owner}.{role}" for role, v in constants.items() if v.op == "get_attr"
    }


def _name_layers(model: onnx.ModelProto) -> None:
    """Name convolutions and matrix products after the module that owns their weight."""
    taken = {node.name for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1].endswith(".weight"):
            owner = node.input[1].removesuffix(".weight")
            node.name = next(name for name in variants(owner) if name not in taken)  # a module may be called twice
            taken.add(node.name)
