"""The scripts as a user runs them: exit codes, one clear line for nonsense, and the old bundle untouched."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import save_file

from export.fusion import passes
from export.terminal.commands import SCRIPTS
from resnet.models import create_model
from tests.export import summing
from tests.export.digits import without_torch
from tests.scripts.loading import ROOT, refusal, run, run_here

DIGITS = str(ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("anywhere")
    return folder, run("export", "--model", "resnet20", "--fp16", "--batch", "1:4:8", cwd=folder)


def test_export_prints_a_table_and_what_to_do_next(exported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = exported
    assert process.returncode == 0, process.stderr
    assert (folder / "build" / "resnet20-fp16" / "model.onnx").is_file()
    for word in ("eager", "fused", "onnx", "tensorrt-rtx", "UNTRAINED", "equal to the eager model"):
        assert word in process.stdout
    assert process.stdout.splitlines()[-1].endswith("next: python scripts/verify.py build/resnet20-fp16")
    assert "capture and fuse" in process.stderr and "Warning" not in process.stderr


def test_verify_passes_and_then_names_the_changed_file(exported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = exported
    bundle = folder / "build" / "resnet20-fp16"
    process = run("verify", bundle, "--json", cwd=folder)
    assert process.returncode == 0 and json.loads(process.stdout)["passed"] is True
    path = bundle / "model.onnx"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
        process = run("verify", bundle, cwd=folder)
    finally:
        path.write_bytes(content)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(f"verify.py: error: {path}: changed since it was written")


def test_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    output = ("--engine", "none", "--json", "--output", tmp_path / "out")
    process = run_here("export", "--model", "resnet20", "--bf16", "--batch", 4, *output)
    summary = json.loads(process.stdout)
    assert process.returncode == 0 and summary["passed"] is True and summary["precision"] == "bf16"
    assert summary["trained"] is False and summary["fused"] == 20 and not summary["skipped"]
    assert set(summary["files"]) == {"model.onnx", "parity.json", "golden.safetensors", "report.html"}


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


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The model that ships, exported in every precision from its weights file alone: folder and summaries."""
    folder = tmp_path_factory.mktemp("digits")
    summaries = {}
    for precision in ("fp32", "fp16", "bf16"):
        output = ("--engine", "none", "--json", "--output", folder / precision)
        process = run_here("export", "--weights", DIGITS, f"--{precision}", *output)
        assert process.returncode == 0, process.stderr
        summaries[precision] = json.loads(process.stdout)
    return folder, summaries


def test_the_accuracy_of_the_model_that_ships_survives_every_precision(
    digits: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    for precision, summary in digits[1].items():
        before, *after = summary["accuracy"]
        assert summary["model"] == "resnet20" and summary["trained"] is True
        assert (before["form"], before["precision"]) == ("eager", "fp32")
        assert before["images"] == 359 and before["top1"] >= 0.985
        assert [form["form"] for form in after] == ["fused", "onnx"]
        for form in after:
            assert form["precision"] == precision and abs(form["top1"] - before["top1"]) <= 0.001, form


def test_evaluate_puts_the_precisions_side_by_side(digits: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, summaries = digits
    process = run_here("evaluate", *(folder / precision for precision in summaries), "digits", "--json")
    measured = json.loads(process.stdout)["measured"]
    assert [row["precision"] for row in measured] == ["fp32", "fp16", "bf16"]
    assert [row["correct"] for row in measured] == [s["accuracy"][-1]["correct"] for s in summaries.values()]


NONSENSE = {
    "unknown model": (["--model", "resnet51"], "resnet50"),
    "unknown flag": (["--fp61"], "did you mean --fp16"),
    "two precisions": (["--fp16", "--bf16"], "not allowed with"),
    "unknown precision": (["--precision", "fp8"], "invalid choice"),
    "backward batch": (["--batch", "8:4:1"], "1 <= MIN <= OPT <= MAX"),
    "batch of two numbers": (["--batch", "1:2"], "expected MIN:OPT:MAX or one number, got '1:2'"),
    "image size in words": (["--image-size", "big"], "expected H or HxW in pixels, got 'big'"),
    "no classes": (["--num-classes", "0"], "got 0"),
    "missing weights": (["--weights", "nowhere.pt"], "nowhere.pt"),
    "empty weights": (["--weights", ""], "expected a"),
    "more pixels than memory": (["--image-size", "2000000x2000000"], "expected at most 32768 pixels"),
    "corrupt weights": (["--weights", "corrupt.pt"], "corrupt.pt"),
    "text as a picture": (["--images", "corrupt.pt"], "expected a picture"),
    "int8": (["--int8"], "needs pictures to calibrate on, got none; give --calibration DIR"),
    "pretrained": (["--weights", "pretrained"], "no published weights with a known sha256 for 'resnet20'"),
    "another model's weights": (["--weights", DIGITS, "--model", "resnet56"], "holds weights for resnet20"),
    "another count of classes": (["--weights", DIGITS, "--num-classes", "7"], "holds weights for 10"),
    "labelled data without weights": (["--data", "digits"], "give --weights"),
    "no such data": (["--weights", DIGITS, "--data", "nowhere"], "nowhere: expected digits, a folder"),
    "missing engine package": (["--engine", "tensorrt"], "pip install -e '.[tensorrt]'"),
    "GPU without TensorRT-RTX": (["--targets", "sm_86", "sm_90"], "not for Orin (sm_87), H100 and H200 (sm_90)"),
    "level of optimisation": (["--optimization-level", "9"], "--optimization-level: expected 0 to 5, got 9"),
    "no workspace": (["--workspace", "0"], "--workspace: expected at least 1 MiB, got 0"),
    "cache without a folder": (["--timing-cache", "nowhere/cache"], "expected a file in a folder that exists"),
    "option of the other engine": (["--engine", "tensorrt-rtx", "--dla", "0"], "--engine tensorrt-rtx: does not take"),
    "option of no engine": (["--engine", "none", "--workspace", "64"], "an engine to build, got --engine none"),
    "unwritable folder": (["--output", "corrupt.pt/out"], "cannot be written"),
    "folder of something else": (["--output", "."], "is not a bundle"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_one_line_and_exit_2(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = NONSENSE[case]
    monkeypatch.chdir(tmp_path)
    if case == "missing engine package" and importlib.util.find_spec("tensorrt"):
        pytest.skip("the package is installed")
    (tmp_path / "corrupt.pt").write_bytes(b"PK\x03\x04 this is not a checkpoint")
    model = [] if "--model" in arguments else ["--model", "resnet20"]
    assert expected in refusal(run_here("export", *model, *arguments))
    assert {path.name for path in tmp_path.iterdir()} == {"corrupt.pt"}


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
    assert "Traceback" not in process.stderr
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    content = path.read_text()
    assert "in broken_pass" in content and content.endswith("KeyError: 'of the pass'\n")
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}
