"""The machine code of whole networks on every target, and the gate that judges it."""

import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from kernels.compile import CompiledKernel, compile_kernel
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from kernels.configs.targets import TARGETS
from kernels.jit.implicit_gemm import _conv2d_gathered_kernel
from kernels.operators.conv2d_bias_relu_maxpool import StemConfig, StemProblem, StemWindowsConfig
from kernels.operators.conv2d_conv1x1_bias_act import BottleneckConfig, BottleneckProblem
from kernels.operators.mean_linear import HeadConfig, HeadProblem
from kernels.plan import plan
from kernels.problems import ConvProblem, Problem, Projection
from tests import children
from tests.kernels.families import FUSED_KERNELS
from tests.kernels.networks import COMPILED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What compile_worker.py found, without the interpreter; nothing is taken from an earlier run's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = children.run([sys.executable, "-m", "tests.kernels.compile_worker"], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


KERNELS = {name.partition(".")[2] for name in FUSED_KERNELS}


@pytest.mark.parametrize("targets", COMPILED, ids=" ".join)
def test_networks_compile_to_good_code(targets: tuple[str, ...], report: dict[str, Any]) -> None:
    """No spills, shared memory within its limit and its estimate, tensor cores, wide loads; every kernel there is."""
    compiled, problems = [kernel for kernel in report["compiled"] if kernel["target"] in targets], []
    spills = "sm_120" in targets and version("triton").startswith("3.6.")  # its ptxas does, a register or a few
    for kernel in compiled:
        what = f"{kernel['kernel']} for {kernel['problem']} as {kernel['config']}"
        problems += [f"{what}: {fault}" for fault in kernel["faults"] if not (spills and fault.startswith("spills"))]
        if not 0 < kernel["shared_bytes"] <= kernel["shared_bound"]:
            problems.append(f"{what}: {kernel['shared_bytes']} bytes of shared, estimated {kernel['shared_bound']}")
        assert 0 < kernel["registers"] <= 255, what
    assert not problems, "\n".join(["", *problems])
    names = {kernel["kernel"] for kernel in compiled}
    assert names == (KERNELS if TARGETS[targets[0]].has_tma else KERNELS - {"_conv2d_boxes_kernel"})
    assert len(compiled) > 25


def test_loops_are_followed_as_often_as_they_run(report: dict[str, Any]) -> None:
    """Of every kernel, seen in its machine code: the products of all its tiles, no iteration more or less."""
    assert len(report["products"]) > 25 * len(COMPILED)
    for kernel, (needed, of_tiles, seen) in report["products"].items():
        assert seen == of_tiles if of_tiles else seen >= needed, kernel


def test_addresses_and_masks_are_followed(report: dict[str, Any]) -> None:
    """A 3x3 convolution in one block: the pixels under each tap, 64 channels each, filters, bias and result."""
    under_taps = (7 + 8 + 7) ** 2
    gathered = 128 * (under_taps + 9 * 64 + 1 + 64)
    boxes = 128 * (9 * 64 + 9 * 64 + 1 + 64)
    assert report["traffic"] == dict.fromkeys(("sm_87", "sm_90", "sm_120"), gathered) | {"sm_90 boxes": boxes}


def test_what_triton_does_not_serve_is_said_and_not_compiled(report: dict[str, Any]) -> None:
    unserved = report["unserved"]
    assert [name for name, reason in unserved.items() if reason is None] == ["sm_100", "sm_121"]
    assert "no HMMA" in unserved["sm_75"] and "Triton" in unserved["sm_99"]


def test_cpu_tensors_without_the_interpreter_are_refused(report: dict[str, Any]) -> None:
    assert "x is on cpu, expected a CUDA device" in report["refusal"]


def test_what_is_compiled_is_what_is_launched(report: dict[str, Any]) -> None:
    """Types, constants and attributes are those that Triton derives from the launcher's arguments."""
    assert {*report["kernels"]} == KERNELS
    assert {name: found for name, found in report["disagreements"].items() if found} == {}


def test_offsets_in_tensors_of_any_size_are_64_bit(report: dict[str, Any]) -> None:
    """Where a pixel or a filter begins; what is added within one of them may be 32-bit."""
    small = {"bias_ptr", "expand_bias_ptr", "partials_ptr"}
    for name, offsets in report["tile_offsets"].items():
        assert "y_ptr" in offsets, name
        assert {pointer for pointer, types in offsets.items() if "i64" not in types} <= small, (name, offsets)
    activations = ("x_ptr", "shortcut_ptr", "residual_ptr", "y_ptr")
    gathered = [offsets for name, offsets in report["tile_offsets"].items() if name.startswith("gathered")]
    assert len(gathered) > 5
    for offsets in gathered:
        assert all(offsets[pointer] == ["i64"] for pointer in activations if pointer in offsets), offsets


