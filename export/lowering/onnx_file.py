"""Lower a fused program to one ONNX file of standard operators."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from export.capture import Batch, plain_torch
from export.errors import ExportError
from export.graph import args_of, is_call, module_path, schema_name
from export.lowering.operators import TRANSLATIONS
from export.precision import Precision
from export.program import FusedProgram

# Conv admits bfloat16 from opset 22 on; TensorRT 10.3, the oldest supported, reads up to opset 20.
_OPSETS = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
ONNX_FILE = "model.onnx"
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
        ExportError: an operator has no translation, or the file would exceed ONNX's 2 GB.
    """
    graph_module = program.at(precision)
    names = output_names(graph_module)
    model = _translate(graph_module, example, program.batch, precision, names)
    values = _values(graph_module, model)
    _strip(model, metadata)
    values = _rename(graph_module, model, values)
    return OnnxFile(model, names, values)


def output_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """`output` for one tensor, dictionary keys for a dictionary, else output_0, output_1, …"""
    spec: Any = graph_module._out_spec
    tree = pytree.tree_unflatten(range(spec.num_leaves), spec)
    if spec.num_leaves == 1 and isinstance(tree, int):
        return ("output",)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    words = ["_".join(filter(None, "".join(c if c.isalnum() else " " for c in path).split())) for path in paths]
    return tuple(word if word.isidentifier() else f"output_{word}" for word in words)


def _translate(
    graph_module: fx.GraphModule, example: Tensor, batch: Batch, precision: Precision, names: tuple[str, ...]
) -> onnx.ModelProto:
    size = batch.minimum if batch.static else max(2, batch.optimum)
    traced_input = torch.zeros(size, *example.shape[1:], dtype=torch.float32)
    dynamic = None if batch.static else ({0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)},)
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
                opset_version=_OPSETS[precision.dtype],
                custom_translation_table=TRANSLATIONS,
                input_names=["input"],
                output_names=list(names),
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"cannot be written as ONNX: {str(error).strip().splitlines()[0]}") from error
    finally:
        registry_log.setLevel(level)
    model: onnx.ModelProto = exported.model_proto  # type: ignore[union-attr]  # None only for a file written elsewhere
    return model


def _values(graph_module: fx.GraphModule, model: onnx.ModelProto) -> dict[str, str]:
    """Fused-graph node -> ONNX value. Tracing keeps the order of calls, so the n-th of a kind is the n-th."""
    last_output: dict[str, str] = {}
    for node in model.graph.node:
        text = next((entry.value for entry in node.metadata_props if entry.key == _FX_NODE), "")
        last_output[text.partition(" ")[0].lstrip("%")] = node.output[0]
    counts: dict[str, int] = {}
    values = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = last_output.get("_to_copy", "input")  # 16-bit graphs begin with a cast
        kind = schema_name(node)
        if not kind:
            continue
        index = counts.get(kind, 0)
        counts[kind] = index + 1
        traced = f"{kind}_{index}" if index else kind
        if traced in last_output:
            values[node.name] = last_output[traced]
    return values


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


def _rename(graph_module: fx.GraphModule, model: onnx.ModelProto, values: dict[str, str]) -> dict[str, str]:
    """Name the value of every fused operator after the user's module, and every weight after its owner."""
    fixed = {value.name for value in [*model.graph.input, *model.graph.output]}
    names: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        value = values.get(node.name)
        if value is not None and value not in fixed and is_call(node, *TRANSLATIONS):
            names[value] = module_path(node)
            for argument, role in zip(args_of(node)[1:3], ("weight", "bias"), strict=True):
                names[f"graph_module.{argument.target}"] = f"{module_path(node)}.{role}"
    for tensor in model.graph.initializer:
        names.setdefault(tensor.name, tensor.name.removeprefix("graph_module."))
    taken = {name for node in model.graph.node for name in node.output if name not in names} | fixed
    for old, wanted in names.items():
        names[old] = next(name for name in _variants(wanted) if name not in taken)
        taken.add(names[old])
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for named in [*model.graph.initializer, *model.graph.value_info]:
        named.name = names.get(named.name, named.name)
    return {node: names.get(value, value) for node, value in values.items()}


def _variants(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))
