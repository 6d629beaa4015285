"""Arguments that make no sense, for every script: one line that says what is wrong, exit code 2, and nothing written.

Unknown flags and models are in tests/faults, and so are thousands of command lines by chance.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from resnet.models import create_model
from tests.export import digits
from tests.scripts.loading import ROOT, refusal, run, run_here

SHIPPED = ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors"  # has a model card
INTERPRETED = "compile_kernels --model resnet8 --targets sm_87 --batch 1"
REFUSED = {
    "export --fp16 --bf16": "not allowed with",
    "export --batch 8:4:1": "1 <= MIN <= OPT <= MAX",
    "export --batch 1:2": "expected MIN:OPT:MAX or one number, got '1:2'",
    "export --image-size big": "expected H or HxW in pixels, got 'big'",
    "export --image-size 2000000x2000000": "expected at most 32768 pixels",
    "export --num-classes 0": "got 0",
    "export --input uint8 --in-channels 4": "--input uint8: expected a model for pictures of 1 or 3 channels, got 4",
    "export --input int8": "argument --input: invalid choice: 'int8'",
    "export --weights ''": "expected a",
    "export --weights corrupt.pt": "corrupt.pt",
    "export --images corrupt.pt": "expected a picture",
    "export --images nowhere.png": "nowhere.png: expected a picture (no such file)",
    "export --images fp32": "fp32: expected pictures (.bmp, ",
    "classify fp32 changed": "changed: expected pictures (.bmp, ",
    "export --model resnet20 --weights pretrained": "no published weights with a known sha256 for 'resnet20'",
    f"export --model resnet56 --weights {SHIPPED}": "holds weights for resnet20",
    "export --data digits": "give --weights",
    "export --int8": "int8 needs pictures to calibrate on, got none; give --calibration DIR",
    "export --int8 --calibration nowhere": "nowhere: expected a folder of pictures to calibrate on",
    "export --int8 --calibration digits --keep-fp16 auto": "needs labelled pictures to decide by, got none",
    "export --int8 --kernels sm_87": "--kernels is for fp32, fp16 and bf16, got --int8",
    "export --output seven.pt": "seven.pt exists and is not a folder",
    "export --output seven.pt/x": "seven.pt: not a folder",
    "export --output folder": "folder exists and is not a bundle",
    "export --engine tensorrt-rtx --optimization-level 1": "--engine tensorrt-rtx: does not take --optimization-level",
    "export --targets sm_86 sm_90": "not for Orin (sm_87), H100 and H200 (sm_90)",
    "export --optimization-level 9": "--optimization-level: expected 0 to 5, got 9",
    "export --timing-cache nowhere/cache": "expected a file in a folder that exists",
    "export --engine tensorrt-rtx --dla 0": "--engine tensorrt-rtx: does not take",
    "export --engine none --workspace 64": "an engine to build, got --engine none",
    "verify fp32 --workspace 64": "--workspace: expected --build",
    "verify fp32 --optimization-level 1": "--optimization-level: expected --build",
    "verify fp32 --build --workspace=--": "argument --workspace: expected a value, got '--'",
    "verify fp32 --public-key key.pem": "fp32.sig: expected the signature of ",
    "evaluate fp32": "the following arguments are required: DATA",
    "evaluate nowhere digits": "nowhere: expected a bundle",
    "evaluate fp32 nowhere": "nowhere: expected digits, a folder of class folders",
    "evaluate fp32 changed digits": "changed/model.onnx: changed since it was written",
    "serve_config fp32": "expected --triton DIR, --deepstream DIR or both",
    "serve_config changed --triton out": "changed/model.onnx: changed since it was written",
    "serve_config fp32 --triton corrupt.pt": "corrupt.pt/fp32 cannot be written: ",
    "convert seven.pt out.safetensors": "required: --model",
    "convert seven.pt --model resnet20": "required: OUTPUT.safetensors",
    "convert a b --model resnet20 --num-classes 0": "got 0",
    "convert a b --model resnet20 --in-channels 0": "got 0",
    "convert nowhere.pt out.safetensors --model resnet20": "nowhere.pt: No such file",
    "convert seven.pt out.safetensors --model resnet20": "try --in-channels 1; weights for 7 classes",
    f"convert {SHIPPED} out.safetensors --model resnet56": f"{SHIPPED} holds weights for resnet20",
    f"convert {SHIPPED} out.safetensors --model resnet20 --num-classes 7": "holds weights for 10",
    f"convert {SHIPPED} out.safetensors --model resnet20 --in-channels 3": "holds weights for 1",
    "convert seven.pt out.pt --model resnet20 --num-classes 7 --in-channels 1": "suffix '.pt', expected",
    "compile_kernels --targets sm_75": "sm_75",
    "compile_kernels --batch 0": "batch",
    "compile_kernels --precision int8": "int8",
    INTERPRETED: "TRITON_INTERPRET",
    "tune": "no NVIDIA GPU here: expected to run on the GPU to tune for",
    "benchmark --batch 0": "expected whole numbers of at least 1, got 0",
    "benchmark --floors --export-step": "not allowed with",
    "benchmark --tool . nowhere": "--tool: expected a checkout with scripts/export.py in it, got ",
    "benchmark --precision int8": "--precision int8: for --tool; elsewhere the file in 8 bits is compared beside",
    "benchmark --floors --batch 8": "--floors does not take --batch",
    "benchmark --export-step --precision fp16": "--export-step does not take --precision",
    "benchmark --floors --output no/where.json": "expected a file in a folder that exists",
    "benchmark --providers resnet8": "--providers: expected some of eager, torch.compile, ",
    "benchmark --floors --providers eager": "--floors does not take --providers",
    "benchmark --device cuda": "no NVIDIA GPU here; expected --device cpu",
    "train --data nowhere": "nowhere: expected digits, a folder of class folders or an archive",
    "train --epochs 0": "epochs must be at least 1, got 0",
    "train --image-size 4": "--image-size: expected at least 8 pixels, got 4",
    "train --resume": "there is nothing to resume",
    "train --device cuda": "expected an NVIDIA GPU",
    "train compare --model resnet20": "--model resnet20: compare trains models of its own",
    "train compair": "unknown experiment 'compair', expected one of compare, depths, regularisers",
}


@pytest.fixture(scope="module")
def folder(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are run: with bundles, weights for 7 classes and a file that holds none."""
    folder = tmp_path_factory.mktemp("folder")
    for name in ("fp32", "changed"):
        (folder / name).symlink_to(bundles / name)
    torch.save(create_model("resnet20", num_classes=7, in_channels=1).state_dict(), folder / "seven.pt")
    (folder / "folder").mkdir()
    (folder / "folder" / "mine.txt").touch()
    (folder / "corrupt.pt").write_bytes(b"PK\x03\x04 this is not a checkpoint")
    return folder


AT_ONCE = (
    *("--int8", "--int8 --kernels sm_87", "--output seven.pt", "--images nowhere.png", "--data digits"),
    *("--batch 1:2", "--engine tensorrt-rtx --optimization-level 1", "--engine none --workspace 64"),
)


@pytest.mark.parametrize("arguments", AT_ONCE)
def test_what_needs_no_pytorch_is_refused_before_it_is_imported(arguments: str, folder: Path, tmp_path: Path) -> None:
    hidden = digits.without_torch(tmp_path / "hidden")
    assert REFUSED[f"export {arguments}"] in refusal(run("export", *arguments.split(), cwd=folder, **hidden))


@pytest.mark.parametrize("command", REFUSED)
def test_arguments_that_make_no_sense_are_refused(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command == INTERPRETED and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert REFUSED[command] in refusal(run_here(*shlex.split(command)))
    assert sorted(folder.rglob("*")) == before
