#!/usr/bin/env bash
# cuda-bindings: a CUtensorMap object lies at a multiple of 16, the driver's interface asks for a multiple of 64.
#
# CUDA's reference says of cuTensorMapEncodeTiled that the address of the tensor map must be aligned to 64 bytes, and C
# gets that from the type's alignas(64) (128 in the headers of CUDA 13). The class of the Python bindings keeps its 128 bytes
# where the allocator of Python objects puts them. Whether an encode through the bindings meets the rule is chance: of 64
# objects made in a row about one in four does. What encodes descriptors in Python needs memory of its own that is aligned,
# and the function's address from cuGetProcAddress.
#
# Seen with cuda-bindings 13.5.0 on x86-64; neither a GPU nor a driver is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cuda-bindings==13.5.0
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata

from cuda.bindings import driver

maps = [driver.CUtensorMap() for _ in range(64)]
beyond = sorted({tensor_map.getPtr() % 64 for tensor_map in maps})
aligned = sum(tensor_map.getPtr() % 64 == 0 for tensor_map in maps)
print(f"cuda-bindings {importlib.metadata.version('cuda-bindings')}: {aligned} of {len(maps)} CUtensorMap are at a multiple of 64; beyond one: {beyond}")
assert beyond[-1] and all(offset % 16 == 0 for offset in beyond), f"this finding is out of date: {beyond}"
PYTHON
