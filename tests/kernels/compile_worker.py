"""Compiles kernels for every target, compares what kernels.compile says of launches with what Triton makes of them.

Prints JSON. A process of its own, because Triton's interpreter, in which the other tests run, cannot be switched off
again.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.compile import code_key, compile_kernel, compile_problems, kernel_signature, unserved_reason
from kernels.configs.config import Config, KernelLaunch, Operand
from kernels.configs.convolution import ConvConfig
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS, Target
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemWindowsConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig
from kernels.operators.mean_linear import HeadConfig
from kernels.oracle import make_inputs
from kernels.plan import kernel_of, plan
from kernels.problems import ConvProblem, Problem
from tests.kernels.cases import ONE_OF_EACH, SMALL, STEM_CASES
from tests.kernels.launching import run
from tests.kernels.networks import COMPILED, hardest_problems

TARGET = TARGETS["sm_90"]
GPU = GPUTarget("cuda", TARGET.capability, 32)
GATHERED = ConvConfig(64, 32, 32, 4, 3)
BOXES = replace(GATHERED, block_k=16, box=(1, 8, 8))
FUSED = BottleneckConfig(64, 32, 16, 4, 2)
LAUNCHES: dict[str, tuple[Problem, Config]] = {
    "gathered": (ONE_OF_EACH["conv"], GATHERED),
    "gathered-plain": (replace(SMALL, has_residual=False, relu=False), GATHERED),
    "gathered-fp32": (SMALL.with_dtype(torch.float32), replace(GATHERED, block_k=16)),
    "gathered-bf16": (SMALL.with_dtype(torch.bfloat16), GATHERED),
    "gathered-groups": (replace(SMALL, groups=2), GATHERED),
    "gathered-split": (ONE_OF_EACH["conv"], replace(GATHERED, split_k=3)),
    "gathered-projection": (ONE_OF_EACH["projection"], GATHERED),
    "boxes": (ONE_OF_EACH["conv"], BOXES),
    "boxes-projection": (ONE_OF_EACH["projection"], BOXES),
    "bottleneck": (ONE_OF_EACH["bottleneck-residual"], FUSED),
    "bottleneck-projection": (ONE_OF_EACH["bottleneck-projection"], FUSED),
    "bottleneck-boxes": (ONE_OF_EACH["bottleneck-projection"], replace(FUSED, box=(1, 8, 8))),
    "stem": (ONE_OF_EACH["stem"], StemConfig(32, 64, 32, 2, 4, 2)),
    "stem-windows": (STEM_CASES["resnet-even"], StemWindowsConfig(32, 64, 128, 2, 4, 3)),
    "head": (ONE_OF_EACH["head"], HeadConfig(16, 64, 32, 4)),
}


# One block: what goes to and from it can be told beforehand.
ONE_TILE = ConvProblem(1, 64, 8, 8, 64, (3, 3), padding=(1, 1), relu=True)
TILE = ConvConfig(64, 64, 32, 4, 2)
UNSERVED = (TARGETS["sm_100"], TARGETS["sm_121"], Target("sm_75", 75, 64 * 1024, 40), Target("sm_99", 99, 99 * 1024, 1))


def launch_of(problem: Problem, config: Config) -> KernelLaunch:
    (launch,) = plan(problem, config, TARGET)
    return launch


def argument(operand: Operand | None) -> Any:
    """A tensor or descriptor such as launch.py passes."""
    if operand is None:
        return None
    if operand.block is None:
        return torch.empty(64, dtype=operand.dtype)
    tensor = torch.empty(operand.block, dtype=operand.dtype)
    return TensorDescriptor(tensor, [*tensor.shape], [*tensor.stride()], [*operand.block])


def signature_derived_by_triton(launch: KernelLaunch) -> tuple[Any, Any, Any]:
    """What Triton's JIT makes of the arguments, tensors included, without a launch."""
    backend, kernel = make_backend(GPU), kernel_of(launch)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    operands = {name: argument(operand) for name, operand in launch.operands.items()}
    bound, specialization, _ = binder(**operands, **launch.scalars, **launch.options)
    _, *derived = kernel._pack_args(backend, launch.options, bound, specialization, launch.options)
    return tuple(derived)


def disagreement(launch: KernelLaunch) -> list[str]:
    types, constants, attributes = kernel_signature(launch)
    names = kernel_of(launch).arg_names
    positions = {(names.index(name),): value for name, value in constants.items()}
    ours, triton_s = (types, positions, attributes), signature_derived_by_triton(launch)
    return [f"{mine} instead of {theirs}" for mine, theirs in zip(ours, triton_s, strict=True) if mine != theirs]


