"""All that writes what must never be half there: a bundle, an engine, weights, a training, calibrated ranges.

Each writes versions, which are numbers, in one place in a folder, and says which version is there: so one set of tests
kills them, fills the disk under them and lets several of them write at once.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from export.base import private_cache
from export.base.errors import ExportError
from export.base.precision import PRECISIONS
from export.quantisation import calibration_cache
from export.runtime.bundle.folder import publish, read_verified, staged
from export.runtime.engine_store import BuiltEngine, read_place, write_place
from export.runtime.engines.engine import FLAVOURS, Engine
from export.runtime.serving.folder import MARK, Served
from kernels.configs import selection
from kernels.configs.config import Config
from kernels.configs.convolution import ConvConfig
from resnet.data.files import write_atomically
from resnet.data.labelled import Splits
from resnet.data.preprocessing import Preprocessing
from resnet.data.sources import open_splits, suggest_preprocessing
from resnet.models import create_model
from resnet.training import loop
from resnet.training.recipe import TrainingConfig
from resnet.weights import load_weights, save_weights

VERSIONS = range(8)
WRITING = r"another process is writing to {folder}/\w+: wait for it or choose another folder"


@dataclass(frozen=True)
class Writer:
    """One that writes in a folder, which is private to this user.

    Attributes:
        write: puts a version in its place.
        read: the version that is there, None where there is none; raises where it is not whole.
        names: of what is in the folder once a version is in its place.
        litter: what a killed writer may leave there for good; whatever else it leaves, the next one removes.
        refusal: of a writer that the system refuses for a `reason`, a pattern; None where it says nothing, as a cache.
        busy: of one that meets another, a pattern; None where both may write and the last one stays.
        flushes: whether what it wrote is on the disk before it is in its place.
        ends_with: the calls of `os` and `Path` that put it in its place, each of which may fail.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], int | None]
    names: frozenset[str]
    litter: str = r"(?!)"
    refusal: str | None = None
    busy: str | None = None
    flushes: bool = True
    ends_with: Sequence[str] = ("fsync",)


def version_of(value: object, made: Callable[[int], object]) -> int:
    """Which version a value is."""
    return next(version for version in VERSIONS if made(version) == value)


@cache
def bundle_files(version: int) -> dict[str, bytes]:
    """Of a bundle; the oldest has a file that later ones do not have."""
    made = {"model.onnx": bytes([version]) * 300_000, "parity.json": b"{}", "golden.safetensors": bytes([version]) * 9}
    more = {"old.bin": bytes(range(256)) * 300}
    if version:
        more = {"model.rtx.engine": random.Random(version).randbytes(100_000), "model.rtx.layers.json": b"[]"}
    return {**made, **more, "model.cpu.onnx": b""}


def write_bundle(output: Path, files: dict[str, bytes]) -> None:
    with staged(output) as staging:
        publish(staging, output, files, {"format": 2})


def read_bundle(folder: Path) -> int | None:
    output = folder / "bundle"
    return version_of(read_verified(output)[1], bundle_files) if output.exists() else None


def engines(version: int) -> list[BuiltEngine]:
    """The engine in use and the one before it."""
    key = {"flavour": "tensorrt-rtx", "version": "1.2.3", "precision": "fp32", "options": {}}
    plans = [bytes([number]) * 200_000 for number in (version, version - 1) if number >= 0]
    return [
        BuiltEngine(Engine(FLAVOURS["tensorrt-rtx"], plan, "1.2.3", PRECISIONS["fp32"], 9, 1.0), key) for plan in plans
    ]


def write_engines(folder: Path, version: int) -> None:
    with staged(folder / "engines") as staging:
        write_place(staging, folder / "engines", engines(version))


def read_engines(folder: Path) -> int | None:
    plans = [built.engine.plan for built in read_place(folder / "engines")]
    return version_of(plans, lambda version: [built.engine.plan for built in engines(version)]) if plans else None


@cache
def served(version: int, folder: Path) -> Served:
    files = {"config.pbtxt": f"{MARK}\n{version}".encode(), "1/model.onnx": bytes([version]) * 300_000}
    if version:
        files |= {"labels.txt": b"cat\n", "1/model.plan": bytes([version]) * 99}
    return Served(folder / "served", "config.pbtxt", files, r"config\.pbtxt|labels\.txt|1/model\.\w+", "")


def read_served(folder: Path) -> int | None:
    path = folder / "served"
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return version_of(found, lambda version: served(version, folder).files) if path.exists() else None


def weights(version: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((20_000 + version,), float(version))}


def read_weights(folder: Path) -> int | None:
    path = folder / "w.safetensors"
    return version_of(load_file(path)["a"].tolist(), lambda v: weights(v)["a"].tolist()) if path.exists() else None


def ranges(version: int) -> dict[str, tuple[float, float]]:
    return {f"value {index}": (-float(version), 1.0) for index in range(1000)}


def in_cache(folder: Path, function: Callable[[], object]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_cache, "private_folder", lambda name: folder)
        return function()


