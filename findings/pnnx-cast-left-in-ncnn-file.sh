#!/usr/bin/env bash
# pnnx says that it converted an ONNX file with a Cast, and what it wrote for ncnn cannot be loaded.
#
# A file in float16 that takes and gives float32 has a Cast at either end. pnnx turns each into an operator called
# Tensor.to, says that it ignores the operator's parameters, ends with 0 and writes the .ncnn.param with it; the convolution
# in between stays ONNX's Conv. ncnn knows neither layer and refuses the file when the application starts. In float32,
# without the Casts, the same network loads. Whoever converts has to load the result before trusting it.
#
# Seen with pnnx 20261020 and ncnn 1.0.20261020.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ncnn==1.0.20261020 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps pnnx==20261020
cat > "$folder/convert.py" <<'PYTHON'
import importlib.util
import subprocess
from pathlib import Path

import ncnn
import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model


def converted(half: bool, folder: Path) -> tuple[int, list[str], int]:
    """pnnx's exit code, the layers it wrote, and what ncnn says to them (0: they load)."""
    type_ = np.float16 if half else np.float32
    weight = numpy_helper.from_array(np.ones((8, 3, 3, 3), type_), "weight")
    conv = [helper.make_node("Conv", ["x16" if half else "x", "weight"], ["y16" if half else "y"], pads=[1, 1, 1, 1])]
    if half:
        conv.insert(0, helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16))
        conv.append(helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8, 8])]
    graph = helper.make_graph(conv, "conv", inputs, outputs, [weight])
    path = folder / f"conv{16 if half else 32}.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    program = Path(importlib.util.find_spec("pnnx").origin).parent / "pnnx"
    ended = subprocess.run([program, path, "fp16=0"], cwd=folder, capture_output=True, check=False)
    param = path.with_suffix(".ncnn.param")
    layers = [line.split()[0] for line in param.read_text().splitlines()[2:]]
    return ended.returncode, layers, ncnn.Net().load_param(str(param))


folder = Path(__file__).parent
single, half = converted(False, folder), converted(True, folder)
for name, (code, layers, loaded) in (("float32", single), ("float16", half)):
    print(f"{name}: pnnx ends with {code}, writes {' '.join(layers)}; ncnn {'loads' if not loaded else 'refuses'} it")
assert single[0] == half[0] == 0 and not single[2] and half[2], "this finding is out of date"
assert "Tensor.to" in half[1], "this finding is out of date"
PYTHON
"$folder/venv/bin/python" "$folder/convert.py"
