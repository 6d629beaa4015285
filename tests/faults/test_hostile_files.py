"""What nobody may do through a file or a name, and what runs of a bundle that was made for another machine.

Servers are in tests/resnet/test_pretrained.py.
"""

from __future__ import annotations

import ast
import os
import re
import stat
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from export import ExportConfig, ExportError, MissingDependency, export_bundle, verify_bundle
from export.base.private_cache import private_folder
from export.runtime.artefacts import artefacts, running, running_first
from export.runtime.bundle.contents import open_bundle
from export.runtime.engines import engine as tensorrt_engine
from export.runtime.onnx_session import ONNX_FILE, open_file
from tests import children
from tests.faults.bundle_inputs import ENGINE, a_picture, class_folders, copied, forge, replace, run, with_engine
from tests.faults.mutations import nested
from tests.faults.writers import write_bundle
from tests.scripts.loading import ROOT, load_script

SOURCES = sorted(path for room in ("export", "kernels", "resnet", "scripts") for path in (ROOT / room).rglob("*.py"))


def test_the_versions_without_known_holes_are_asked_for() -> None:
    """Of PyTorch, which unpickles, and of ONNX, which opened files by name."""
    project = (ROOT / "pyproject.toml").read_text()
    for package, least in (("torch", "2.10"), ("onnx", "1.21")):
        (pinned,) = re.findall(rf'"{package}>=([0-9.]+)"', project)
        assert TorchVersion(version(package)) >= TorchVersion(pinned) >= TorchVersion(least), package


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("place", ["current folder", "above", "absolute"])
def test_external_data_is_refused(
    place: str, rounded: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is there and fits, so that nothing but the rule can refuse it."""
    changed = copied(bundle, tmp_path)
    model = onnx.load(changed / ONNX_FILE)
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 1000)
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    monkeypatch.chdir(tmp_path)
    location = {"current folder": "secret", "above": f"{changed.name}/../secret", "absolute": str(tmp_path / "secret")}
    external = {"location": location[place], "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in external.items():
        tensor.external_data.add(key=key, value=value)
    content = model.SerializeToString()
    with pytest.raises(ExportError) as error:
        open_file(content, rounded)
    assert "\n" not in str(error.value)
    replace(changed, ONNX_FILE, content)
    with pytest.raises(ExportError):
        opened = open_bundle(changed)
        with running(opened, artefacts(opened)[-1]):
            pass


def with_file(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["files"].update({name: {"bytes": 0, "sha256": "0" * 64}})


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "batch of 1.5": lambda m: m["batch"].update(min=1.5),
    "batch of 4.5": lambda m: m["batch"].update(max=4.5),
    "endless batch": lambda m: m["batch"].update(max=float("inf")),
    "endless image": lambda m: m["inputs"][0].update(shape=["batch", float("inf"), 16, 16]),
    "fewer classes": lambda m: (m["outputs"][0].update(shape=["batch", 3]), m["model"].update(classes=None)),
    "other classes": lambda m: (
        m["outputs"][0].update(shape=["batch", 3]), m["model"].update(classes=["class 0", "class 1", "c"]),
    ),
    "more classes": lambda m: (m["outputs"][0].update(shape=["batch", 20]), m["model"].update(classes=None)),
    "no name": lambda m: m["inputs"][0].pop("name"),
    "format": lambda m: m.update(format="2\n3"),
    "size of pictures": lambda m: m["model"]["preprocessing"].update(resize=[10**30, 10**30]),
    "plan elsewhere": lambda m: m.update(engines={"/tmp/x.engine": {"flavour": "tensorrt-rtx", "version": "1"}}),
    "nested": lambda m: m.update(more=nested(980)),
    **{f"file {name[:4]!r}": with_file(name) for name in ("a\x00b", "x" * 300, "a\nb")},
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_manifest_is_refused_by_every_script(case: str, bundle: Path, tmp_path: Path) -> None:
    """Those that fuzzing found, or that it comes by too rarely. What it can be made to say is in one line."""
    changed = copied(bundle, tmp_path)
    forge(changed, FORGED[case])
    classify, evaluate = load_script("classify"), load_script("evaluate")
    commands = {classify: a_picture(tmp_path / "picture.png"), evaluate: class_folders(tmp_path / "data")}
    worked = {run(module, [str(changed), str(argument)]) for module, argument in commands.items()}
    assert case == "nested" or worked == {"exit code 2"}
    run(load_script("verify"), [str(changed)])


def test_caches_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = private_folder("engines")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.parent.parent == tmp_path
    for mode in (0o777, 0o770, 0o705, 0o1777):
        folder.chmod(mode)
        with pytest.raises(ExportError, match=r"is not private to this user \(expected mode 0700\)"):
            private_folder("engines")
    folder.chmod(0o700)
    with monkeypatch.context() as other, pytest.raises(ExportError, match="is not private to this user"):
        other.setattr(os, "getuid", lambda: 12345)
        private_folder("engines")
    folder.symlink_to(folder.rename(tmp_path / "elsewhere"))
    with pytest.raises(ExportError, match="is not private to this user"):
        private_folder("engines")


def test_the_runtime_keeps_no_records_and_sends_none(bundle: Path, tmp_path: Path) -> None:
    """Some versions of ONNX Runtime store what they were used for in the user's cache and send it to their makers."""
    program = (
        "import sys, time; sys.path[:0] = [sys.argv[1]]\n"
        "from export.runtime.verify import verify_bundle\n"
        "assert all(verify_bundle(sys.argv[2])); time.sleep(1)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = children.run([sys.executable, "-c", program, ROOT, bundle], env=environment)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


FORBIDDEN = {"os.system", "os.popen", "eval", "exec", "pickle.loads", "subprocess.getoutput", "os.execv", "__import__"}


def test_no_hub_no_shell_and_arguments_as_lists() -> None:
    started = 0
    for path in SOURCES:
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        names = {ast.unparse(call.func) for call in calls}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names |= {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        assert not names & FORBIDDEN and not [n for n in names if ".hub" in n or n.startswith("hub")], path
        for call in calls:
            assert "shell" not in {keyword.arg for keyword in call.keywords}, f"{path}: {ast.unparse(call)}"
            if ast.unparse(call.func).startswith("subprocess."):
                started += 1
                assert isinstance(call.args[0], ast.List | ast.Name), f"{path}: {ast.unparse(call)}"
    assert started >= 2


@pytest.mark.parametrize("target", ["..", "nowhere"])
def test_a_link_is_never_written_through(target: str, tmp_path: Path) -> None:
    output = tmp_path / "parent" / "output"
    output.parent.mkdir()
    output.symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=rf"^{output} exists and is not a folder: choose another folder"):
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