def read_ranges(folder: Path) -> int | None:
    found = in_cache(folder, partial(calibration_cache.read, "key"))
    assert found is not None or not (folder / "key.json").exists(), "what is there is not whole"
    return None if found is None else version_of(found, ranges)


@cache
def digits() -> tuple[Splits, Preprocessing]:
    splits = open_splits("digits")
    few = splits.train.subset(np.arange(16))
    return Splits(few, few, few), suggest_preprocessing(few, (8, 8))


def write_training(folder: Path, version: int) -> None:
    """Two epochs that compute nothing: version 0 is interrupted after the first of them."""

    def run_epoch(training: loop._Training, on_step: object) -> None:
        training.epochs.append(loop.Epoch(len(training.epochs) + 1, 0.1, 1.0, 0.5, 1.0, 0.5, 1.0))
        training.kept_weights = copy.deepcopy(training.model.state_dict())
        training.kept_weights["fc.bias"].fill_(version)

    def on_epoch(epoch: loop.Epoch) -> None:
        if not version:
            raise StopIteration

    config, resume = TrainingConfig(epochs=2, batch_size=8, warmup_epochs=0), (folder / loop.STATE_FILE).exists()
    with pytest.MonkeyPatch.context() as patch, suppress(StopIteration):
        patch.setattr(loop._Training, "run_epoch", run_epoch)
        patch.setattr(loop._Training, "evaluate", lambda *_: (1.0, 0.5))
        loop.train("resnet8", *digits(), config, folder, resume=resume, on_epoch=on_epoch)


def read_training(folder: Path) -> int | None:
    """What there is to go on with is whole, and so are the log and the weights, which never come later or earlier."""
    state, log, model = (folder / name for name in (loop.STATE_FILE, loop.LOG_FILE, loop.MODEL_FILE))
    rows = len(log.read_text().splitlines()) - 1 if log.exists() else 0
    if not state.exists():
        assert rows <= 1 and not model.exists()
        return None
    with safe_open(state, framework="pt") as file:
        epochs, bias = len(json.loads(file.metadata()["training"])["epochs"]), file.get_tensor("kept.fc.bias")
    assert rows in (epochs, epochs + 1)
    if model.exists():
        resnet8 = create_model("resnet8", in_channels=1)
        load_weights(resnet8, model)
        assert epochs == 2 and torch.equal(resnet8.fc.bias, bias)
    return int(bias[0]) if model.exists() else 0  # the state alone is there to go on with


def configs(version: int) -> dict[str, Config]:
    return {f"problem {number:4}": ConvConfig(64, 64, 32, 4, 2, split_k=version + 1) for number in range(400)}


def write_tuned(folder: Path, version: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TUNED", folder)
        try:
            selection.write_table("sm_00", {"gpu": "none"}, configs(version), write_atomically)
        except OSError as error:  # as scripts say it
            raise ExportError(f"{folder}: {error.strerror}") from error


def read_tuned(folder: Path) -> int | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TUNED", folder)
        selection.tuned_table.cache_clear()
        found = dict(selection.tuned_table("sm_00"))
        selection.tuned_table.cache_clear()
    return version_of(found, configs) if found else None


WRITERS = {
    "bundle": Writer(
        lambda folder, version: write_bundle(folder / "bundle", bundle_files(version)),
        read_bundle, frozenset({"bundle"}), refusal="{folder}/bundle cannot be written: {reason}", busy=WRITING,
    ),
    "engines": Writer(
        write_engines, read_engines, frozenset({"engines"}),
        refusal="{folder}/engines cannot be written: {reason}", busy=WRITING,
    ),
    "served": Writer(
        lambda folder, version: served(version, folder).write(), read_served, frozenset({"served"}),
        refusal="{folder}/served cannot be written: {reason}", busy=WRITING,
    ),
    "weights": Writer(
        lambda folder, version: save_weights(folder / "w.safetensors", weights(version), {}),
        read_weights, frozenset({"w.safetensors"}), litter=r"\.w\.safetensors\.\w{8}\.partial",
        refusal="{folder}/w.safetensors: cannot be written: {reason}", ends_with=("fsync", "replace"),
    ),
    "training": Writer(
        write_training, read_training, frozenset({loop.STATE_FILE, loop.LOG_FILE, loop.MODEL_FILE}),
        refusal="{folder}/[a-z.]+: cannot be written: {reason}", ends_with=("fsync", "replace"),
        busy="{folder}: another training is writing there|{folder} holds a training: go on with it by --resume.*",
    ),
    "calibration": Writer(
        lambda folder, version: in_cache(folder, lambda: calibration_cache.write("key", ranges(version))),
        read_ranges, frozenset({"key.json"}), litter=r"tmp\w+", flushes=False, ends_with=("replace",),
    ),
    "tuned": Writer(
        write_tuned, read_tuned, frozenset({"sm_00.json"}), litter=r"\.sm_00\.json\.\w{8}\.partial",
        refusal="{folder}: {reason}", ends_with=("fsync", "replace"),
    ),
}  # fmt: skip
