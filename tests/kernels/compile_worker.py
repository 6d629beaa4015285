"""Compiles `COMPILED_CASES` for the targets named on the command line and prints what was found as JSON.

A process of its own, because Triton's interpreter, in which the other tests run, cannot be switched off again.
"""

import dataclasses
import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.compile import compile_kernel, kernel_signature
from kernels.config import TARGETS, ConvConfig, ConvProblem, Target, select_config, shared_memory_bound
from kernels.implicit_gemm import _conv2d_bias_act_kernel
from kernels.launch import kernel_arguments, launch_options
from tests.kernels.conv_cases import COMPILED_CASES


def compiled(problem: ConvProblem, config: ConvConfig, target: Target) -> dict[str, Any]:
    kernel = compile_kernel(problem, config, target)
    measures = {f.name: getattr(kernel, f.name) for f in dataclasses.fields(kernel) if f.type in (int, "int")}
    return measures | {
        "faults": kernel.faults,
        "config": str(config),
        "shared_bound": shared_memory_bound(problem, config),
        "tensor_core_ops": dict(kernel.tensor_core_ops),
        "async_copies": dict(kernel.async_copies),
        "widest_load": kernel.widest_load,
        "cubin_bytes": len(kernel.cubin),
    }


def signature_derived_by_triton(problem: ConvProblem, config: ConvConfig) -> tuple[Any, Any, Any]:
    """What Triton's JIT makes of the launch: the launcher's arguments, tensors included, without a launch."""
    kernel = _conv2d_bias_act_kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    tensors = [torch.empty(64, dtype=problem.dtype) for _ in range(5)]
    if not problem.has_residual:
        tensors[3] = None
    options = launch_options(config)
    bound, specialization, _ = binder(*tensors, **kernel_arguments(problem, config), **options)
    _, types, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return types, constants, {path: value for path, value in attributes.items() if value}


def signatures_agree(problem: ConvProblem, config: ConvConfig) -> bool:
    types, constants, attributes = kernel_signature(problem, config)
    positions = {(_conv2d_bias_act_kernel.arg_names.index(name),): value for name, value in constants.items()}
    return (types, positions, attributes) == signature_derived_by_triton(problem, config)


def tile_offset_types(problem: ConvProblem, config: ConvConfig) -> list[str]:
    """The integer type of the offsets of each address addition on a two-dimensional tile, in order."""
    source = ASTSource(_conv2d_bias_act_kernel, *kernel_signature(problem, config))
    text = triton.compile(source, GPUTarget("cuda", 90, 32), options=launch_options(config)).asm["ttir"]
    return re.findall(r"tt\.addptr .*: tensor<(?:\d+x){2}!tt\.ptr<\w+>>, tensor<(?:\d+x){2}(\w+)>", text)


def main(names: list[str]) -> None:
    report: dict[str, Any] = {"compiled": {}, "signatures_disagree": [], "tile_offsets": {}}
    for case, problem in COMPILED_CASES.items():
        for target in (TARGETS[name] for name in names):
            config = select_config(problem, target)
            report["compiled"][f"{target.name} {case}"] = compiled(problem, config, target)
        if not signatures_agree(problem, config):
            report["signatures_disagree"].append(case)
        report["tile_offsets"][case] = tile_offset_types(problem, config)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
