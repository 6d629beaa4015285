"""What may happen to a bundle, to its engines and to what runs them; and arguments that nothing is known by."""

from __future__ import annotations

import builtins
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from export import Batch, ExportConfig, ExportError, MissingDependency, export_bundle, fuse, verify_bundle
from export.fusion.passes import QUANTISED_LEVEL
from export.quantisation.calibration import calibrate
from export.quantisation.split_addition import split_addition
from export.runtime.artefacts import artefacts, running, running_first
from export.runtime.bundle.contents import open_bundle
from export.runtime.bundle.folder import MANIFEST, read_verified
from export.runtime.engines import engine as tensorrt_engine
from export.runtime.engines.engine import FLAVOURS, Flavour
from resnet.data.calibration_pictures import open_calibration
from resnet.data.labelled import DataError
from resnet.data.preprocessing import Preprocessing
from tests.faults.bundle_inputs import a_picture, canonical, copied, replace, script, with_own_hash
from tests.faults.conftest import CONFIG
from tests.faults.killing import kill_once

ENGINE = "model.rtx.engine"
EXAMPLE = torch.zeros(1, 3, 16, 16)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_engine(source: Path, folder: Path, version: str, gpu: str | None = None) -> Path:
    """A copy with an engine that says it was built by that version of TensorRT-RTX, and on that GPU."""
    bundle = copied(source, folder)
    replace(bundle, ENGINE, b"the plan")
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    facts = {"flavour": "tensorrt-rtx", "version": version, "convolutions": 9, "build_seconds": 1.0, "gpu": gpu}
    manifest["engines"] = {ENGINE: facts}
    (bundle / MANIFEST).write_bytes(canonical(with_own_hash(manifest)))
    return bundle


def test_row_22_a_flipped_bit_in_any_file_is_refused_by_its_name(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 25 positions of each file, the first and last bytes included; once per file by the script."""
    broken, verify = with_engine(bundle, tmp_path, "1.0"), script("verify")
    names = sorted(path.name for path in broken.iterdir())
    assert names == ["golden.safetensors", MANIFEST, "model.onnx", ENGINE, "parity.json", "report.html"]
    for name in names:
        path = broken / name
        content = path.read_bytes()
        for index in range(25):
            position, bit = index * (len(content) - 1) // 24, index % 8
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            with pytest.raises(ExportError, match=f"^{path}: changed since it was written") as error:
                verify_bundle(broken)
            assert "\n" not in str(error.value)
        assert verify.main([str(broken)]) == 2
        assert f"verify.py: error: {path}: changed since it was written" in capsys.readouterr().err
        path.write_bytes(content)
    open_bundle(broken)


def test_row_23_a_killed_export_leaves_the_old_bundle_and_the_next_one_cleans_up(
    bundle: Path, export_again: Callable[[Path], None], tmp_path: Path
) -> None:
    """One moment; all of them are in test_kills.py, full disks in test_disk.py."""
    output = copied(bundle, tmp_path)
    before = snapshot(output)
    assert kill_once(lambda: export_again(output), 12).startswith(("before", "half-way"))
    assert snapshot(output) == before and (tmp_path / ".bundle.staging").is_dir()
    export_again(output)
    read_verified(output)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_row_24_of_two_exports_one_wins_and_the_other_says_so(
    export_again: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first is writing its bundle; two real ones at once are in test_disk.py."""
    output, said = tmp_path / "bundle", []
    link = os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", link)
        with pytest.raises(ExportError) as error:
            export_again(output)
        said.append(str(error.value))

    monkeypatch.setattr(os, "fsync", meanwhile)
    export_again(output)
    assert said == [f"another process is writing to {output}: wait for it or choose another folder"]
    assert all(verify_bundle(output)) and [path.name for path in tmp_path.iterdir()] == ["bundle"]


OCCUPIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda p: p.write_text("dear"), "exists and is not a folder"),
    "folder": (lambda p: (p.mkdir(), (p / "photo.jpg").write_text("dear")), "exists and is not a bundle"),
    "hidden file": (lambda p: (p.mkdir(), (p / ".git").mkdir()), "exists and is not a bundle"),
    "link": (lambda p: p.symlink_to(p.parent.parent), "exists and is not a folder"),
    "broken link": (lambda p: p.symlink_to("nowhere"), "exists and is not a folder"),
    "another manifest": (lambda p: (p.mkdir(), (p / MANIFEST).write_text("{}")), "exists and is not a bundle"),
    "pipe": (lambda p: os.mkfifo(p), "exists and is not a folder"),
}


@pytest.mark.parametrize("case", OCCUPIED)
def test_row_25_what_is_no_bundle_is_never_overwritten(
    case: str, resnet8: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    make, expected = OCCUPIED[case]
    (tmp_path / "parent").mkdir()
    output = tmp_path / "parent" / "output"
    make(output)
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=rf"^{output} {expected}: choose another folder") as error:
        export_bundle(resnet8, EXAMPLE, output, CONFIG, images=images)
    assert "\n" not in str(error.value) and snapshot(tmp_path) == before
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["output"]


