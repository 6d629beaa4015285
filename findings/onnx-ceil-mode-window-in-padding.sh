#!/usr/bin/env bash
# ONNX's MaxPool with ceil_mode, whose last window lies in the padding alone: runtimes disagree about the shape.
#
# 2x2 windows, stride 2, padding 1 on each side, of 3 x 3 values: ceil((3 + 2 - 2) / 2) + 1 = 3 windows along a side, the last
# of which begins behind the last value. PyTorch says that a window has to begin within the input or the padding before
# it, and drops it; ONNX Runtime does the same. OpenVINO and TensorRT-RTX's parser keep it.
# One file then has an output of 2 x 2 in one place and of 3 x 3 in another, without a word from either.
#
# Seen with torch 2.13.0 and onnxruntime 1.31.1 (2 x 2), openvino 2026.4.1 and tensorrt-rtx 1.7.1.116 (3 x 3); no GPU needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1 openvino==2026.4.1 tensorrt-rtx==1.7.1.116
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
import openvino
import tensorrt_rtx as trt
import torch
from onnx import TensorProto, helper

x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)
inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))]
outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
graph = helper.make_graph([node], "g", inputs, outputs)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10).SerializeToString()

shapes = {}
pooled = torch.nn.functional.max_pool2d(torch.from_numpy(x), 2, 2, 1, ceil_mode=True)
shapes[f"torch {torch.__version__}"] = tuple(pooled.shape)
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
shapes[f"onnxruntime {onnxruntime.__version__}"] = session.run(None, {"x": x})[0].shape
core = openvino.Core()
shapes[f"openvino {openvino.__version__}"] = tuple(core.read_model(model, b"").outputs[0].shape)
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, builder.logger)
assert parser.parse(model), parser.get_error(0)
shapes[f"tensorrt-rtx {trt.__version__}"] = tuple(network.get_output(0).shape)
for name, shape in shapes.items():
    print(f"{name}: {list(shape)}")
sizes = [shape[-1] for shape in shapes.values()]
assert sizes == [2, 2, 3, 3], f"this finding is out of date: {sizes}"
PYTHON
