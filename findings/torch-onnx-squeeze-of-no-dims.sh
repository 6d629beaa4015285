#!/usr/bin/env bash
# PyTorch 2.13.0: torch.onnx.export does not translate a squeeze of no dimensions.
#
# x.squeeze(()) is valid and gives x. torch.export records it as aten.squeeze.dims(x, []); the decompositions of
# torch.onnx.export make prims.view_of of that, for which it has no translation, and it ends with a ConversionError.
#
# Seen with torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2; x.squeeze((0,)) is translated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2
"$folder/venv/bin/python" - <<'PYTHON' 2>&1 | grep -v -i "torchvision\|warn\|return cls"
import torch


class Squeeze(torch.nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.squeeze(self.dims) * 2


print("torch", torch.__version__)
exported = {}
for dims in ((0,), ()):
    x = torch.ones(1, 3)
    assert Squeeze(dims)(x).shape == ((3,) if dims else (1, 3))
    try:
        torch.onnx.export(Squeeze(dims).eval(), (x,), dynamo=True, verbose=False)
        exported[dims] = True
        print(f"squeeze({dims}): exported")
    except Exception as error:
        exported[dims] = False
        print(f"squeeze({dims}): {type(error).__name__}; {str(error.__cause__).splitlines()[0]}")
        assert "prims.view_of" in str(error.__cause__)
assert exported == {(0,): True, (): False}, f"this finding is out of date: {exported}"
PYTHON
