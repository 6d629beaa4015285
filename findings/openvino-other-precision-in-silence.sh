#!/usr/bin/env bash
# OpenVINO 2026.4.1: on a CPU with bfloat16 it computes a float32 file in bfloat16, and so one for which float16 is asked.
#
# Nothing says so but the compiled model's INFERENCE_PRECISION_HINT, read back. The results are off by 2^-9, not 2^-24.
# INFERENCE_PRECISION_HINT "f32" gives float32. "f16" on a CPU that does not list FP16 among its OPTIMIZATION_CAPABILITIES
# is taken for bf16, 8 times as coarse, and no error.
#
# Seen with openvino 2026.4.1 on an AMD EPYC with avx512_bf16; needs a CPU with avx512_bf16 or amx_bf16, without avx512_fp16.
set -euo pipefail
if ! grep -qE '\b(avx512_bf16|amx_bf16)\b' /proc/cpuinfo || grep -qw avx512_fp16 /proc/cpuinfo; then
    echo "not shown: it needs a CPU with bfloat16 and without float16" >&2
    exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 openvino==2026.4.1
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

print("openvino", openvino.__version__)
random = np.random.default_rng(0)
x = random.standard_normal((1, 64, 16, 16)).astype(np.float32)
w = random.standard_normal((64, 64, 1, 1)).astype(np.float32)
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(w, "w")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
exact = np.einsum("oc,nchw->nohw", w[:, :, 0, 0].astype(np.float64), x.astype(np.float64))
core, found = openvino.Core(), {}
print("the CPU computes in", ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
for asked in ("", "f32", "f16"):
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": asked} if asked else {}
    )
    error = np.linalg.norm(compiled({"x": x})["y"] - exact) / np.linalg.norm(exact)
    found[asked] = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    print(f"asked for {asked or 'nothing':7}: computes in {found[asked]}, relative error {error:.1e}")
    assert (error > 1e-3) == (found[asked] == "bf16"), "this finding is out of date"
assert found == {"": "bf16", "f32": "f32", "f16": "bf16"}, f"this finding is out of date: {found}"
PYTHON
