"""ONNX Runtime on the CPU, without PyTorch: the same session for the export and for the device."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.errors import ExportError, MissingDependency, first_line

_NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime", "onnxruntime") from error
    return onnxruntime


def open_file(model: onnx.ModelProto) -> Any:
    """A session for an exported file.

    ONNX Runtime has no bfloat16 arithmetic on CPUs, and of a file quantised with float16 scales, which is made for
    TensorRT, it fuses pairs of quantisation and dequantisation into something less exact. Both run as `rounded_copy`.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        ExportError: ONNX Runtime refuses the file.
    """
    types = {tensor.data_type for tensor in model.graph.initializer}
    quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    rounded = onnx.TensorProto.BFLOAT16 in types or (quantised and onnx.TensorProto.FLOAT16 in types)
    return open_session(rounded_copy(model) if rounded else model)


def open_session(model: onnx.ModelProto) -> Any:
    """A session for the model as it is; raises as `open_file` does."""
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    return _session(model, options)


def _session(model: onnx.ModelProto, options: Any) -> Any:
    runtime = import_onnxruntime()
    try:
        session = runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise ExportError(f"onnxruntime cannot load the ONNX file: {first_line(error)}") from error
    if session.get_providers() != ["CPUExecutionProvider"]:
        raise ExportError(f"ONNX Runtime chose {session.get_providers()}: expected CPUExecutionProvider alone")
    return session


def optimised_operators(model: onnx.ModelProto) -> Counter[str]:
    """How many of each operator ONNX Runtime runs of a file, after its own optimisations on this machine."""
    runtime = import_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        _session(model, options)
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def rounded_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes every 16-bit node in float32 and rounds its result to the 16-bit type.

    That is what a 16-bit device does; the values are exact, held in float32.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type in _NARROW:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    nodes = []
    for node in model.graph.node:
        narrow = {name: types[name] for name in node.output if types.get(name) in _NARROW}
        wide_node = onnx.NodeProto()
        wide_node.CopyFrom(node)
        wide_node.output[:] = [f"{name}/wide" if name in narrow else name for name in node.output]
        for attribute in wide_node.attribute:
            if node.op_type == "Cast" and attribute.i in _NARROW:
                attribute.i = onnx.TensorProto.FLOAT
        nodes.append(wide_node)
        for name, kind in narrow.items():
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/wide"], [f"{name}/narrow"], to=kind))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/narrow"], [name], to=onnx.TensorProto.FLOAT))
    del copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    return copy