def first_stage(launch: KernelLaunch) -> str:
    """The kernel in Triton's own language of tensors, before anything is known of a GPU."""
    backend, context = make_backend(GPU), ir.context()
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    source, options = ASTSource(kernel_of(launch), *kernel_signature(launch)), backend.parse_options(launch.options)
    backend.add_stages(stages, options, source.language)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(GPU, options, functions, backend.get_module_map(), context)
    return str(stages["ttir"](module, {}))


def tile_offsets(launch: KernelLaunch) -> dict[str, list[str]]:
    """By pointer parameter: the integer types that are added to it, in tiles of addresses."""
    roots: dict[str, str] = {}
    found: dict[str, set[str]] = {}
    step = re.compile(
        r"%(\w+) = tt\.(?:addptr|splat|broadcast|expand_dims) %(\w+).* : .*?(?:, tensor<(?:\d+x)+(i\d+)>)?(?: loc.*)?$"
    )
    carried = re.compile(r"%(\w+) = %(\w+)[,)]")  # by a loop, from one iteration to the next
    for line in first_stage(launch).splitlines():
        if "iter_args(" in line:
            roots |= {result: roots.get(operand, operand) for result, operand in carried.findall(line)}
        for result, operand, offsets in step.findall(line):
            roots[result] = roots.get(operand, operand)
            if offsets:
                found.setdefault(roots[result], set()).add(offsets)
    return {name: sorted(types) for name, types in found.items()}


def products(
    compiled: list[dict[str, Any]], problems: Mapping[Target, Sequence[Problem]]
) -> dict[str, tuple[int, int, int]]:
    """By kernel: FLOPs that its problem needs, that its tiles have, and that its machine code was seen to do."""
    launches = {
        (target.name, launch.problem.key, json.dumps(launch.config.to_json())): launch
        for target in problems
        for problem in problems[target]
        for launch in plan(problem, select_config(problem, target), target)
        if problem.dtype != torch.float32  # which no tensor core multiplies
    }
    found = {}
    for kernel in compiled:
        launch = launches.get((kernel["target"], kernel["problem"], json.dumps(kernel["config"])))
        if launch is not None:
            key = f"{kernel['target']} {kernel['kernel']} {kernel['problem']}"
            found[key] = launch.problem.flops, flops_of_tiles(launch), kernel["floors"][0]["matrix_flops"]
    return found


def flops_of_tiles(launch: KernelLaunch) -> int:
    """Of all blocks, if each does what the one in the middle does; 0 where that is not simply told."""
    s = launch.scalars
    if launch.kernel.startswith("box_gemm"):
        slices, rows = (s["R"] * s["S"] * s["C_IN"] + s["C_S"]) // s["BLOCK_K"], s["TILE_N"] * s["TILE_P"] * s["TILE_Q"]
    elif "SPLIT_K" in s and "R" in s:
        slices, rows = s["K_BLOCKS"] + s["K_BLOCKS_S"], s["BLOCK_M"]
    else:
        return 0
    of_one = -(-slices // s["SPLIT_K"])
    depth = max(0, min(of_one, slices - launch.grid[0] // 2 % s["SPLIT_K"] * of_one))
    return 2 * math.prod(launch.grid) * rows * s["BLOCK_N"] * s["BLOCK_K"] * depth


def traffic() -> dict[str, int]:
    """Bytes between L2 and one block that is all of a convolution."""
    configs = {"sm_87": TILE, "sm_90": TILE, "sm_120": TILE, "sm_90 boxes": replace(TILE, box=(1, 8, 8))}
    found = {}
    for name, config in configs.items():
        target = TARGETS[name.split()[0]]
        (launch,) = plan(ONE_TILE, config, target)
        found[name] = compile_kernel(launch, target).floor().l2_bytes
    return found


def refusal() -> str:
    """What the launcher says of tensors on a CPU, where there is no interpreter to run them."""
    try:
        return str(run(make_inputs(SMALL)))
    except ValueError as error:
        return str(error)


def main() -> None:
    problems = {target: found for alike in COMPILED for target, found in hardest_problems(alike).items()}
    compiled = compile_problems(problems, floors=True)
    launches = {name: launch_of(problem, config) for name, (problem, config) in LAUNCHES.items()}
    larger = replace(SMALL, batch=7, height=9, width=30)
    report = {
        "kernels": sorted({launch.kernel.split(".")[1] for launch in launches.values()}),
        "disagreements": {name: disagreement(launch) for name, launch in launches.items()},
        "tile_offsets": {name: tile_offsets(launch) for name, launch in launches.items()},
        "codes_of_other_run_time_sizes": len({code_key(launch_of(problem, GATHERED)) for problem in (SMALL, larger)}),
        "codes_of_all_launches": len({code_key(launch) for launch in launches.values()}),
        "refusal": refusal(),
        "compiled": compiled,
        "products": products(compiled, problems),
        "traffic": traffic(),
        "unserved": {target.name: unserved_reason(target) for target in UNSERVED},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
