"""What is said of the packages that figures depend on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from export.base.machine import installed_version, installed_versions
from export.lowering.runners import EagerRunner, ProgramRunner


def test_one_version_is_told_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of torch with its build, which the metadata on PyPI leave out."""
    assert installed_version("torch") == installed_versions()["torch"] == torch.__version__
    names, program = ("output",), torch.nn.Identity()
    runtimes = {EagerRunner(program, torch.float32, names).runtime, ProgramRunner(program, None, names).runtime}  # type: ignore[arg-type]  # it is not run
    assert runtimes == {f"torch {torch.__version__}"}
    (tmp_path / "torch-2.14.1.dist-info").mkdir()
    (tmp_path / "torch-2.14.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.14.1\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert installed_version("torch") == "2.14.1"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("debug = False\n__version__ = '2.14.1+cu130'\ncuda = '13.0'\n")
    assert installed_version("torch") == "2.14.1+cu130"
