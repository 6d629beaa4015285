"""compile_kernels.py and tune.py as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.loading import load_script, run, run_here

SMALL = ("--model", "resnet8", "--targets", "sm_87", "sm_120", "--batch", "1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What --json prints, in a process of its own: here the kernels may have been imported for the interpreter."""
    folder = tmp_path_factory.mktemp("anywhere")
    process = run("compile_kernels", *SMALL, "--json", cwd=folder, TRITON_INTERPRET="0")
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def test_json_has_every_kernel_and_the_launches(compiled: dict[str, Any]) -> None:
    assert compiled["passed"] is True
    assert {kernel["target"] for kernel in compiled["kernels"]} == {"sm_87", "sm_120"}
    assert all(kernel["stack_bytes"] == 0 and not kernel["faults"] for kernel in compiled["kernels"])
    # 7 convolutions, two of them with a merged projection, and the head: one launch each.
    assert [entry["launches"] for entry in compiled["launches"]] == [8, 8]


@pytest.mark.parametrize("faults", [[], ["spills"]], ids=["sound", "at-fault"])
def test_a_table_per_target_the_launches_and_a_verdict(
    faults: list[str], compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside another build, which here is twice as long in its loops."""
    lean = [{**entry, "loop_instructions": 3, "loop_flops": 2000} for entry in compiled["launches"]]
    launches = [{**entry, "loop_instructions": 6} for entry in lean]
    before = tmp_path / "before.json"
    before.write_text(json.dumps({**compiled, "launches": launches}))
    first, *others = compiled["kernels"]
    kernels = [{**first, "faults": faults}, *others]
    monkeypatch.setattr(load_script("compile_kernels"), "problems_of", lambda *_: [])
    monkeypatch.setattr(load_script("compile_kernels"), "compile_for", lambda *_: (kernels, lean))
    process = run_here("compile_kernels", *SMALL, "--compare", str(before))
    out = process.stdout
    assert process.returncode == len(faults)
    for word in ("sm_87", "sm_120", "registers", "head fp16 n1 64x8x8 -> 10", "resnet8 batch 1", *faults):
        assert word in out
    rows = [line.split()[-3:] for line in out.splitlines() if "resnet8 batch 1 " in line and "sm_" in line]
    assert rows == [["3.000", "1.500", "0.50"]] * 2
    assert out.splitlines()[-1] == f"{len(kernels)} kernels for 2 targets: {len(faults) or 'none'} at fault"
