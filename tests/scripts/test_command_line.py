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
from resnet.models import create_model
from tests.export import summing
from tests.export.digits import without_torch
from tests.scripts.loading import ROOT, refusal, run, run_here

DIGITS = str(ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors")


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
    assert set(summary["files"]) == {"model.onnx", "parity.json", "golden.safetensors", "report.html"}
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
    common = ("export", "--model", "resnet20", "--weights", weights, *output)
    process = run_here(*common, "--num-classes", 7)
    assert process.returncode == 1
    assert "no verdict, the evidence is too weak" in process.stdout and not (tmp_path / "out").exists()
    process = run_here(*common)
    assert process.returncode == 2 and "--num-classes 7" in process.stderr


NONSENSE = {
    "two precisions": (["--fp16", "--bf16"], "not allowed with"),
    "backward batch": (["--batch", "8:4:1"], "1 <= MIN <= OPT <= MAX"),
    "batch of two numbers": (["--batch", "1:2"], "expected MIN:OPT:MAX or one number, got '1:2'"),
    "image size in words": (["--image-size", "big"], "expected H or HxW in pixels, got 'big'"),
    "no classes": (["--num-classes", "0"], "got 0"),
    "empty weights": (["--weights", ""], "expected a"),
    "more pixels than memory": (["--image-size", "2000000x2000000"], "expected at most 32768 pixels"),
    "corrupt weights": (["--weights", "corrupt.pt"], "corrupt.pt"),
    "text as a picture": (["--images", "corrupt.pt"], "expected a picture"),
    "pretrained": (["--weights", "pretrained"], "no published weights with a known sha256 for 'resnet20'"),
    "another model's weights": (["--weights", DIGITS, "--model", "resnet56"], "holds weights for resnet20"),
    "labelled data without weights": (["--data", "digits"], "give --weights"),
    "GPU without TensorRT-RTX": (["--targets", "sm_86", "sm_90"], "not for Orin (sm_87), H100 and H200 (sm_90)"),
    "level of optimisation": (["--optimization-level", "9"], "--optimization-level: expected 0 to 5, got 9"),
    "cache without a folder": (["--timing-cache", "nowhere/cache"], "expected a file in a folder that exists"),
    "option of the other engine": (["--engine", "tensorrt-rtx", "--dla", "0"], "--engine tensorrt-rtx: does not take"),
    "option of no engine": (["--engine", "none", "--workspace", "64"], "an engine to build, got --engine none"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_one_line_and_exit_2(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = NONSENSE[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrupt.pt").write_bytes(b"PK\x03\x04 this is not a checkpoint")
    model = [] if "--model" in arguments else ["--model", "resnet20"]
    assert expected in refusal(run_here("export", *model, *arguments))
    assert {path.name for path in tmp_path.iterdir()} == {"corrupt.pt"}


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
    assert refusal(process).startswith(f"{package} is not installed here: ")


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    older = summing.write(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    small = ("--model", "resnet8", "--image-size", 16, "--engine", "none", "--batch", 2)
    process = run_here("export", *small, "--output", older)
    (path,) = (tmp_path / "cache" / "resnet-deploy" / "faults").iterdir()
    assert process.returncode == 3 and process.stdout == ""
    assert process.stderr.splitlines()[-1] == (
        "export.py: fault: KeyError: 'of the pass': this is a fault of the program, not of its input; "
        f"its traceback is in {path}"
    )
    assert "in broken_pass" in path.read_text() and path.parent.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}
