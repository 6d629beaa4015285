#!/usr/bin/env bash
# ONNX Runtime truncated until 1.29 where QuantizeLinear of float16 has to round.
#
# ONNX says "round to nearest even" for every type. On the CPU, 1.23.2 (the last for Python 3.10, so for JetPack 6) to
# 1.29.0 do so for float32 and cut off what follows the point for float16: 5.8 becomes 5, -1.6 becomes -1. A network
# quantised for TensorRT's strongly typed mode, with float16 between its layers, runs without a warning, half a step off
# at every activation: a small ResNet's scores were 6 times as far off as its 8 bits explain. 1.30.0 rounds.
#
# Seen with onnxruntime 1.23.2, 1.29.0 and 1.30.0, onnx 1.19.1, on x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/quantise.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def quantised(type_: int) -> list[int]:
    dtype = helper.tensor_dtype_to_np_dtype(type_)
    constants = [numpy_helper.from_array(np.array(0.5, dtype), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "quantise",
        [helper.make_tensor_value_info("x", type_, [None])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [None])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([0.8, 1.3, 2.9, 10.4, -0.8], dtype)})[0].tolist()


rounded, cut = [2, 3, 6, 21, -2], [1, 2, 5, 20, -1]
wide, half = quantised(TensorProto.FLOAT), quantised(TensorProto.FLOAT16)
print(f"onnxruntime {onnxruntime.__version__}: 1.6 2.6 5.8 20.8 -1.6 as float32 {wide}, as float16 {half}")
expected = cut if sys.argv[1] == "cut" else rounded
assert wide == rounded and half == expected, "this finding is out of date"
PYTHON
for case in 1.23.2:cut 1.29.0:cut 1.30.0:rounded; do
    python3 -m venv "$folder/${case%:*}"
    "$folder/${case%:*}/bin/pip" install --quiet "onnxruntime==${case%:*}" onnx==1.19.1 numpy==2.2.6
    "$folder/${case%:*}/bin/python" "$folder/quantise.py" "${case#*:}"
done
