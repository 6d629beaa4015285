"""The scripts as a user runs them: exit codes, one clear line for nonsense, and the old bundle untouched."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors.torch import save_file

from export.fusion import passes
from export.terminal.commands import SCRIPTS
from export.terminal.export_summary import some
from resnet.models import create_model
from tests.export import summing
from tests.export.digits import without_torch
from tests.scripts.loading import ROOT, refusal, run, run_here

pytestmark = pytest.mark.usefixtures("captured_once")

DIGITS = str(ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors")


def test_many_names_are_cut_short() -> None:
    assert some("ab") == "a, b" and some("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"


def test_what_is_exported_is_verified_until_it_is_changed(tmp_path: Path) -> None:
    process = run("export", "--model", "resnet20", "--fp16", "--batch", "1:4:8", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for word in ("eager", "fused", "onnx", "tensorrt-rtx", "UNTRAINED", "equal to the eager model"):
        assert word in process.stdout
    assert process.stdout.splitlines()[-1].endswith("next: python scripts/verify.py build/resnet20-fp16")
    assert "capture and fuse" in process.stderr and "Warning" not in process.stderr
    bundle = tmp_path / "build" / "resnet20-fp16"
    process = run("verify", bundle, "--json", cwd=tmp_path)
    assert process.returncode == 0 and json.loads(process.stdout)["passed"] is True
    content = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refusal(run_here("verify", bundle)).startswith(f"{bundle}/model.onnx: changed since it was written")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_accuracy_of_the_model_that_ships_survives_every_precision(precision: str, tmp_path: Path) -> None:
    """All is in its weights file; with --json one object is on stdout."""
    output = ("--engine", "none", "--json", "--output", tmp_path / "out")
    process = run_here("export", "--weights", DIGITS, f"--{precision}", *output)
    assert process.returncode == 0, process.stderr
    summary = json.loads(process.stdout)
    assert (summary["model"], summary["trained"], summary["precision"]) == ("resnet20", True, precision)
    assert summary["passed"] is True and summary["fused"] == 20 and not summary["skipped"]
    golden = {"golden.safetensors", "golden-picture.png", "golden-picture.npy"}
    assert set(summary["files"]) == {"model.onnx", "parity.json", "report.html", *golden}
    before, *after = summary["accuracy"]
    assert (before["form"], before["precision"]) == ("eager", "fp32")
    assert before["images"] == 359 and before["top1"] >= 0.985
    assert [form["form"] for form in after] == ["fused", "onnx"]
    for form in after:
        assert form["precision"] == precision and abs(form["top1"] - before["top1"]) <= 0.001, form


def test_weights_from_a_file(tmp_path: Path) -> None:
    """Weights nobody calibrated load, and the evidence they give is refused as too weak."""
    weights = tmp_path / "weights.safetensors"
    save_file(create_model("resnet20", num_classes=7).state_dict(), weights)
    output = ("--engine", "none", "--output", tmp_path / "out")
    process = run_here("export", "--model", "resnet20", "--weights", weights, "--num-classes", 7, *output)
    assert process.returncode == 1
    assert "no verdict, the evidence is too weak" in process.stdout and not (tmp_path / "out").exists()


MISSING = {
    "classify bundle picture.png": ("numpy", "rich", "PIL"),
    "compile_kernels": ("torch",),
    "convert a.pt b.safetensors --model resnet8": ("torch",),
    "train": ("torch",),
    "tune": ("torch",),
}


@pytest.mark.parametrize(("command", "package"), [(command, name) for command in MISSING for name in MISSING[command]])
def test_a_missing_package_is_one_line(command: str, package: str, tmp_path: Path) -> None:
    script, *arguments = command.split()
    process = run(script, *arguments, cwd=tmp_path, **without_torch(tmp_path / "hidden", package))
    extra = "pictures" if package == "PIL" else "export"
    assert refusal(process).startswith(f"{package} is not installed here: pip install -e '.[{extra}]'")


HELP_SECONDS = 0.5  # of processor time, the best of a few runs
HELP_RUNS = 4


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_help_is_quick_and_needs_python_alone(script: str, tmp_path: Path) -> None:
    absent = ("numpy", "onnx", "onnxruntime", "rich", "safetensors", "PIL", "scipy", "sklearn", "matplotlib", "jinja2")
    environment = without_torch(tmp_path, *absent)
    spent: list[float] = []
    while len(spent) < HELP_RUNS and min(spent, default=HELP_SECONDS) >= HELP_SECONDS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = run(script.removesuffix(".py"), "--help", cwd=tmp_path, **environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert process.returncode == 0 and process.stderr == "", process.stderr
        assert process.stdout.startswith(f"usage: {script} ") and "--traceback" in process.stdout
    assert min(spent) < HELP_SECONDS


def test_a_fault_of_a_pass_is_exit_3_and_its_traceback_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: that of a library's ValueError is not the user's fault either."""

    def broken_pass(graph_module: object) -> NoReturn:
        raise KeyError("of the pass")

    monkeypatch.setitem(passes.LEVELS, passes.DEFAULT_LEVEL, (broken_pass,))
    older = summing.write(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    small = ("--model", "resnet8", "--image-size", 16, "--engine", "none", "--batch", 2)
    process = run_here("export", *small, "--output", older)
    assert process.returncode == 3 and process.stdout == ""
    said, _, path = process.stderr.splitlines()[-1].rpartition("; its traceback is in ")
    assert said.startswith("export.py: fault: KeyError: 'of the pass': ") and "in broken_pass" in Path(path).read_text()
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
