"""The machine code of representative convolutions on every target, and the gate that judges it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.compile import CompiledKernel, compile_kernel
from kernels.config import TARGETS, ConvConfig, ConvProblem
from kernels.implicit_gemm import _conv2d_bias_act_kernel
from tests.kernels.conv_cases import COMPILED_CASES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker found, from two processes at once; nothing is taken from an earlier run's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = list(TARGETS)
    workers = []
    for part in (names[::2], names[1::2]):
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, "-m", "tests.kernels.compile_worker", *part]
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
    merged: dict[str, Any] = {"compiled": {}, "signatures_disagree": [], "tile_offsets": {}}
    for worker in workers:
        stdout, stderr = worker.communicate(timeout=300)
        assert worker.returncode == 0, stderr
        found = json.loads(stdout)
        merged["compiled"] |= found["compiled"]
        merged["signatures_disagree"] += found["signatures_disagree"]
        merged["tile_offsets"] |= found["tile_offsets"]
    return merged


@pytest.mark.parametrize("case", COMPILED_CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_to_good_code(target: str, case: str, report: dict[str, Any]) -> None:
    """No spills, shared memory within the limit, tensor cores in half precision, 16-byte loads where they divide."""
    kernel = report["compiled"][f"{target} {case}"]
    assert kernel["faults"] == []
    assert 0 < kernel["shared_bytes"] <= kernel["shared_bound"], "the estimate is meant to be an upper bound"
    assert 0 < kernel["registers"] <= 255 and kernel["cubin_bytes"] > 0


def test_every_target_and_case_was_compiled(report: dict[str, Any]) -> None:
    assert len(report["compiled"]) == len(TARGETS) * len(COMPILED_CASES)


def test_what_is_compiled_is_what_is_launched(report: dict[str, Any]) -> None:
    assert report["signatures_disagree"] == []


def test_tile_offsets_are_64_bit(report: dict[str, Any]) -> None:
    """x, residual and y; a weight's position is 32-bit within one filter, which has its own 64-bit offset."""
    for case, problem in COMPILED_CASES.items():
        expected = ["i64", "i32", *(["i64"] if problem.has_residual else []), "i64"]
        assert report["tile_offsets"][case] == expected, case


GOOD = CompiledKernel(
    problem=ConvProblem(8, 64, 56, 56, 64, (3, 3), padding=(1, 1)),
    config=ConvConfig(128, 64, 64, 4, 3),
    target=TARGETS["sm_90"],
    registers=160,
    stack_bytes=0,
    spill_loads=0,
    spill_stores=0,
    shared_bytes=98304,
    tensor_core_ops={"HGMMA": 8},
    global_loads={4: 8},
    async_copies={16: 36},
    cubin=b"",
)
FAULTY = {
    "stack": (replace(GOOD, stack_bytes=72), "spills: 72 bytes of stack"),
    "spill-store": (replace(GOOD, spill_stores=3), "3 stores"),
    "spill-load": (replace(GOOD, spill_loads=2), "2 loads"),
    "shared-memory": (replace(GOOD, shared_bytes=232449), "232449 bytes of shared memory, limit 232448"),
    "no-tensor-cores": (replace(GOOD, tensor_core_ops={}), "no HGMMA"),
    "previous-tensor-cores": (replace(GOOD, tensor_core_ops={"HMMA": 64}), "no HGMMA"),
    "hopper-instructions-elsewhere": (replace(GOOD, target=TARGETS["sm_80"]), "no HMMA"),
    "some-narrow-copies": (replace(GOOD, async_copies={8: 4, 16: 36}), "expected copies of 16 bytes"),
    "narrow-copies": (replace(GOOD, async_copies={4: 36}), "expected copies of 16 bytes"),
    "no-copies": (replace(GOOD, async_copies={}), "expected copies of 16 bytes"),
    "narrow-loads-of-a-single-slice": (
        replace(GOOD, problem=replace(GOOD.problem, kernel=(1, 1)), global_loads={8: 12}, async_copies={}),
        "loads {8: 12}",
    ),
    "tf32-without-tensor-cores": (
        replace(
            GOOD,
            problem=replace(GOOD.problem, dtype=torch.float32),
            config=replace(GOOD.config, input_precision="tf32"),
            tensor_core_ops={},
        ),
        "no HGMMA",
    ),
}


def test_good_code_has_no_faults() -> None:
    assert GOOD.faults == []
    assert replace(GOOD, problem=replace(GOOD.problem, dtype=torch.float32), tensor_core_ops={}).faults == []
    assert replace(GOOD, problem=replace(GOOD.problem, c_in=3), async_copies={}).faults == []
    single_slice = replace(GOOD.problem, kernel=(1, 1), padding=(0, 0))
    assert replace(GOOD, problem=single_slice, global_loads={4: 8, 16: 12}, async_copies={}).faults == []


@pytest.mark.parametrize("name", FAULTY)
def test_each_fault_is_found(name: str) -> None:
    kernel, message = FAULTY[name]
    assert len(kernel.faults) == 1 and message in kernel.faults[0]


@pytest.mark.skipif(hasattr(_conv2d_bias_act_kernel, "params"), reason="Triton's interpreter is off")
def test_the_interpreter_cannot_compile() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_kernel(GOOD.problem, GOOD.config, GOOD.target)
