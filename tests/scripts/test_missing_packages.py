"""Every script, in a process of its own, finds this project's modules and says in one line which package it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export import digits
from tests.scripts.loading import ROOT

ARGUMENTS = {
    "classify": ["bundle", "picture.png"],
    "compile_kernels": [],
    "convert": ["a.pt", "b.safetensors", "--model", "resnet8"],
    "train": [],
    "tune": [],
}
CASES = [
    *(("classify", package) for package in ("numpy", "rich", "PIL")),
    *((script, "torch") for script in ("compile_kernels", "convert", "train", "tune")),
]


@pytest.mark.parametrize(("script", "package"), CASES, ids=["-".join(case) for case in CASES])
def test_a_missing_package_is_one_line(script: str, package: str, tmp_path: Path) -> None:
    environment = {**os.environ, **digits.without_torch(tmp_path / "hidden", package)}
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *ARGUMENTS[script]]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600, env=environment)
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"{script}.py: error: {package} is not installed here: ")
