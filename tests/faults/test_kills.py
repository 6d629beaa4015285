"""kill -9 at every step of an export: what is there afterwards is the old bundle or the new one, whole."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export import verify_bundle
from export.base.precision import PRECISIONS
from export.runtime.bundle.folder import MANIFEST, publish, read_verified, staged
from export.runtime.engine_store import BuiltEngine, read_place, write_place
from export.runtime.engines.engine import FLAVOURS, Engine
from resnet.weights import save_weights
from tests.effort import TIMES
from tests.faults.killing import kill_once, kills, random_kills

ROOT = Path(__file__).resolve().parents[2]
OLD = {"model.onnx": b"old" * 1000, "parity.json": b"{}", "old.bin": bytes(range(256)) * 300}
NEW = {
    "model.onnx": b"new" * 400_000, "parity.json": b"{ }", "golden.safetensors": random.Random(0).randbytes(100_000),
    "model.cpu.onnx": b"", "model.rtx.engine": b"plan" * 70_000, "model.rtx.layers.json": b"[]",
}  # fmt: skip
# How many kills there are at least: with the 25 and the 40 below more than 200.
LEAST = {"first export": 30, "over an older bundle": 35, "after an earlier kill": 40, "after an earlier first": 35}


def write(output: Path, files: dict[str, bytes]) -> None:
    with staged(output) as staging:
        publish(staging, output, files, {"format": 2})


class Folder:
    """The folder an export is killed in: how it begins, and what may be found there afterwards."""

    def __init__(self, output: Path, begin: Callable[[], object], again: Callable[[], object]) -> None:
        self.output, self._begin, self._again = output, begin, again
        self.found: list[dict[str, bytes] | None] = []
        self.begin()

    def begin(self) -> None:
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.output.parent.mkdir()
        self._begin()

    def check(self, moment: str) -> None:
        """What is there is whole and not older than what was there before; the next export leaves nothing else."""
        try:
            self.found.append(read_verified(self.output)[1] if self.output.exists() else None)
            self._again()
            assert [path.name for path in self.output.parent.iterdir()] == [self.output.name], "left behind"
            read_verified(self.output)
        except Exception as error:
            raise AssertionError(f"{moment}: {error}") from error
        self.begin()

    def outcomes(self) -> list[dict[str, bytes] | None]:
        """The different things that were found, in the order of the moments."""
        return [files for index, files in enumerate(self.found) if not index or files != self.found[index - 1]]


@pytest.mark.parametrize("case", LEAST)
def test_killed_at_every_step_a_bundle_is_whole(case: str, tmp_path: Path) -> None:
    output = tmp_path / "parent" / "bundle"

    def export() -> None:
        write(output, NEW)

    def begin() -> None:
        if "first" not in case:
            write(output, OLD)
        if "earlier" in case:
            kill_once(export, 17)
            assert (output.parent / ".bundle.staging" / "model.onnx").is_file()

    folder = Folder(output, begin, export)
    count = kills(export, folder.check)
    assert folder.outcomes() == [None if "first" in case else OLD, NEW]
    assert count >= LEAST[case], f"only {count} kills"


def test_killed_at_every_step_a_real_export_is_whole(
    bundle: Path, export_again: Callable[[Path], None], tmp_path: Path
) -> None:
    """All of `export_bundle` but the computing, which was done before."""
    output = tmp_path / "parent" / "bundle"
    folder = Folder(output, lambda: write(output, OLD), lambda: export_again(output))
    count = kills(lambda: export_again(output), folder.check)
    assert folder.outcomes() == [OLD, read_verified(bundle)[1]]
    assert count >= 25, f"only {count} kills"


def test_killed_at_every_step_the_engine_of_this_machine_is_whole(tmp_path: Path) -> None:
    """The engine in use with the one before it, as a build on the device puts them in their place."""
    place = tmp_path / "parent" / "engines" / "bundle-tensorrt-rtx"
    first, second = (built_engine(plan) for plan in (b"first" * 40_000, b"second" * 50_000))

    def begin() -> None:
        place.parent.mkdir(mode=0o700)
        keep(place, [first])

    def check(moment: str) -> None:
        plans = [built.engine.plan for built in read_place(place)]
        assert plans in ([first.engine.plan], [second.engine.plan, first.engine.plan]), moment
        found.append(len(plans))
        keep(place, [second, first])
        assert [path.name for path in place.parent.iterdir()] == [place.name], moment
        shutil.rmtree(place.parent)
        begin()

    place.parent.parent.mkdir()
    begin()
    found: list[int] = []
    assert kills(lambda: keep(place, [second, first]), check) >= 30
    assert found == sorted(found) and set(found) == {1, 2}


def built_engine(plan: bytes) -> BuiltEngine:
    key = {"flavour": "tensorrt-rtx", "version": "1.2.3", "precision": "fp32", "options": {}}
    return BuiltEngine(Engine(FLAVOURS["tensorrt-rtx"], plan, "1.2.3", PRECISIONS["fp32"], 9, 1.0), key)


def keep(place: Path, engines: list[BuiltEngine]) -> None:
    with staged(place) as staging:
        write_place(staging, place, engines)


def test_killed_at_any_time_a_bundle_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "parent" / "bundle"
    folder = Folder(output, lambda: write(output, OLD), lambda: write(output, NEW))
    assert random_kills(lambda: write(output, NEW), folder.check, 40 * TIMES) == 40 * TIMES
    assert all(files in (OLD, NEW) for files in folder.found)


def test_a_real_export_killed_at_any_time(bundle: Path, tmp_path: Path) -> None:
    """The script as a user runs it, over an older bundle, then once to the end."""
    output = tmp_path / "parent" / "bundle"
    shutil.copytree(bundle, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), "--model", "resnet8", "--image-size", "16"]
    command += ["--engine", "none", "--batch", "1:2:4", "--output", str(output)]
    for moment in ("loading", "computing"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        while moment == "computing" and not (output.parent / ".bundle.staging").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        read_verified(output)
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]
    assert (output / MANIFEST).read_bytes() != before[MANIFEST] and all(verify_bundle(output))


def test_killed_at_every_step_weights_are_the_old_or_the_new_ones(tmp_path: Path) -> None:
    """One file instead of a folder. What a kill leaves beside it is never taken for the weights."""
    path, old, new = tmp_path / "w.safetensors", {"a": torch.zeros(1000)}, {"a": torch.ones(2000)}
    found = []

    def check(moment: str) -> None:
        tensors = load_file(path)
        found.append("new" if torch.equal(tensors["a"], new["a"]) else "old")
        assert found[-1] == "new" or torch.equal(tensors["a"], old["a"]), moment
        save_weights(path, old, {})
        beside = [other for other in tmp_path.iterdir() if other != path]
        assert len(beside) <= 1 and all(other.name.endswith(".partial") for other in beside), moment
        for other in beside:
            other.unlink()

    save_weights(path, old, {})
    kills(lambda: save_weights(path, new, {}), check)
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}
