"""Converting a checkpoint: what is written loads again, what does not fit is refused in one line."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor

from resnet.model_card import read_model_card
from resnet.models import create_model
from resnet.weights import load_weights
from tests.scripts.loading import ROOT, run_here

SHIPPED = ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors"  # has a model card
COUNTS = ("--num-classes", "7", "--in-channels", "1")


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


@pytest.mark.parametrize("name", ["out.safetensors", "two words.safetensors"])
def test_converted_weights_load_again_and_the_next_command_survives_the_shell(
    name: str, checkpoint: Path, state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / name
    output.write_bytes(b"an older file is replaced")
    process = run_here("convert", checkpoint, output, "--model", "resnet20", *COUNTS)
    written, _, following = process.stdout.rstrip("\n").partition("; next: ")
    expected = ["python", "scripts/export.py", "--model", "resnet20", "--weights", str(output), *COUNTS, "--fp16"]
    assert process.returncode == 0 and written == f"{output} written" and shlex.split(following) == expected
    assert "wrappers removed: state_dict, module.*, entries ignored: args, epoch" in caplog.text
    with safetensors.safe_open(output, framework="pt") as file:
        assert file.metadata() == {
            "converted_from": checkpoint.name,
            "converted_from_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        }
    model = create_model("resnet20", num_classes=7, in_channels=1)
    info = load_weights(model, output)
    assert info.wrappers == info.ignored == () and info.dtypes == ("float32",)
    for key, tensor in model.state_dict().items():
        narrowed = state[key].half() if tensor.is_floating_point() else state[key]
        assert torch.equal(tensor, narrowed.to(tensor.dtype)), key
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.name, name}
    before = safetensors.torch.load_file(output)  # and in place of itself
    assert run_here("convert", output, output, "--model", "resnet20", *COUNTS).returncode == 0
    after = safetensors.torch.load_file(output)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("counts", [(), ("--num-classes", "10", "--in-channels", "1")], ids=["none", "confirmed"])
def test_a_model_card_is_carried_over(counts: tuple[str, ...], tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    assert run_here("convert", SHIPPED, copy, "--model", "resnet20", *counts).returncode == 0
    assert read_model_card(copy) == read_model_card(SHIPPED) is not None
