"""train.py as a person uses it: one training, kill -9 and resume, experiments, bad data."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.benchmark import Timer

from resnet.training import experiments, loop
from tests import children
from tests.scripts.loading import refusal, run, run_here, start

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tests run side by side; the bits depend on the number of threads
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes, 12 pictures each, that differ in brightness."""
    generator = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 180)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(level, level + 40, (10, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_a_training_ends_with_a_model_a_log_a_picture_and_the_next_command(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--epochs", 4, "--warmup-epochs", 1, "--batch-size", 4)
    done = run("train", "--model", "resnet8", "--data", pictures, *small, "--json", cwd=tmp_path, **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    folder = tmp_path / "build/train/resnet8-pictures"
    assert record["weights"] == "build/train/resnet8-pictures/model.safetensors" and record["test_accuracy"] == 1.0
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    assert len((folder / "log.csv").read_text().splitlines()) == 5
    assert "4/4" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert "go on with it by --resume" in refusal(run_here("train", "--model", "resnet8", "--data", pictures))


def test_killed_in_the_middle_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    arguments = ("--model", "resnet8", "--epochs", "4", "--warmup-epochs", "1", "--image-size", "8", "--dropout", "0.2")
    whole = run("train", *arguments, "--output", "whole", cwd=tmp_path, **ONE_THREAD)
    assert whole.returncode == 0, whole.stderr
    process = start("train", *arguments, "--output", "cut", cwd=tmp_path, **ONE_THREAD)
    while process.poll() is None and not (tmp_path / "cut/resume.safetensors").exists():
        time.sleep(0.005)
    time.sleep(0.2)  # some steps into the next epoch
    process.kill()
    assert children.finish(process).returncode == -signal.SIGKILL
    assert (tmp_path / "cut/resume.safetensors").exists() and not (tmp_path / "cut/model.safetensors").exists()
    resumed = run("train", *arguments, "--output", "cut", "--resume", cwd=tmp_path, **ONE_THREAD)
    assert resumed.returncode == 0, resumed.stderr
    assert "1/4" not in resumed.stderr and "4/4" in resumed.stderr
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()


def test_an_experiment_writes_a_table_a_picture_and_its_numbers(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "DEPTHS", (8, 14))  # of six, which take longer and show no more here
    monkeypatch.setattr(loop, "_FILE_WORKERS", 0)  # which would be copies of this process
    monkeypatch.setattr(Timer, "blocked_autorange", lambda timer, **_: timer.timeit(1))  # no second for each
    arguments = ("depths", "--data", pictures, "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8",
                 "--image-size", "8", "--output", "results")  # fmt: skip
    assert "Recommended: resnet" in run_here("train", *arguments).stdout
    page = (tmp_path / "results/depths-pictures.md").read_text()
    assert "| resnet14 |" in page and "![" in page and f"`python scripts/train.py depths --data {pictures}" in page
    assert (tmp_path / "results/depths-pictures.png").read_bytes().startswith(PNG)
    record = json.loads((tmp_path / "results/depths-pictures.json").read_text())
    assert [outcome["trial"]["model"] for outcome in record["outcomes"]] == ["resnet8", "resnet14"]
    again = run_here("train", *arguments, "--resume")
    assert again.returncode == 0 and "1/1" not in again.stderr  # nothing is trained twice
