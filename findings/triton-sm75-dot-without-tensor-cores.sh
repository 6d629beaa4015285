#!/usr/bin/env bash
# Triton 3.9 compiles tl.dot of float16 for compute capability 7.5 without tensor cores, and does not say so.
#
# GPUs of compute capability 7.5 (RTX 20, T4) have tensor cores for float16, and PTX has mma.m16n8k8 for them. The kernel below
# compiles for 7.5 without an error or a warning, into scalar fused multiply-adds of float32; for 8.0 the same source becomes
# mma.sync. Who picks kernels by "it compiles" gets a matrix product an order of magnitude slower than that GPU's own; a
# gate on the instructions of the compiled kernel sees it.
#
# Seen with triton 3.9.0, whose compiler runs without a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0 numpy==2.4.6
cat > "$folder/product.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a_ptr, b_ptr, c_ptr):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def products(capability: int) -> tuple[int, int]:
    """(tensor-core instructions, fused multiply-adds of float32) in the PTX."""
    source = ASTSource(product, signature={"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32"})
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    return len(re.findall(r"\bmma\.sync", ptx)), len(re.findall(r"\bfma\.rn\.f32", ptx))


found = {capability: products(capability) for capability in (75, 80)}
for capability, (tensor, scalar) in found.items():
    print(f"triton {triton.__version__}, capability {capability}: {tensor} mma.sync, {scalar} fma.rn.f32")
assert not found[75][0] and found[75][1] and found[80][0] and not found[80][1], "this finding is out of date"
PYTHON
TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W error "$folder/product.py"
