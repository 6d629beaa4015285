"""A graph as calls of kernels: what they compute one after the other is the network, or an operator is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from export import Batch, ExportError, fuse
from export.base.precision import PRECISIONS
from export.fusion.program import FusedProgram
from export.lowering.arena import plan_arena
from export.lowering.kernel_calls import Calls, kernel_calls, storage_of
from export.lowering.kernel_emulation import Activations
from export.lowering.kernel_engine import Schedule, Step
from kernels.configs.selection import select_config
from kernels.configs.targets import TARGETS
from kernels.launch import Workspace, launch_arguments
from kernels.plan import plan
from tests.export import zoo

# With the number of calls for float16: one more for each that a change of layout, or of who reads what, brings.
GO = {
    "bottleneck": 8, "preact": 9, "resnet_d": 9, "squeeze_excite": 10, "eca": 10, "densenet": 24, "shufflenet": 13,
    "mobilenet_v3": 15, "inception": 15, "ssd": 21, "space_to_depth": 8, "squeezed_embedding": 7,
    "one_probability": 8, "view": 9, "glu": 10,
}  # fmt: skip
REFUSED = {
    "cbam": "adaptive_max_pool2d (1.branch.1), mean (1.branch.1), max (1.branch.1)",
    "unet": "conv_transpose2d (up)",
    "ibn": "instance_norm (1.branch.1.instance)",
    "flip_augmented": "flip (flip)",
    "option_a": "pad (1.shortcut)",
}
LIMITS = {"fp16": 5e-3, "fp32": 1e-6}


def program_of(kind: str) -> tuple[FusedProgram, Tensor]:
    x = zoo.pictures(3)
    return fuse(zoo.settled(kind).eval(), x[:1], Batch(1, 1, 4)), x


def outputs_of(calls: Calls, inputs: Mapping[str, Any]) -> list[Tensor]:
    """What the operators' references make of the inputs, call by call, launched as on a GPU."""
    found, workspace = Activations.of(Schedule(calls, (), {}, {}, plan_arena([])), inputs), Workspace("meta")
    launched = []
    for call in calls.calls:
        values = dict(call.tensors)
        for launch in plan(call.problem, select_config(call.problem, TARGETS["sm_90"]), TARGETS["sm_90"]):
            arguments = launch_arguments(launch, values, workspace)
            launched.append(arguments)  # a storage is known by its address: it is not to be used again
            tensors = {name: getattr(value, "base", value) for name, value in arguments.items() if value is not None}
            found.compute(Step(call, launch, "", (), tensors))
    return [found.held[storage_of(y)].as_strided(y.shape, y.stride()) for y in calls.outputs.values()]


@pytest.mark.parametrize("kind", GO)
def test_calls_compute_the_network(kind: str) -> None:
    program, x = program_of(kind)
    for precision, limit in LIMITS.items():
        graph_module = program.at(PRECISIONS[precision])
        for size in (1, 3):
            calls = kernel_calls(program, graph_module, PRECISIONS[precision], size)
            expected = [y for y in pytree.tree_leaves(program(x[:size])) if isinstance(y, Tensor)]
            for found, exact in zip(outputs_of(calls, {"input": x[:size].numpy()}), expected, strict=True):
                assert found.dtype == torch.float32 and found.shape == exact.shape and found.is_contiguous()
                assert float((found - exact).abs().max() / exact.abs().max()) < limit
            assert precision == "fp32" or len(calls.calls) == GO[kind]


@pytest.mark.parametrize("kind", REFUSED)
def test_an_operator_without_a_kernel_is_named(kind: str) -> None:
    program, _ = program_of(kind)
    with pytest.raises(ExportError) as refusal:
        kernel_calls(program, program.graph_module, PRECISIONS["fp32"], 1)
    assert str(refusal.value) == f"no kernel computes {REFUSED[kind]}"


def test_a_gate_its_shortcut_and_relu_are_one_call() -> None:
    program, _ = program_of("squeeze_excite")
    calls = kernel_calls(program, program.at(PRECISIONS["fp16"]), PRECISIONS["fp16"], 2).calls
    (gate,) = [call.problem for call in calls if getattr(call.problem, "operation", "") == "multiply"]
    assert gate.activation == "relu" and gate.c is not None and gate.b.strides[1:3] == (0, 0)  # type: ignore[attr-defined]
