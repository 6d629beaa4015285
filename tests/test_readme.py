"""README's Python, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from export.sample_inputs import crops, photographs

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=pytest.mark.gpu if "CudaGraphProgram" in block else ()) for block in BLOCKS],
)
def test_the_block_runs(
    block: str, calibrated: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = crops(photographs(), 16, 3, (32, 32))
    exec(
        compile(block, "README.md", "exec"), {"model": calibrated["resnet20"], "example": images[:1], "images": images}
    )
    assert "export_bundle" not in block or (tmp_path / "build" / "mine" / "manifest.json").is_file()


def test_readme_imports_from_the_face_of_export_alone() -> None:
    lines = re.findall(r"^(?:from|import) .*", "".join(BLOCKS), re.MULTILINE)
    assert len(BLOCKS) >= 2 and all(re.match(r"from export import |import torch", line) for line in lines), lines