def test_launches_share_code_where_only_run_time_sizes_differ(report: dict[str, Any]) -> None:
    assert report["codes_of_other_run_time_sizes"] == 1
    assert report["codes_of_all_launches"] == len(report["disagreements"])


PROBLEM = ConvProblem(8, 64, 56, 56, 64, (3, 3), padding=(1, 1), relu=True)
POINTWISE = replace(PROBLEM, kernel=(1, 1), padding=(0, 0))
CONFIG = ConvConfig(128, 64, 64, 4, 3)


def kernel_of(problem: Problem, config: Config, **changes: Any) -> CompiledKernel:
    """A good kernel for sm_90, some of its findings replaced."""
    (launch,) = plan(problem, config, TARGETS["sm_90"])
    good = CompiledKernel(
        launch, TARGETS["sm_90"], registers=160, stack_bytes=0, spill_loads=0, spill_stores=0, shared_bytes=98304,
        tensor_core_ops={"HGMMA": 8}, global_loads={4: 8}, async_copies={16: 36}, box_loads=0, cubin=b"",
    )  # fmt: skip
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
    "no-products": kernel_of(PROBLEM, CONFIG, tensor_core_ops={}, multiplies=False),
    "tensor-memory": kernel_of(PROBLEM, CONFIG, target=TARGETS["sm_110"], tensor_core_ops={"UTCHMMA": 8}),
    "previous-target": kernel_of(PROBLEM, CONFIG, target=TARGETS["sm_80"], tensor_core_ops={"HMMA": 64}),
    "tile-too-small-for-16-bytes": kernel_of(PROBLEM, ConvConfig(64, 16, 32, 4, 3), async_copies={8: 4, 16: 36}),
    "boxes": kernel_of(PROBLEM, BOXES, **BOXED),
    "bottleneck": kernel_of(BOTTLENECK, BottleneckConfig(128, 64, 64, 4, 2)),
    "stem": kernel_of(STEM, StemConfig(64, 64, 32, 2, 4, 2), async_copies={}),
    "windows": kernel_of(STEM, StemWindowsConfig(32, 64, 128, 2, 4, 3), global_loads={2: 80}, async_copies={4: 36}),
    "head": kernel_of(
        HeadProblem(8, 2048, 7, 7, 1000), HeadConfig(16, 64, 32, 4),
        tensor_core_ops={"HMMA": 8}, global_loads={16: 4}, async_copies={},
    ),
}  # fmt: skip
FAULTY = {
    "stack": (replace(GOOD["conv"], stack_bytes=72), "spills: 72 bytes of stack"),
    "spill-store": (replace(GOOD["conv"], spill_stores=3), "3 stores"),
    "shared-memory": (replace(GOOD["conv"], shared_bytes=232449), "232449 bytes of shared memory, limit 232448"),
    "no-tensor-cores": (replace(GOOD["conv"], tensor_core_ops={}), "no HGMMA"),
    "previous-tensor-cores": (replace(GOOD["conv"], tensor_core_ops={"HMMA": 64}), "no HGMMA"),
    "previous-tensor-cores-of-boxes": (replace(GOOD["boxes"], tensor_core_ops={"HMMA": 64}), "no HGMMA"),
    "hopper-instructions-on-thor": (replace(GOOD["conv"], target=TARGETS["sm_110"]), "no UTCHMMA"),
    "hopper-instructions-elsewhere": (replace(GOOD["conv"], target=TARGETS["sm_80"]), "no HMMA"),
    "head-without-tensor-cores": (replace(GOOD["head"], tensor_core_ops={}), "no HMMA"),
    "some-narrow-copies": (replace(GOOD["conv"], async_copies={8: 4, 16: 36}), "expected copies of 16 bytes"),
    "no-copies": (replace(GOOD["conv"], async_copies={}), "expected copies of 16 bytes"),
    "narrow-copies-of-a-bottleneck": (replace(GOOD["bottleneck"], async_copies={8: 36}), "expected copies of 16"),
    "narrow-loads-of-a-single-slice": (replace(GOOD["single-slice"], global_loads={8: 12}), "loads {8: 12}"),
    "no-copies-of-windows": (replace(GOOD["windows"], async_copies={}), "expected copies of 4 bytes"),
    "windows-on-previous-tensor-cores": (replace(GOOD["windows"], tensor_core_ops={"HMMA": 80}), "no HGMMA"),
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
