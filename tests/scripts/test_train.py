"""train.py as a person uses it: one training, kill -9 and resume, experiments, bad data."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run side by side; the bits depend on the number of threads
PNG = b"\x89PNG\r\n\x1a\n"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *map(str, arguments)]


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, env=ONE_THREAD, capture_output=True, text=True, timeout=300)


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


def test_a_training_ends_with_a_model_a_log_a_picture_and_the_next_command(tmp_path: Path, pictures: Path) -> None:
    done = run(tmp_path, "--model", "resnet8", "--data", pictures, "--epochs", "4", "--warmup-epochs", "1",
               "--batch-size", "4", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    folder = tmp_path / "build/train/resnet8-pictures"
    assert record["weights"] == "build/train/resnet8-pictures/model.safetensors" and record["test_accuracy"] == 1.0
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    assert len((folder / "log.csv").read_text().splitlines()) == 5
    assert "4/4" in done.stderr
    again = run(tmp_path, "--model", "resnet8", "--data", pictures)
    assert again.returncode == 2 and "go on with it by --resume" in again.stderr and again.stderr.count("\n") == 1


def test_killed_in_the_middle_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    arguments = ("--model", "resnet8", "--epochs", "4", "--warmup-epochs", "1", "--image-size", "8", "--dropout", "0.2")
    whole = run(tmp_path, *arguments, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        command(*arguments, "--output", "cut"), cwd=tmp_path, env=ONE_THREAD, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut/resume.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.2)  # some steps into the next epoch
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut/model.safetensors").exists()
    resumed = run(tmp_path, *arguments, "--output", "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "1/4" not in resumed.stderr and "4/4" in resumed.stderr
    digests = [
        hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("whole", "cut")
    ]
    assert digests[0] == digests[1]


def test_an_experiment_writes_a_table_a_picture_and_its_numbers(tmp_path: Path, pictures: Path) -> None:
    arguments = ("depths", "--data", pictures, "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8",
                 "--image-size", "8", "--output", "results")  # fmt: skip
    done = run(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Recommended: resnet" in done.stdout
    page = (tmp_path / "results/depths-pictures.md").read_text()
    assert "| resnet56 |" in page and "![" in page and f"`python scripts/train.py depths --data {pictures}" in page
    assert (tmp_path / "results/depths-pictures.png").read_bytes().startswith(PNG)
    record = json.loads((tmp_path / "results/depths-pictures.json").read_text())
    assert [outcome["trial"]["model"] for outcome in record["outcomes"]][-1] == "resnet56"
    again = run(tmp_path, *arguments, "--resume")
    assert again.returncode == 0 and "1/1" not in again.stderr, again.stderr  # nothing is trained twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet21"), "unknown model 'resnet21'; nearest: "),
        (("--data", "nowhere"), "nowhere: expected digits, a folder of class folders or an archive"),
        (("--data", "empty"), "empty: expected a folder of class folders, got one without folders"),
        (("--data", "one"), "one: expected pictures of at least two classes, got only 'cats'"),
        (("--data", "hollow"), "cats: expected pictures (.bmp"),
        (("--data", "broken"), "0.png: expected a picture"),
        (("--data", "file.txt"), "file.txt: expected an archive of CIFAR-10 or CIFAR-100"),
        (("--epochs", "0"), "epochs must be at least 1, got 0"),
        (("--augment", "mixup"), "augment must be some of crop, flip, cutout, got ('mixup',)"),
        (("--image-size", "4"), "--image-size: expected at least 8 pixels, got 4"),
        (("--resume",), "there is nothing to resume"),
        (("--device", "cuda"), "expected an NVIDIA GPU"),
        (("--lerning-rate", "1"), "did you mean --learning-rate"),
        (("compare", "--model", "resnet20"), "--model resnet20: compare trains models of its own"),
        (("--image-size", "0"), "--image-size: expected at least 8 pixels, got 0"),
        (("compair",), "unknown experiment 'compair', expected one of compare, depths, regularisers"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for path in ("empty", "one/cats", "hollow/cats", "hollow/dogs", "broken/cats", "broken/dogs"):
        (tmp_path / path).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one/cats/0.png")
    for name in ("cats", "dogs"):
        (tmp_path / "broken" / name / "0.png").write_bytes(b"no picture")
    (tmp_path / "file.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    try:
        code = train_script().main([*arguments])
    except SystemExit as exit_of_argparse:
        code = exit_of_argparse.code
    printed = capsys.readouterr()
    assert code == 2 and message in printed.err, printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "build/train/resnet20-digits/model.safetensors").exists()


@functools.cache
def train_script() -> ModuleType:
    """scripts/train.py in this process: starting one for each refusal would take longer than the refusals."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
    assert spec is not None and spec.loader is not None
    module, path = importlib.util.module_from_spec(spec), sys.path.copy()
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    sys.path[:] = path  # the script puts the repository's root first
    return module
