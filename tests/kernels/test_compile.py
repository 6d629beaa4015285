"""The machine code of whole networks on every target, and the gate that judges it."""

import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from kernels.compile import CompiledKernel, compile_kernel
from kernels.configs.config import BottleneckConfig, ConvConfig, HeadConfig, StemConfig
from kernels.configs.targets import TARGETS
from kernels.jit.implicit_gemm import _conv2d_gathered_kernel
from kernels.plan import plan
from kernels.problems import BottleneckProblem, ConvProblem, HeadProblem, Projection, StemProblem
from tests.kernels.conftest import start_worker


def result_of(worker: subprocess.Popen[str]) -> Any:
    stdout, stderr = worker.communicate(timeout=900)
    assert worker.returncode == 0, stderr
    return json.loads(stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every distinct kernel by target."""
    kernels = result_of(start_worker("compile_worker", tmp_path_factory.mktemp("triton")))
    return {target: [kernel for kernel in kernels if kernel["target"] == target] for target in TARGETS}


@pytest.fixture(scope="module")
def signatures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return result_of(start_worker("signature_worker", tmp_path_factory.mktemp("triton")))


KERNELS = {
    "_conv2d_bias_relu_maxpool_kernel",
    "_conv2d_boxes_kernel",
    "_conv2d_conv1x1_kernel",
    "_conv2d_gathered_kernel",
    "_mean_linear_kernel",
}


@pytest.mark.parametrize("target", TARGETS)
def test_networks_compile_to_good_code(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    """No spills, shared memory within its limit and its estimate, tensor cores, wide loads."""
    problems = []
    for kernel in compiled[target]:
        what = f"{kernel['kernel']} for {kernel['problem']} as {kernel['config']}"
        problems += [f"{what}: {fault}" for fault in kernel["faults"]]
        if not 0 < kernel["shared_bytes"] <= kernel["shared_bound"]:
            problems.append(
                f"{what}: {kernel['shared_bytes']} bytes of shared memory, estimated {kernel['shared_bound']}"
            )
        assert 0 < kernel["registers"] <= 255, what
    assert not problems, "\n".join(["", *problems])


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_that_a_target_runs_was_compiled(target: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    names = {kernel["kernel"] for kernel in compiled[target]}
    assert names == (KERNELS if TARGETS[target].has_tma else KERNELS - {"_conv2d_boxes_kernel"})
    assert len(compiled[target]) > 50


def test_what_is_compiled_is_what_is_launched(signatures: dict[str, Any]) -> None:
    """Types, constants and attributes are those that Triton derives from the launcher's arguments."""
    assert {*signatures["kernels"]} == KERNELS
    assert {name: found for name, found in signatures["disagreements"].items() if found} == {}


def test_offsets_in_tensors_of_any_size_are_64_bit(signatures: dict[str, Any]) -> None:
    """Where a pixel or a filter begins; what is added within one of them may be 32-bit."""
    small = {"bias_ptr", "expand_bias_ptr", "partials_ptr"}
    for name, offsets in signatures["tile_offsets"].items():
        assert "y_ptr" in offsets, name
        assert {pointer for pointer, types in offsets.items() if "i64" not in types} <= small, (name, offsets)
    activations = ("x_ptr", "shortcut_ptr", "residual_ptr", "y_ptr")
    gathered = [offsets for name, offsets in signatures["tile_offsets"].items() if name.startswith("gathered")]
    assert len(gathered) > 5
    for offsets in gathered:
        assert all(offsets[pointer] == ["i64"] for pointer in activations if pointer in offsets), offsets


def test_launches_share_code_where_only_run_time_sizes_differ(signatures: dict[str, Any]) -> None:
    assert signatures["codes_of_other_run_time_sizes"] == 1
    assert signatures["codes_of_all_launches"] == len(signatures["disagreements"])


PROBLEM = ConvProblem(8, 64, 56, 56, 64, (3, 3), padding=(1, 1), relu=True)
POINTWISE = replace(PROBLEM, kernel=(1, 1), padding=(0, 0))
CONFIG = ConvConfig(128, 64, 64, 4, 3)


def kernel_of(problem: Any, config: Any, **changes: Any) -> CompiledKernel:
    """A good kernel for sm_90, some of its findings replaced."""
    (launch,) = plan(problem, config, TARGETS["sm_90"])
    good = CompiledKernel(
        launch=launch,
        target=TARGETS["sm_90"],
        registers=160,
        stack_bytes=0,
        spill_loads=0,
        spill_stores=0,
        shared_bytes=98304,
        tensor_core_ops={"HGMMA": 8},
        global_loads={4: 8},
        async_copies={16: 36},
        box_loads=0,
        cubin=b"",
    )
    return replace(good, **changes)


FP32 = replace(PROBLEM, dtype=torch.float32)
BOXES = replace(CONFIG, box=(2, 8, 8))
BOXED = {"async_copies": {}, "box_loads": 2}
BOTTLENECK = BottleneckProblem(PROBLEM, 256, projection=Projection(64, 56, 56, (1, 1)), relu=True)
STEM = StemProblem(ConvProblem(8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), relu=True))
GOOD = {
    "conv": kernel_of(PROBLEM, CONFIG),
    "fp32-on-ordinary-units": kernel_of(FP32, CONFIG, tensor_core_ops={}),
    "unaligned-channels": kernel_of(replace(PROBLEM, c_in=3), CONFIG, async_copies={}),
    "single-slice": kernel_of(POINTWISE, CONFIG, global_loads={4: 8, 16: 12}, async_copies={}),
    "32-rows": kernel_of(PROBLEM, replace(CONFIG, block_m=32), tensor_core_ops={"HMMA": 64}),
    "previous-target": kernel_of(PROBLEM, CONFIG, target=TARGETS["sm_80"], tensor_core_ops={"HMMA": 64}),
    "tile-too-small-for-16-bytes": kernel_of(
        PROBLEM, ConvConfig(64, 16, 32, 4, 3), async_copies={8: 4, 16: 36}
    ),
    "boxes": kernel_of(PROBLEM, BOXES, **BOXED),
    "bottleneck": kernel_of(BOTTLENECK, BottleneckConfig(128, 64, 64, 4, 2)),
    "stem": kernel_of(STEM, StemConfig(64, 64, 32, 2, 4, 2), async_copies={}),
    "head": kernel_of(
        HeadProblem(8, 2048, 7, 7, 1000), HeadConfig(16, 64, 32, 4),
        tensor_core_ops={"HMMA": 8}, global_loads={16: 4}, async_copies={},
    ),
}  # fmt: skip
FAULTY = {
    "stack": (replace(GOOD["conv"], stack_bytes=72), "spills: 72 bytes of stack"),
    "spill-store": (replace(GOOD["conv"], spill_stores=3), "3 stores"),
    "spill-load": (replace(GOOD["boxes"], spill_loads=2), "2 loads"),
    "shared-memory": (replace(GOOD["conv"], shared_bytes=232449), "232449 bytes of shared memory, limit 232448"),
    "no-tensor-cores": (replace(GOOD["conv"], tensor_core_ops={}), "no HGMMA"),
    "previous-tensor-cores": (replace(GOOD["conv"], tensor_core_ops={"HMMA": 64}), "no HGMMA"),
    "previous-tensor-cores-of-boxes": (replace(GOOD["boxes"], tensor_core_ops={"HMMA": 64}), "no HGMMA"),
    "previous-tensor-cores-of-a-stem": (replace(GOOD["stem"], tensor_core_ops={"HMMA": 64}), "no HGMMA"),
    "hopper-instructions-elsewhere": (replace(GOOD["conv"], target=TARGETS["sm_80"]), "no HMMA"),
    "head-without-tensor-cores": (replace(GOOD["head"], tensor_core_ops={}), "no HMMA"),
    "tf32-without-tensor-cores": (
        kernel_of(FP32, replace(CONFIG, input_precision="tf32"), tensor_core_ops={}), "no HGMMA",
    ),
    "some-narrow-copies": (replace(GOOD["conv"], async_copies={8: 4, 16: 36}), "expected copies of 16 bytes"),
    "narrow-copies": (replace(GOOD["conv"], async_copies={4: 36}), "expected copies of 16 bytes"),
    "no-copies": (replace(GOOD["conv"], async_copies={}), "expected copies of 16 bytes"),
    "narrow-copies-of-a-bottleneck": (replace(GOOD["bottleneck"], async_copies={8: 36}), "expected copies of 16"),
    "narrow-loads-of-a-single-slice": (replace(GOOD["single-slice"], global_loads={8: 12}), "loads {8: 12}"),
    "narrow-loads-of-a-head": (replace(GOOD["head"], global_loads={8: 12}), "loads {8: 12}"),
    "boxes-without-tma": (replace(GOOD["boxes"], box_loads=0), "no TMA load"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_code_has_no_faults(name: str) -> None:
    assert GOOD[name].faults == []


@pytest.mark.parametrize("name", FAULTY)
def test_each_fault_is_found(name: str) -> None:
    kernel, message = FAULTY[name]
    assert len(kernel.faults) == 1 and message in kernel.faults[0], kernel.faults


@pytest.mark.skipif(isinstance(_conv2d_gathered_kernel, JITFunction), reason="Triton's interpreter is off")
def test_the_interpreter_cannot_compile() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_kernel(GOOD["conv"].launch, TARGETS["sm_90"])
