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

from export.capture import Batch, first_line, plain_torch
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
    values = _values(graph_module, model, precision)
    _strip(model, metadata)
    values = _rename(graph_module, model, values)
    return OnnxFile(model, names, values)


def output_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """`output` for one tensor, dictionary keys for a dictionary, else output_0, output_1, …

    Raises:
        ExportError: the model returns no tensor.
    """
    spec: Any = graph_module._out_spec
    tree = pytree.tree_unflatten(range(spec.num_leaves), spec)
    if spec.num_leaves == 0:
        raise ExportError("the model returns nothing: expected a tensor, or a tuple or dictionary of tensors")
    if spec.num_leaves == 1 and isinstance(tree, int):
        return ("output",)
    names: list[str] = []
    for path, _ in pytree.tree_flatten_with_path(tree)[0]:
        words = "".join(c if c.isalnum() else " " for c in pytree.keystr(path)).split()
        word = "_".join(words)
        if not word.isidentifier() or word == "input":
            word = f"output_{word}"
        names.append(next(name for name in _variants(word) if name not in names))
    return tuple(names)


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
        raise ExportError(f"cannot be written as ONNX: {first_line(error.__cause__ or error)}") from error
    finally:
        registry_log.setLevel(level)
    model: onnx.ModelProto = exported.model_proto  # type: ignore[union-attr]  # None only for a file written elsewhere
    return model


def _values(graph_module: fx.GraphModule, model: onnx.ModelProto, precision: Precision) -> dict[str, str]:
    """Fused-graph node -> ONNX value. Tracing keeps the order of calls, so the n-th of a kind is the n-th."""
    last_output: dict[str, str] = {}
    for node in model.graph.node:
        text = next((entry.value for entry in node.metadata_props if entry.key == _FX_NODE), "")
        last_output[text.partition(" ")[0].lstrip("%")] = node.output[0]
    boundary = "_to_copy" if precision.dtype != torch.float32 else "input"  # 16-bit graphs begin with a cast
    counts: dict[str, int] = {boundary: 1}
    values = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = last_output.get(boundary, boundary)
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
