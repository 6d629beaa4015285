"""Every script, in a process of its own, finds this project's modules and says in one line which package it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export import digits
from tests.scripts.loading import refusal, run

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
    process = run(script, *ARGUMENTS[script], cwd=tmp_path, **digits.without_torch(tmp_path / "hidden", package))
    assert refusal(process).startswith(f"{package} is not installed here: ")
