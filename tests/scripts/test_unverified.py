"""A bundle that was written without a verdict says so wherever it is used."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from resnet.models import create_model
from tests.export import digits
from tests.scripts.loading import run_here


def test_export_and_verify_end_with_1_and_say_why(tmp_path: Path) -> None:
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    save_file(create_model("resnet8", num_classes=7).state_dict(), weights)
    command = ("export", "--model", "resnet8", "--weights", weights, "--num-classes", 7, "--engine", "none")
    process = run_here(*command, "--output", out)
    assert process.returncode == 1 and "--unverified writes a bundle" in process.stdout and not out.exists()
    process = run_here(*command, "--output", out, "--unverified")
    lines = process.stdout.splitlines()
    assert process.returncode == 1 and lines[-1] == f"{out} written, UNVERIFIED: not for deployment"
    assert lines[-2].startswith("no verdict, the evidence is too weak: bn1 has the default BatchNorm statistics; load")
    manifest, page = json.loads((out / "manifest.json").read_text()), (out / "report.html").read_text()
    assert manifest["verified"] is False and manifest["verdict"].startswith("no verdict") and "UNVERIFIED" in page
    assert json.loads((out / "parity.json").read_text())["passed"] is False
    process = run_here("verify", out)
    assert process.returncode == 1 and f"{out}: UNVERIFIED; " in process.stdout and "ready" not in process.stdout
    record = json.loads(run_here("verify", out, "--json").stdout)
    assert record["passed"] is False and record["rungs"][2]["verdict"] == manifest["verdict"]


def test_classify_and_evaluate_say_it(bundles: Path, tmp_path: Path) -> None:
    def unverify(manifest: dict, files: dict) -> None:
        manifest.update(verified=False, verdict="no verdict: give other pictures with export_bundle(images=...)")

    bundle, picture = digits.rewrite(bundles / "fp32", tmp_path / "bundle", unverify), tmp_path / "0.png"
    digits.held_out().pictures.picture(0).save(picture)
    said = f"{bundle} is UNVERIFIED; it was exported with no verdict: give other pictures with --images"
    for process in (run_here("classify", bundle, picture), run_here("evaluate", bundle, "digits")):
        assert process.returncode == 0 and said in process.stderr.splitlines()


def test_values_are_not_classified(bundles: Path, tmp_path: Path) -> None:
    def told(manifest: dict, files: dict) -> None:
        manifest["outputs"][0].update(kind="values", why="as told")

    bundle = digits.rewrite(bundles / "fp32", tmp_path / "bundle", told)
    process = run_here("evaluate", bundle, "digits")
    assert process.returncode == 2 and "expected class scores, output holds values" in process.stderr
