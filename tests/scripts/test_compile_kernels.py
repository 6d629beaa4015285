"""compile_kernels.py and tune.py as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str, cwd: Path, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


SMALL = ("--model", "resnet20", "--targets", "sm_87", "sm_120", "--batch", "1")


def test_a_table_per_target_the_launches_and_a_verdict(tmp_path: Path) -> None:
    process = run("compile_kernels.py", *SMALL, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for word in ("sm_87", "sm_120", "registers", "head fp16 n1 64x8x8 -> 10", "resnet20 batch 1"):
        assert word in process.stdout
    assert process.stdout.splitlines()[-1].endswith("kernels for 2 targets: none at fault")


def test_json_has_every_kernel_and_the_launches(tmp_path: Path) -> None:
    process = run("compile_kernels.py", *SMALL, "--json", cwd=tmp_path)
    record = json.loads(process.stdout)
    assert record["passed"] is True and process.returncode == 0
    assert {kernel["target"] for kernel in record["kernels"]} == {"sm_87", "sm_120"}
    assert all(kernel["stack_bytes"] == 0 and not kernel["faults"] for kernel in record["kernels"])
    # 19 convolutions, two of them with a merged projection, and the head: one launch each.
    assert [entry["launches"] for entry in record["launches"]] == [20, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "sm_75"), "sm_75"),
        (("--model", "resnet19"), "resnet19"),
        (("--batch", "0"), "batch"),
        (("--precision", "int8"), "int8"),
    ],
    ids=["target", "model", "batch", "precision"],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    process = run("compile_kernels.py", *arguments, cwd=tmp_path)
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and message in lines[-1] and "Traceback" not in process.stderr


def test_the_interpreter_is_refused_in_one_line(tmp_path: Path) -> None:
    process = run("compile_kernels.py", *SMALL, cwd=tmp_path, interpret="1")
    assert process.returncode == 2 and "TRITON_INTERPRET" in process.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    process = run("tune.py", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr == "tune.py: error: no NVIDIA GPU here: expected to run on the GPU to tune for\n"