def test_row_25_a_bundle_with_a_file_of_somebody_is_never_overwritten(
    bundle: Path, export_again: Callable[[Path], None], tmp_path: Path
) -> None:
    output = copied(bundle, tmp_path)
    (output / "notes.txt").write_text("dear")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=r"holds notes\.txt, which is not part of the bundle"):
        export_again(output)
    assert snapshot(tmp_path) == before


def test_row_26_int8_without_pictures_to_calibrate_on_is_refused(
    resnet8: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    config = ExportConfig("int8", (1, 2, 4), "none")
    with pytest.raises(
        ExportError, match=r"^int8 needs pictures to calibrate on, got none; give export_bundle\(calibration=\.\.\.\)$"
    ):
        export_bundle(resnet8, EXAMPLE, tmp_path / "b", config, images=images)
    preprocessing = Preprocessing((16, 16), (16, 16), (0.5,) * 3, (0.5,) * 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no picture")
    for folder, found in (("empty", "got 0, none readable"), ("text", "got 1, none readable")):
        with pytest.raises(DataError, match=f"^{tmp_path / folder}: expected pictures to calibrate on .*{found}$"):
            open_calibration(str(tmp_path / folder), preprocessing)
    assert not (tmp_path / "b").exists()


def test_row_26_unreadable_pictures_among_good_ones_are_left_out_by_name_and_counted(
    resnet8: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And too few are said to be too few."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(4):
        a_picture(folder / f"good {seed}.png", seed)
    (folder / "html.jpg").write_text("<html>")
    (folder / "cut.png").write_bytes((folder / "good 0.png").read_bytes()[:300])
    Image.new("F", (20, 20)).save(folder / "float.tiff")
    caplog.set_level(logging.WARNING)
    pictures = open_calibration(str(folder), Preprocessing((16, 16), (16, 16), (0.5,) * 3, (0.5,) * 3))
    assert len(pictures) == 4
    program = fuse(resnet8, EXAMPLE, Batch(1, 2, 4), QUANTISED_LEVEL)
    calibrate(split_addition(program.master), pictures, batch=program.batch)
    said = [record.getMessage() for record in caplog.records if record.name.startswith(("resnet", "export"))]
    for name in ("html.jpg", "cut.png", "float.tiff"):
        assert len([line for line in said if line.startswith("left out: ") and name in line and "\n" not in line]) == 1
    assert f"{folder}: left out 3 of 7 pictures" in said
    assert "calibrating on 4 images: at least 100 are wanted" in said


class Package:
    __version__ = "1.2.3"


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and TensorRT-RTX 1.2.3, where an engine must not be loaded."""
    monkeypatch.setattr(tensorrt_engine, "import_flavour", lambda flavour: Package)
    monkeypatch.setattr(tensorrt_engine, "why_no_gpu", lambda extra: "")
    monkeypatch.setattr(tensorrt_engine, "compute_capability", lambda extra: (8, 6))
    monkeypatch.setattr(tensorrt_engine, "gpu_name", lambda extra: "A, compute capability 8.6, 16 multiprocessors")
    monkeypatch.setattr("export.runtime.artefacts.TensorRTRunner", lambda *_: pytest.fail("an engine was loaded"))


@pytest.mark.usefixtures("with_gpu")
def test_row_27_an_engine_of_another_version_is_refused_with_the_command_that_fixes_it(
    bundle: Path, tmp_path: Path
) -> None:
    opened = open_bundle(with_engine(bundle, tmp_path, "1.2.2"))
    engine = next(artefact for artefact in artefacts(opened) if artefact.engine)
    assert engine.obstacle.startswith("built by tensorrt-rtx 1.2.2, 1.2.3 is installed")
    with pytest.raises(ExportError, match=r"model\.rtx\.engine cannot run here: built by"), running(opened, engine):
        pass
    with running_first(opened) as (artefact, _):
        assert artefact.file == "model.onnx"
    (rung,) = [rung for rung in verify_bundle(opened.path) if rung.file == ENGINE]
    assert rung.not_run == engine.obstacle
    assert "build_on_device(" in engine.obstacle, "no command that fixes it"


@pytest.mark.usefixtures("with_gpu")
def test_row_27_an_engine_of_another_gpu_is_refused_with_the_command_that_fixes_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_on, here = "A, compute capability 8.6, 16 multiprocessors", "B, compute capability 8.6, 8 multiprocessors"
    opened = open_bundle(with_engine(bundle, tmp_path, "1.2.3", built_on))
    monkeypatch.setattr(tensorrt_engine, "gpu_name", lambda extra: built_on)
    assert next(artefact for artefact in artefacts(opened) if artefact.engine).obstacle == ""
    monkeypatch.setattr(tensorrt_engine, "gpu_name", lambda extra: here)
    engine = next(artefact for artefact in artefacts(opened) if artefact.engine)
    assert engine.obstacle.startswith(f"built on {built_on}, here is {here}; build one here: build_on_device(")
    with pytest.raises(ExportError, match=r"model\.rtx\.engine cannot run here: built on"), running(opened, engine):
        pass


@pytest.mark.usefixtures("with_gpu")
def test_row_27_an_engine_from_another_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    changed = with_engine(bundle, tmp_path, "1.2.3")
    (changed / ENGINE).write_bytes(b"the plot")
    with pytest.raises(ExportError, match=f"{ENGINE}: changed since it was written"):
        verify_bundle(changed)


def deadly(folder: Path, deed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of TensorRT, a package whose builder does a deed."""
    (folder / "deadly.py").write_text(f"import os, signal\nclass ILogger: pass\n"
        f"class Builder:\n    def __init__(self, logger): {deed}\n")  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    flavour = Flavour(
        "tensorrt", "deadly", "model.trt.engine", "model.trt.layers.json", needs_gpu=False, inspects=False
    )
    monkeypatch.setitem(FLAVOURS, "tensorrt", flavour)


BUILDS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL (most likely out of memory)"),
    "crashed": ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
    "out of memory": ("raise MemoryError", "ran out of memory"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_row_28_an_engine_build_that_dies_leaves_the_old_bundle_and_says_what_to_lower(
    case: str, bundle: Path, resnet8: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deed, expected = BUILDS[case]
    (tmp_path / "package").mkdir()
    deadly(tmp_path / "package", deed, monkeypatch)
    output = copied(bundle, tmp_path / "parent")
    before = snapshot(output)
    with pytest.raises(ExportError) as error:
        export_bundle(resnet8, EXAMPLE, output, ExportConfig("fp32", (1, 2, 4), "tensorrt"), images=images)
    advice = "lower EngineConfig.workspace_mib, ExportConfig.batch or EngineConfig.optimization_level, "
    advice += "or export with ExportConfig.engine='none'"
    assert str(error.value) == f"building the tensorrt engine {expected}: {advice}"
    assert snapshot(output) == before and [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_row_29_a_missing_runtime_is_an_error_that_names_what_installs_it(
    bundle: Path, resnet8: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def hidden(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError(name=name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", hidden)
    install = r"^onnxruntime is not installed; install it with: pip install -e '\.\[onnxruntime\]'$"
    with pytest.raises(MissingDependency, match=install):
        export_bundle(resnet8, EXAMPLE, tmp_path / "b", CONFIG)
    with pytest.raises(ExportError, match=r"model\.onnx does not run here: onnxruntime is not installed"):
        verify_bundle(bundle)
    assert list(tmp_path.iterdir()) == []


def test_row_29_a_missing_flavour_is_an_error_when_it_was_asked_for(resnet8: nn.Module, tmp_path: Path) -> None:
    absent = Flavour("tensorrt", "no_such_module", "x", "y", needs_gpu=False, inspects=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FLAVOURS, "tensorrt", absent)
        with pytest.raises(ExportError, match=r"no_such_module is not installed; .*pip install -e '\.\[tensorrt\]'"):
            export_bundle(resnet8, EXAMPLE, tmp_path / "b", ExportConfig(engine="tensorrt"))
    assert list(tmp_path.iterdir()) == []


def test_row_29_another_provider_is_no_fallback(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: ["AzureExecutionProvider"])
    refusal = r"\['AzureExecutionProvider'\]: expected CPUExecutionProvider alone"
    with pytest.raises(ExportError, match=refusal), running_first(open_bundle(bundle)):
        pass
    assert not all(verify_bundle(bundle))


FLAGS = {
    "export": ("--fp61", "--fp16"), "verify": ("--jsno", "--json"), "evaluate": ("--rya", "--ray"),
    "classify": ("--jsn", "--json"), "benchmark": ("--flors", "--floors"), "train": ("--epoch-s", "--epochs"),
    "tune": ("--bacht", "--batch"), "compile_kernels": ("--target-s", "--targets"),
    "convert": ("--num-clases", "--num-classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_row_30_an_unknown_flag_gets_the_nearest_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, right = FLAGS[name]
    required = {
        "convert": ["a.pt", "b.safetensors", "--model", "resnet8"],
        "verify": ["b"],
        "classify": ["b", "p"],
        "evaluate": ["b", "d"],
    }
    with pytest.raises(SystemExit) as end:
        script(name).main([*required.get(name, []), wrong])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert f"unknown argument '{wrong}'; did you mean " in said.err and right in said.err


@pytest.mark.parametrize("name", ["export", "train", "benchmark", "convert", "compile_kernels"])
def test_row_30_an_unknown_model_gets_the_nearest_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["weights.pt", "out.safetensors"] if name == "convert" else []
    assert script(name).main([*arguments, "--model", "resnet51"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{name}.py: error: ") and "'resnet51'" in line and "resnet50" in line
    assert list(tmp_path.iterdir()) == []
