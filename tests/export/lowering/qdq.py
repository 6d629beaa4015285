"""A small quantised network as an ONNX file, whole or with one thing wrong: conv, conv, add, pool, product."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.base.batch import Batch

BATCH = Batch(1, 4, 8)
SHAPE = (8, 16, 16)
LAYERS = ("stage1.conv1", "stage1.conv2", "fc")
_PADS = [1, 1, 1, 1]


def network(
    float_input: str = "",
    float_weights: str = "",
    kept: str = "",
    dtype: type = np.float16,
    wide: str = "",
    fp8_input: str = "",
) -> bytes:
    """fp16 tensors and scales, opset 19, int8 weights per channel straight into DequantizeLinear.

    Args:
        float_input: the layer whose input has no Q/DQ.
        float_weights: the layer whose weights are float.
        kept: the layer that has neither.
        dtype: of tensors and scales.
        wide: the layer that is cast to float32 and back.
        fp8_input: the layer whose input is quantised to 8 bits of floating point.
    """
    nodes, initialisers, random = list[onnx.NodeProto](), list[onnx.TensorProto](), np.random.default_rng(0)
    narrow = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def value(values: NDArray, name: str, of: type = dtype) -> str:
        initialisers.append(numpy_helper.from_array(values.astype(of), name))
        return name

    def pair(x: str, name: str, storage: type = np.int8) -> str:
        scales = [value(np.array(0.05), f"{name}.scale"), value(np.array(0), f"{name}.zero", storage)]
        return node("DequantizeLinear", [node("QuantizeLinear", [x, *scales], f"{name}.q"), *scales], f"{name}.dq")

    def weights(shape: tuple[int, ...], layer: str) -> str:
        if layer in (float_weights, kept, wide):
            return value(random.normal(size=shape), f"{layer}.weight", np.float32 if layer == wide else dtype)
        whole = value(random.integers(-127, 128, shape), f"{layer}.weight", np.int8)
        scale = value(np.full(shape[0], 0.02), f"{layer}.weight.scale")
        zero = value(np.zeros(shape[0]), f"{layer}.weight.zero", np.int8)
        return node("DequantizeLinear", [whole, scale, zero], f"{layer}.weight.dq", axis=0)

    def inputs(x: str, layer: str, shape: tuple[int, ...]) -> list[str]:
        if layer not in (float_input, kept):
            x = pair(x, f"{layer}.input", ml_dtypes.float8_e4m3fn if layer == fp8_input else np.int8)
        weight = weights(shape, layer)
        return [node("Cast", [x], f"{layer}.widened", to=TensorProto.FLOAT) if layer == wide else x, weight]

    x = node("Cast", ["input"], "cast", to=narrow)
    for layer in LAYERS[:2]:
        x = node("Conv", inputs(x, layer, (8, 8, 3, 3)), layer, pads=_PADS)
        x = node("Cast", [x], f"{layer}.narrowed", to=narrow) if layer == wide else x
        x = node("Relu", [x], f"{layer}.relu")
    x = pair(node("Add", [x, "stage1.conv1.relu"], "add"), "pool.input")
    x = node("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=_PADS)
    x = node("Flatten", [node("GlobalAveragePool", [x], "mean")], "flat")
    x = node("Gemm", [*inputs(x, "fc", (10, 8)), value(np.zeros(10), "fc.bias")], "fc", transB=1)
    nodes.append(helper.make_node("Cast", [x], ["output"], name="last", to=TensorProto.FLOAT))
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])
    given = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph(nodes, "network", [taken], [given], initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content
