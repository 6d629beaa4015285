"""Converting a checkpoint: what is written loads again, what does not fit is refused in one line."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import safetensors
import torch
from torch import Tensor

from resnet.model_card import read_model_card
from resnet.models import create_model
from resnet.weights import load_weights

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"
SHIPPED = SCRIPT.parents[1] / "resnet" / "checkpoints" / "resnet20-digits.safetensors"  # has a model card


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path, level = list(sys.path), logging.getLogger("resnet").level
    sys.path.insert(0, "scripts")  # the script replaces its own folder there
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    yield module
    logging.getLogger("resnet").setLevel(level)  # the script says more than the tests of other rooms expect


@pytest.fixture
def state() -> dict[str, Tensor]:
    return create_model("resnet20", num_classes=7, in_channels=1).state_dict()


@pytest.fixture
def checkpoint(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """What a training script writes: wrapped, with other things beside the weights, in half precision."""
    half = {f"module.{name}": t.half() if t.is_floating_point() else t for name, t in state.items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": half, "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    return path


COUNTS = ("--num-classes", "7", "--in-channels", "1")


def test_converts_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    command = [sys.executable, str(SCRIPT), checkpoint.name, output.name, "--model", "resnet20", *COUNTS]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    written, _, following = process.stdout.rstrip("\n").partition("; next: ")
    assert written == "out.safetensors written"
    assert following == "python scripts/export.py --model resnet20 --weights out.safetensors " + " ".join(
        (*COUNTS, "--fp16")
    )
    assert "wrappers removed: state_dict, module.*, entries ignored: args, epoch" in process.stderr
    with safetensors.safe_open(output, framework="pt") as file:
        assert file.metadata() == {
            "converted_from": checkpoint.name,
            "converted_from_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        }


def test_converted_weights_load_again(
    script: ModuleType, checkpoint: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"an older file is replaced")
    assert script.main([str(checkpoint), str(output), "--model", "resnet20", *COUNTS]) == 0
    model = create_model("resnet20", num_classes=7, in_channels=1)
    info = load_weights(model, output)
    assert info.wrappers == info.ignored == () and info.dtypes == ("float32",)
    for name, tensor in model.state_dict().items():
        expected = state[name].half() if tensor.is_floating_point() else state[name]
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.name, output.name}


def test_converts_in_place(script: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert script.main([str(checkpoint), str(output), "--model", "resnet20", *COUNTS]) == 0
    before = safetensors.torch.load_file(output)
    assert script.main([str(output), str(output), "--model", "resnet20", *COUNTS]) == 0
    after = safetensors.torch.load_file(output)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_card_is_carried_over_and_another_model_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.safetensors"
    assert script.main([str(SHIPPED), str(copy), "--model", "resnet20"]) == 0
    assert read_model_card(copy) == read_model_card(SHIPPED) is not None
    assert script.main([str(SHIPPED), str(copy), "--model", "resnet56"]) == 2
    assert "--model resnet56" in capsys.readouterr().err


def test_counts_that_the_model_card_confirms_are_accepted(script: ModuleType, tmp_path: Path) -> None:
    counts = ("--num-classes", "10", "--in-channels", "1")
    assert script.main([str(SHIPPED), str(tmp_path / "copy.safetensors"), "--model", "resnet20", *counts]) == 0


def test_next_command_survives_the_shell(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(create_model("plain20").state_dict(), tmp_path / "weights.pt")
    output = tmp_path / "two words.safetensors"
    assert script.main([str(tmp_path / "weights.pt"), str(output), "--model", "plain20"]) == 0
    following = capsys.readouterr().out.rstrip("\n").partition("; next: ")[2]
    assert shlex.split(following) == [
        *("python", "scripts/export.py", "--model", "plain20", "--weights", str(output), "--fp16")
    ]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no model": (lambda f: [str(f / "checkpoint.pth.tar"), str(f / "out.safetensors")], "required: --model"),
    "no output": (lambda f: [str(f / "checkpoint.pth.tar"), "--model", "resnet20"], "required: OUTPUT.safetensors"),
    "unknown flag": (lambda f: ["a", "b", "--model", "resnet20", "--classes", "7"], "unknown argument '--classes'"),
    "unknown model": (lambda f: ["a", "b", "--model", "resnet21"], "unknown model 'resnet21'; nearest: "),
    "no classes": (lambda f: ["a", "b", "--model", "resnet20", "--num-classes", "0"], "got 0"),
    "no channels": (lambda f: ["a", "b", "--model", "resnet20", "--in-channels", "0"], "got 0"),
    "no checkpoint": (
        lambda f: [str(f / "nowhere.pt"), str(f / "out.safetensors"), "--model", "resnet20"],
        "nowhere.pt: No such file",
    ),
    "wrong counts": (
        lambda f: [str(f / "checkpoint.pth.tar"), str(f / "out.safetensors"), "--model", "resnet20"],
        "try --in-channels 1; weights for 7 classes",
    ),
    "another model": (
        lambda f: [str(f / "checkpoint.pth.tar"), str(f / "out.safetensors"), "--model", "resnet32", *COUNTS],
        "tensors do not fit the model",
    ),
    "other classes than the card's": (
        lambda f: [str(SHIPPED), str(f / "out.safetensors"), "--model", "resnet20", "--num-classes", "7"],
        f"--num-classes 7: {SHIPPED} holds weights for 10",
    ),
    "other channels than the card's": (
        lambda f: [str(SHIPPED), str(f / "out.safetensors"), "--model", "resnet20", "--in-channels", "3"],
        f"--in-channels 3: {SHIPPED} holds weights for 1",
    ),
    "output is a folder": (
        lambda f: [str(f / "checkpoint.pth.tar"), str(f / "folder.safetensors"), "--model", "resnet20", *COUNTS],
        "folder.safetensors: exists and is not a regular file",
    ),
    "output of another kind": (
        lambda f: [str(f / "checkpoint.pth.tar"), str(f / "out.pt"), "--model", "resnet20", *COUNTS],
        "out.pt: cannot be written: suffix '.pt', expected .safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_exit_2(
    script: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, expected = REFUSED[case]
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    try:
        code = script.main(arguments(tmp_path))
    except SystemExit as stopped:  # by argparse
        code = stopped.code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert code == 2 and captured.out == "" and sorted(tmp_path.rglob("*")) == before
    assert len(lines) == 1 and lines[0].startswith("convert.py: error: ") and expected in lines[0]


def test_code_in_a_checkpoint_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(create_model("resnet20"), tmp_path / "module.pth")
    assert script.main([str(tmp_path / "module.pth"), str(tmp_path / "out.safetensors"), "--model", "resnet20"]) == 2
    assert "a pickle that needs code" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
