"""What is said of the packages that figures depend on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from export.base.batch import DEFAULT_BATCH
from export.base.machine import installed_version, installed_versions
from export.base.precision import PRECISIONS
from export.lowering.runners import EagerRunner, ProgramRunner


def test_one_version_is_told_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of torch with its build, which the metadata on PyPI leave out."""
    assert installed_version("torch") == installed_versions()["torch"] == torch.__version__
    names, program = ("output",), SimpleNamespace(inputs={"input": (3, 8, 8)}, batch=DEFAULT_BATCH)
    eager = EagerRunner(torch.nn.Identity(), torch.float32, names)
    fused = ProgramRunner(program, PRECISIONS["fp32"], names)  # type: ignore[arg-type]  # it is not run
    assert eager.runtime == fused.runtime == f"torch {torch.__version__}"
    (tmp_path / "torch-2.14.1.dist-info").mkdir()
    (tmp_path / "torch-2.14.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.14.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert installed_version("torch") == "2.14.1"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("debug = False\n__version__ = '2.14.1+cu130'\ncuda = '13.0'\n")
    assert installed_version("torch") == "2.14.1+cu130"
