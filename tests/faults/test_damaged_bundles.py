"""What may happen to a bundle, to its engines and to what runs them; and arguments that nothing is known by."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export import ExportConfig, ExportError, MissingDependency, export_bundle, verify_bundle
from export.runtime.artefacts import artefacts, running, running_first
from export.runtime.bundle.contents import open_bundle
from export.runtime.bundle.folder import MANIFEST
from export.runtime.engines import engine as tensorrt_engine
from export.runtime.engines.engine import FLAVOURS, Flavour
from export.terminal.flags import in_flags
from tests.faults.bundle_inputs import ENGINE, copied, with_engine
from tests.faults.writers import write_bundle
from tests.scripts.loading import load_script

EXAMPLE = torch.zeros(1, 3, 16, 16)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_flipped_bit_in_any_file_is_refused_by_its_name(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, verify = with_engine(bundle, tmp_path, "1.0"), load_script("verify")
    names = sorted(path.name for path in broken.iterdir())
    assert names == ["golden.safetensors", MANIFEST, "model.onnx", ENGINE, "parity.json", "report.html"]
    for name in names:
        path = broken / name
        content = path.read_bytes()
        for bit, position in enumerate((0, len(content) // 2, len(content) - 1)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            assert verify.main([str(broken)]) == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert said.startswith(f"verify.py: error: {path}: changed since it was written")
        path.write_bytes(content)
    open_bundle(broken)


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
    monkeypatch.setattr(
        tensorrt_engine, "import_flavour", lambda flavour: type("Package", (), {"__version__": "1.2.3"})
    )
    monkeypatch.setattr(tensorrt_engine, "why_no_gpu", lambda extra: "")
    monkeypatch.setattr(tensorrt_engine, "compute_capability", lambda extra: (8, 6))
    monkeypatch.setattr(tensorrt_engine, "gpu_name", lambda extra: BUILT_ON)
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


def test_an_engine_build_that_dies_leaves_the_old_bundle_and_says_what_to_lower(
    bundle: Path, resnet8: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of TensorRT, a package whose builder kills its process."""
    (tmp_path / "deadly.py").write_text("import os, signal\nclass ILogger: pass\n"
        "class Builder:\n    def __init__(self, logger): os.kill(os.getpid(), signal.SIGKILL)\n")  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("model.trt.engine", "model.trt.layers.json")
    monkeypatch.setitem(FLAVOURS, "tensorrt", Flavour("tensorrt", "deadly", *names, needs_gpu=False, inspects=False))
    output = copied(bundle, tmp_path / "parent")
    before = snapshot(output)
    with pytest.raises(ExportError) as error:
        export_bundle(resnet8, EXAMPLE, output, ExportConfig("fp32", (1, 2, 4), "tensorrt"), images=images)
    assert in_flags(str(error.value)) == (
        "building the tensorrt engine was ended by SIGKILL (most likely out of memory): "
        "lower --workspace, --batch or --optimization-level, or export with --engine none"
    )
    assert snapshot(output) == before and [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_a_missing_runtime_is_an_error_that_names_what_installs_it(
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
        export_bundle(resnet8, EXAMPLE, tmp_path / "b", ExportConfig(engine="none"))
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
