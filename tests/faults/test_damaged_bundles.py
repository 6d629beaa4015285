"""Places where a bundle may not go, engines and runtimes that are not there, and arguments that nothing is known by."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import nn

from export import ExportConfig, ExportError, MissingDependency, export_bundle, verify_bundle
from export.runtime.artefacts import artefacts, running, running_first
from export.runtime.bundle.contents import open_bundle
from export.runtime.engines import engine as tensorrt_engine
from tests.faults.bundle_inputs import ENGINE, with_engine
from tests.faults.writers import write_bundle
from tests.scripts.loading import load_script

OCCUPIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "hidden file": (lambda p: (p / ".git").mkdir(parents=True), "exists and is not a bundle"),
    "link": (lambda p: p.symlink_to(p.parent.parent), "exists and is not a folder"),
    "broken link": (lambda p: p.symlink_to("nowhere"), "exists and is not a folder"),
    "pipe": (os.mkfifo, "exists and is not a folder"),
}


@pytest.mark.parametrize("case", OCCUPIED)
def test_what_is_no_bundle_is_never_overwritten(case: str, tmp_path: Path) -> None:
    make, expected = OCCUPIED[case]
    output = tmp_path / "parent" / "output"
    output.parent.mkdir()
    make(output)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=rf"^{output} {expected}: choose another folder"):
        write_bundle(output, {})
    assert sorted(tmp_path.rglob("*")) == before


BUILT_ON = "A, compute capability 8.6, 16 multiprocessors"
ENGINES = {
    "version": ("1.2.4", BUILT_ON, "built by tensorrt-rtx 1.2.4, 1.2.3 is installed.*build_on_device"),
    "GPU": ("1.2.3", "B", f"built on B, here is {BUILT_ON}; build one here: build_on_device"),
    "none": ("1.2.3", BUILT_ON, ""),
}


@pytest.mark.parametrize("other", ENGINES)
def test_an_engine_of_another_version_or_gpu_is_refused_with_the_command_that_fixes_it(
    other: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = SimpleNamespace(__version__="1.2.3")
    machine = {"import_flavour": package, "why_no_gpu": "", "compute_capability": (8, 6), "gpu_name": BUILT_ON}
    for name, value in machine.items():
        monkeypatch.setattr(tensorrt_engine, name, lambda _, value=value: value)
    monkeypatch.setattr("export.runtime.artefacts.TensorRTRunner", lambda *_: pytest.fail("an engine was loaded"))
    version, gpu, expected = ENGINES[other]
    opened = open_bundle(with_engine(bundle, tmp_path, version, gpu))
    engine = next(artefact for artefact in artefacts(opened) if artefact.engine)
    if not expected:
        assert engine.obstacle == ""
        return
    with pytest.raises(ExportError, match=rf"model\.rtx\.engine cannot run here: {expected}"), running(opened, engine):
        pass
    (rung,) = [rung for rung in verify_bundle(opened.path) if rung.file == ENGINE]
    assert rung.not_run == engine.obstacle


def test_a_missing_runtime_is_an_error_that_names_what_installs_it(
    bundle: Path, resnet8: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    install = r"^onnxruntime is not installed; install it with: pip install -e '\.\[onnxruntime\]'$"
    with pytest.raises(MissingDependency, match=install):
        export_bundle(resnet8, torch.zeros(1, 3, 16, 16), tmp_path / "b", ExportConfig(engine="none"))
    with pytest.raises(ExportError, match=r"model\.onnx does not run here: onnxruntime is not installed"):
        verify_bundle(bundle)
    assert list(tmp_path.iterdir()) == []


def test_another_provider_is_no_fallback(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: ["AzureExecutionProvider"])
    refusal = r"\['AzureExecutionProvider'\]: expected CPUExecutionProvider alone"
    with pytest.raises(ExportError, match=refusal), running_first(open_bundle(bundle)):
        pass
    assert not all(verify_bundle(bundle))


# For each script what it must be given, a flag that it does not know, and the one that is near.
FLAGS = {
    "export": ([], "--fp61", "--fp16"), "verify": (["b"], "--jsno", "--json"),
    "evaluate": (["b", "d"], "--rya", "--ray"), "classify": (["b", "p"], "--jsn", "--json"),
    "benchmark": ([], "--flors", "--floors"), "train": ([], "--epoch-s", "--epochs"),
    "tune": ([], "--bacht", "--batch"), "compile_kernels": ([], "--target-s", "--targets"),
    "convert": (["a.pt", "b.safetensors", "--model", "resnet8"], "--num-clases", "--num-classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_an_unknown_flag_or_model_gets_the_nearest_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    required, wrong, right = FLAGS[name]
    module = load_script(name)
    with pytest.raises(SystemExit) as end:
        module.main([*required, wrong])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert f"unknown argument '{wrong}'; did you mean " in said.err and right in said.err
    if name in ("export", "train", "benchmark", "convert", "compile_kernels"):
        assert module.main([*required[:2], "--model", "resnet51"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"{name}.py: error: ") and "'resnet51'" in line and "resnet50" in line
    assert list(tmp_path.iterdir()) == []
