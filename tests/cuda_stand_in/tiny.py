"""The kernels of files.py's network, compiled: the first takes TMA descriptors where the architecture has TMA.

`python -m tests.cuda_stand_in.tiny FOLDER sm_87 sm_90`: a process of its own, without Triton's interpreter.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tests.cuda_stand_in.files import CLASSES, HIDDEN, PIXELS, ROWS, a_plan, packed, weights


@triton.jit
def _hidden_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, N, K: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
    rows, ks, hs = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K), tl.arange(0, H)
    x = tl.load(x_ptr + rows[:, None] * K + ks[None, :], mask=rows[:, None] < N, other=0.0).to(tl.float16)
    y = tl.dot(x, tl.load(w_ptr + ks[:, None] * H + hs[None, :])) + tl.load(b_ptr + hs)[None, :]
    if PDL:
        gdc_launch_dependents()
    y = tl.maximum(y, 0.0).to(tl.float16)
    tl.store(y_ptr + rows[:, None] * H + hs[None, :], y, mask=rows[:, None] < N)


@triton.jit
def _hidden_boxes_kernel(
    x_desc, w_desc, b_ptr, y_ptr, N, K: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
    rows, hs = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, H)
    x = x_desc.load([tl.program_id(0) * ROWS, 0]).to(tl.float16)
    y = tl.dot(x, w_desc.load([0, 0])) + tl.load(b_ptr + hs)[None, :]
    if PDL:
        gdc_launch_dependents()
    y = tl.maximum(y, 0.0).to(tl.float16)
    tl.store(y_ptr + rows[:, None] * H + hs[None, :], y, mask=rows[:, None] < N)


@triton.jit
def _output_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, partials_ptr, counters_ptr, N,
    H: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One image per program along axis 0, half of H along axis 1."""
    if PDL:
        gdc_wait()
    n, half = tl.program_id(0), tl.program_id(1)
    hs, cs = half * (H // 2) + tl.arange(0, H // 2), tl.arange(0, BLOCK_C)
    x = tl.load(x_ptr + n * H + hs).to(tl.float32)
    w = tl.load(w_ptr + hs[:, None] * C + cs[None, :], mask=cs[None, :] < C, other=0.0).to(tl.float32)
    tl.store(partials_ptr + (half * N + n) * BLOCK_C + cs, tl.sum(x[:, None] * w, 0))
    tl.debug_barrier()
    last = tl.atomic_add(counters_ptr + n, 1, sem="acq_rel", scope="gpu") == 1
    if PDL:
        gdc_launch_dependents()
    if last:
        tl.debug_barrier()
        y = tl.load(partials_ptr + n * BLOCK_C + cs) + tl.load(partials_ptr + (N + n) * BLOCK_C + cs)
        y += tl.load(b_ptr + cs, mask=cs < C, other=0.0)
        tl.store(y_ptr + n * C + cs, y, mask=cs < C)
        tl.store(counters_ptr + n, 0)


def _compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: str) -> Any:
    pdl = int(target.removeprefix("sm_")) >= 90
    constants = {**constants, "PDL": pdl}
    named = {**types, **dict.fromkeys(constants, "constexpr")}
    order = {parameter.name: named[parameter.name] for parameter in kernel.params}
    attributes = {(p.num,): [["tt.divisibility", 16]] for p in kernel.params if order[p.name][0] == "*"}
    options = {"num_warps": 4, **({"launch_pdl": True} if pdl else {})}
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(ASTSource(kernel, order, constants, attributes), target=gpu, options=options)


def make(target: str, folder: Path) -> None:
    """Compile the network, and write `<target>.kernels` and what a stand-in of that target runs."""
    boxes = int(target.removeprefix("sm_")) >= 90
    half, single = "*fp16", "*fp32"
    types = {"x_ptr": single, "w_ptr": half, "b_ptr": single, "y_ptr": half, "N": "i32"}
    described = {"x_desc": f"tensordesc<fp32[{ROWS}, {PIXELS}]>", "w_desc": f"tensordesc<fp16[{PIXELS}, {HIDDEN}]>"}
    second = {"x_ptr": half, "w_ptr": half, "b_ptr": single, "y_ptr": single, "partials_ptr": single}
    sizes = {"H": HIDDEN, "C": CLASSES, "BLOCK_C": 16}
    kernels = [
        _compiled(
            _hidden_boxes_kernel if boxes else _hidden_kernel,
            types | described if boxes else types,
            {"K": PIXELS, "H": HIDDEN, "ROWS": ROWS},
            target,
        ),
        _compiled(_output_kernel, {**second, "counters_ptr": "*i32", "N": "i32"}, sizes, target),
    ]
    tensors, entries = {}, []
    for kernel in kernels:
        cubin, facts = kernel.asm["cubin"], kernel.metadata
        sha256 = hashlib.sha256(cubin).hexdigest()
        tensors[f"cubin.{sha256}"] = np.frombuffer(cubin, np.uint8)
        (folder / f"{target}.{sha256}.cubin").write_bytes(cubin)
        (folder / f"{target}.{sha256}.ptx").write_text(kernel.asm["ptx"])
        entries.append({"cubin": sha256, "symbol": facts.name, "warps": facts.num_warps, "shared": facts.shared})
    plan = a_plan(target, entries, kernels[0].metadata.tensordesc_meta if boxes else ())
    (folder / f"{target}.kernels").write_bytes(packed(plan, {**tensors, **weights()}))


def main() -> None:
    for target in sys.argv[2:]:
        make(target, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
