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
    return _Network(dtype).model(float_input, float_weights, kept, wide, fp8_input).SerializeToString()


class _Network:
    def __init__(self, dtype: type) -> None:
        self._dtype = np.dtype(dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def model(self, float_input: str, float_weights: str, kept: str, wide: str, fp8_input: str) -> onnx.ModelProto:
        def quantised(x: str, layer: str) -> str:
            storage = ml_dtypes.float8_e4m3fn if layer == fp8_input else np.int8
            return x if layer in (float_input, kept) else self._quantised(x, f"{layer}.input", storage)

        def weights(shape: tuple[int, ...], layer: str) -> str:
            if layer in (float_weights, kept, wide):
                return self._value(
                    self._random.normal(size=shape), f"{layer}.weight", np.float32 if layer == wide else None
                )
            return self._int8_weights(shape, layer)

        x = self._node("Cast", ["input"], "cast", to=helper.np_dtype_to_tensor_dtype(self._dtype))
        for layer in LAYERS[:2]:
            inputs = [quantised(x, layer), weights((8, 8, 3, 3), layer)]
            if layer == wide:
                inputs[0] = self._node("Cast", [inputs[0]], f"{layer}.widened", to=TensorProto.FLOAT)
            x = self._node("Conv", inputs, layer, pads=_PADS)
            if layer == wide:
                x = self._node("Cast", [x], f"{layer}.narrowed", to=helper.np_dtype_to_tensor_dtype(self._dtype))
            x = self._node("Relu", [x], f"{layer}.relu")
        x = self._node("Add", [x, "stage1.conv1.relu"], "add")
        x = self._quantised(x, "pool.input")
        x = self._node("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=_PADS)
        x = self._node("Flatten", [self._node("GlobalAveragePool", [x], "mean")], "flat")
        bias = self._value(np.zeros(10), "fc.bias")
        x = self._node("Gemm", [quantised(x, "fc"), weights((10, 8), "fc"), bias], "fc", transB=1)
        self._nodes.append(helper.make_node("Cast", [x], ["output"], name="last", to=TensorProto.FLOAT))
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])],
            self._initialisers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _value(self, values: NDArray, name: str, dtype: type | None = None) -> str:
        self._initialisers.append(numpy_helper.from_array(values.astype(dtype or self._dtype), name))
        return name

    def _quantised(self, x: str, name: str, storage: type = np.int8) -> str:
        scales = [self._value(np.array(0.05), f"{name}.scale"), self._value(np.array(0), f"{name}.zero", storage)]
        quantised = self._node("QuantizeLinear", [x, *scales], f"{name}.q")
        return self._node("DequantizeLinear", [quantised, *scales], f"{name}.dq")

    def _int8_weights(self, shape: tuple[int, ...], name: str) -> str:
        values = self._value(self._random.integers(-127, 128, shape), f"{name}.weight", np.int8)
        scale = self._value(np.full(shape[0], 0.02), f"{name}.weight.scale")
        zero = self._value(np.zeros(shape[0]), f"{name}.weight.zero", np.int8)
        return self._node("DequantizeLinear", [values, scale, zero], f"{name}.weight.dq", axis=0)
