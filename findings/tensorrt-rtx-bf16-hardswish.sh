#!/usr/bin/env bash
# TensorRT-RTX 1.7.1: its ONNX parser refuses HardSwish in bfloat16, and takes what HardSwish is made of.
#
# ONNX's HardSwish allows bfloat16 from opset 22 on. The parser takes it in float16 and ends with "Only FLOAT, HALF or INT8
# input is supported" in bfloat16, in a strongly typed network too, where the same file with x * HardSigmoid(x), alpha 1/6,
# parses. MobileNetV3 and its relatives have to be written that way for bfloat16 engines.
#
# Seen with tensorrt-rtx 1.7.1.116, onnx 1.23.2; no GPU needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 tensorrt-rtx==1.7.1.116
"$folder/venv/bin/python" - <<'PYTHON'
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

print("tensorrt-rtx", trt.__version__)
WAYS = {
    "HardSwish": [helper.make_node("HardSwish", ["x"], ["y"])],
    "HardSigmoid, Mul": [
        helper.make_node("HardSigmoid", ["x"], ["gate"], alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["x", "gate"], ["y"]),
    ],
}


def parses(nodes, dtype):
    ends = [helper.make_tensor_value_info(name, dtype, [1, 8, 4, 4]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 22)], ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    parsed = parser.parse(model.SerializeToString())
    return "parsed" if parsed else parser.get_error(0).desc()


found = {}
for way, nodes in WAYS.items():
    for name, dtype in (("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)):
        found[way, name] = parses(nodes, dtype)
        print(f"{way:16} {name}: {found[way, name]}")
refused = [key for key, result in found.items() if result != "parsed"]
assert refused == [("HardSwish", "bf16")], f"this finding is out of date: {refused}"
PYTHON
