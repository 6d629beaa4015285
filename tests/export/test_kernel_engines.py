"""Kernel engines in an export: in the bundle with what was emulated of them, or left out with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import Batch, ExportConfig, export_bundle, verify_bundle
from export.engines import choose_targets
from export.runtime.engines.kernel_file import read_kernel_file
from tests.export import zoo
from tests.export.networks import Fused

pytestmark = pytest.mark.usefixtures("captured_once")

BATCH = Batch(1, 2, 2)


@pytest.fixture(autouse=True)
def no_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "compiled"))


def test_a_bundle_has_the_engines_that_were_asked_for(resnet8: Fused, tmp_path: Path) -> None:
    config = ExportConfig("fp16", BATCH, "none", kernels=("sm_90",))
    result = export_bundle(resnet8.model, torch.zeros(1, 3, 32, 32), tmp_path / "b", config)
    assert result and not result.skipped, result.report.verdict
    manifest, parity = (json.loads((tmp_path / "b" / f"{name}.json").read_text()) for name in ("manifest", "parity"))
    rungs = {rung["name"]: rung for rung in parity["rungs"]}
    file, rung = "model.sm_90.kernels", rungs["kernels sm_90"]
    plan = read_kernel_file((tmp_path / "b" / file).read_bytes()).plan
    assert file in manifest["files"] and manifest["kernels"][file]["batches"] == [*plan.batches] == [1, 2]
    assert rung["file"] == file and rung["passed"] is True and rung["verdict"].startswith("emulated ")
    assert 0 < rung["emulated"]["blocks"] <= rung["emulated"]["of"]
    assert len(rung["operators"]["checked"]) >= 8 and "error" not in rung
    assert f"emulated {rung['emulated']['blocks']} of" in (tmp_path / "b" / "report.html").read_text()
    verified = verify_bundle(tmp_path / "b")
    assert {rung.name: bool(rung.not_run) for rung in verified if "kernels" in rung.name} == {"kernels sm_90": True}


@pytest.mark.gpu
def test_a_gpu_runs_its_engine(precision: str, resnet8: Fused, tmp_path: Path) -> None:
    """And is compared with the eager model like every other form, by the export and by who has the bundle alone."""
    config = ExportConfig(precision, BATCH, "none", kernels=("auto",))
    result = export_bundle(resnet8.model, torch.zeros(1, 3, 32, 32), tmp_path / "b", config)
    assert result and not result.skipped, (result.report.verdict, result.skipped)
    (rung,) = [rung for rung in result.report.rungs if rung.name.startswith("kernels")]
    assert (rung.verdict, rung.emulated, rung.runtime) == ("equal", None, "CUDA driver")
    assert [r.verdict for r in verify_bundle(tmp_path / "b") if r.name == rung.name] == ["equal"]


def test_without_a_kernel_the_other_forms_ship(tmp_path: Path) -> None:
    model = zoo.of_trunk(
        lambda x, m: m.head((x * x.flatten(2).softmax(2).view_as(x)).sum((2, 3))), head=torch.nn.Linear(16, 5)
    )
    images = zoo.pictures(16)
    model.train()(images)
    config = ExportConfig("fp16", BATCH, "none", kernels=("sm_87",), outputs="values", unverified=True)
    result = export_bundle(model.eval(), images, tmp_path / "b", config, images=images)
    assert result.written, result.report.verdict
    assert result.skipped == {"sm_87 kernel": "no kernel computes softmax (softmax), sum (sum_1)"}
    assert (
        not [*(tmp_path / "b").glob("*.kernels")]
        and json.loads((tmp_path / "b" / "manifest.json").read_text())["kernels"] == {}
    )


ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "auto without a GPU": ({"kernels": ("auto",)}, "there is no GPU here: name architectures"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_why_there_is_none(case: str) -> None:
    settings, reason = ELSEWHERE[case]
    skipped: dict[str, str] = {}
    assert choose_targets(ExportConfig("fp16", **settings), skipped) == []
    assert skipped["kernel"].startswith(reason)


def test_the_emulator_decides(resnet8: Fused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose weights were packed wrongly is no part of a bundle, nor is anything else."""
    from export.lowering import kernel_emulation

    def zeroed(self: Any, space: str, offset: int, size: int) -> Any:
        content, written = original(self, space, offset, size)
        return (np.zeros_like(content), written) if space == "weight" and content.size > 4096 else (content, written)

    original = kernel_emulation.EmulatedArena.content
    monkeypatch.setattr(kernel_emulation.EmulatedArena, "content", zeroed)
    config = ExportConfig("fp16", BATCH, "none", kernels=("sm_90",))
    result = export_bundle(resnet8.model, torch.zeros(1, 3, 32, 32), tmp_path / "b", config)
    assert not result and result.report.verdict.startswith("not equal to the eager model: kernels sm_90: layer")
    assert not (tmp_path / "b").exists()
