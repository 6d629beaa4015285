"""Lower a fused program to one ONNX file of standard operators."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export.base.batch import Batch
from export.base.errors import ExportError, first_line
from export.base.precision import Precision
from export.fusion.capture import plain_torch
from export.fusion.nodes import FUSED_OPERATORS, QUANTISATION, is_call, module_path, named_args, schema_name
from export.fusion.program import FusedProgram, output_names, variants
from export.lowering.onnx_operators import TRANSLATIONS

# Conv admits bfloat16 from opset 22 on; TensorRT 10.3, the oldest supported, reads up to opset 20.
_OPSETS = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
_QUANTISED_OPSET = 19  # the first in which quantisation has 16-bit floating-point scales
_FX_NODE = "pkg.torch.onnx.fx_node"


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model and where the values of the fused graph are in it.

    Attributes:
        model: standard operators only, weights inside, float32 input `input` and float32 outputs.
        output_names: in the order of the model's flattened outputs.
        values: fused-graph node name -> ONNX value that holds its result, for the input, every fused
            operator and each operator left eager whose result is still there.
    """

    model: onnx.ModelProto
    output_names: tuple[str, ...]
    values: dict[str, str]

    def serialize(self) -> bytes:
        """The bytes of the file.

        Raises:
            ExportError: the model exceeds the 2 GB of one ONNX file.
        """
        if self.model.ByteSize() >= 2**31:
            raise ExportError(f"the ONNX file would be {self.model.ByteSize() / 1e9:.1f} GB: expected less than 2.1 GB")
        return self.model.SerializeToString(deterministic=True)


class _Boundary(nn.Module):
    """float32 in and out around a graph of another precision; outputs flattened."""

    def __init__(self, graph_module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = pytree.tree_leaves(self.graph_module(x.to(self.dtype)))
        return tuple(y.float() if y.is_floating_point() else y for y in outputs)


def lower_onnx(program: FusedProgram, example: Tensor, precision: Precision, metadata: dict[str, str]) -> OnnxFile:
    """Write the fused program, in `precision`, as an ONNX model.

    Args:
        program: from `fuse`.
        example: [N, C, H, W]; only channels and image size matter.
        precision: of weights and activations.
        metadata: key-value pairs stored in the file.

    Raises:
        ExportError: the model returns no tensor, or an operator has no translation.
    """
    graph_module = program.at(precision)
    names = output_names(graph_module)
    model = _translate(graph_module, example, program.batch, precision, names)
    groups = _groups(graph_module, model, precision)
    _strip(model, metadata)
    _rename(graph_module, model, groups)
    values = {name: group[-1].output[0] if group else "input" for name, group in groups.items()}
    return OnnxFile(model, names, values)


def _translate(
    graph_module: fx.GraphModule, example: Tensor, batch: Batch, precision: Precision, names: tuple[str, ...]
) -> onnx.ModelProto:
    size = batch.minimum if batch.static else max(2, batch.optimum)
    traced_input = torch.zeros(size, *example.shape[1:], dtype=torch.float32)
    dynamic = None if batch.static else ({0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)},)
    quantised = any(is_call(node, *QUANTISATION) for node in graph_module.graph.nodes)
    registry_log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry_log.level
    registry_log.setLevel(logging.ERROR)  # it warns of every operator of a torchvision that is not installed
    try:
        with plain_torch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                _Boundary(graph_module, precision.dtype).eval(),
                (traced_input,),
                dynamo=True,
                opset_version=_QUANTISED_OPSET if quantised else _OPSETS[precision.dtype],
                custom_translation_table=TRANSLATIONS,
                input_names=["input"],
                output_names=list(names),
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"cannot be written as ONNX: {first_line(error.__cause__ or error)}") from error
    finally:
        registry_log.setLevel(level)
    model: onnx.ModelProto = exported.model_proto  # type: ignore[union-attr]  # None only for a file written elsewhere
    return model


def _groups(
    graph_module: fx.GraphModule, model: onnx.ModelProto, precision: Precision
) -> dict[str, list[onnx.NodeProto]]:
    """Fused-graph node -> the ONNX nodes that compute it, in order; none for an input that is not cast.

    Tracing keeps the order of calls, so the n-th of a kind is the n-th.
    """
    traced: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        text = next((entry.value for entry in node.metadata_props if entry.key == _FX_NODE), "")
        traced.setdefault(text.partition(" ")[0].lstrip("%"), []).append(node)
    boundary = "_to_copy" if precision.dtype != torch.float32 else "input"  # 16-bit graphs begin with a cast
    counts: dict[str, int] = {boundary: 1}
    groups = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            groups[node.name] = traced.get(boundary, [])
        kind = schema_name(node)
        if not kind:
            continue
        index = counts.get(kind, 0)
        counts[kind] = index + 1
        name = f"{kind}_{index}" if index else kind
        if name in traced:
            groups[node.name] = traced[name]
    return groups


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
    """Name what the fused operators compute after the user's modules, and every weight after its owner."""
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
    fixed = {value.name for value in [*model.graph.input, *model.graph.output]}
    names = {old: wanted for old, wanted in names.items() if old not in fixed}
    taken = {name for node in model.graph.node for name in node.output if name not in names} | fixed
    for old, wanted in names.items():
        names[old] = next(name for name in variants(wanted) if name not in taken)
        taken.add(names[old])
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for named in [*model.graph.initializer, *model.graph.value_info]:
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
