"""The wheel in an environment of its own, with what a device has: no PyTorch, no ONNX package, no Pillow."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from export.terminal.commands import CONSOLE_SCRIPT, PACKAGE, SCRIPTS
from tests import children
from tests.export import summing

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("export", "kernels", "resnet", "scripts", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building writes into the folder that it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it asks for, and ONNX Runtime.

    These come from the environment of the tests, by links: no network, and what they in turn ask for comes too.
    """
    pytest.importorskip("onnxruntime")
    bare = tmp_path_factory.mktemp("bare")
    assert children.run([sys.executable, "-m", "venv", "--without-pip", bare]).returncode == 0
    pip(bare / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = bare.glob("lib/python*/site-packages")
    (installed,) = packages.glob("*.dist-info")
    wanted = importlib.metadata.Distribution.at(installed).requires or []
    for distribution in with_dependencies([*wanted, "onnxruntime"]):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution.locate_file(top)))
    return bare


def pip(python: str | Path, *arguments: object) -> None:
    """This environment's pip, run by another's Python."""
    spec = importlib.util.find_spec("pip")
    assert spec is not None and spec.origin is not None
    command = [str(python), str(Path(spec.origin).parent), "--disable-pip-version-check", *map(str, arguments)]
    done = children.run(command)
    assert done.returncode == 0, done.stderr[-2000:]


def with_dependencies(requirements: list[str]) -> list[importlib.metadata.Distribution]:
    """What is installed here of what is asked for, with all that it asks for; extras are not asked for."""
    found: dict[str, importlib.metadata.Distribution] = {}
    while requirements:
        requirement = Requirement(requirements.pop())
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in found:
            found[requirement.name] = importlib.metadata.distribution(requirement.name)
            requirements += found[requirement.name].requires or []
    return list(found.values())


def run(environment: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(environment / "bin" / CONSOLE_SCRIPT), *map(str, arguments)]
    return children.run(command, cwd=cwd, env=clean)


def test_every_folder_with_code_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for top in ("export", "kernels", "resnet", "scripts"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".css", ".j2") or path.match("tuned/*.json"):
                expected.add(path.relative_to(ROOT).as_posix().replace("scripts/", f"{PACKAGE}/", 1))
    assert inside == expected


def test_a_bundle_is_verified_where_there_is_no_pytorch(environment: Path, tmp_path: Path) -> None:
    assert children.run([environment / "bin" / "python", "-c", "import torch"], cwd=tmp_path).returncode == 1
    bundle = summing.write(tmp_path / "bundle")
    verified = run(environment, "verify", bundle, cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    ready = f"{bundle}: whole, and every artefact computes what was exported; ready to deploy"
    assert verified.stdout.splitlines()[-1] == ready
    refused = run(environment, "verify", "nowhere", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(
        "resnet-deploy verify: error: nowhere"
    )


def test_help_of_every_command_needs_nothing_else(environment: Path, tmp_path: Path) -> None:
    listed = run(environment, "--help", cwd=tmp_path)
    assert listed.returncode == 0 and listed.stderr == ""
    for command in SCRIPTS:
        assert f"\n  {command} " in listed.stdout
        helped = run(environment, command, "--help", cwd=tmp_path)
        assert helped.returncode == 0, helped.stderr
        assert helped.stdout.startswith(f"usage: resnet-deploy {command} ") and helped.stderr == ""
    unknown = run(environment, "exprot", cwd=tmp_path)
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1 and "expected one of export, " in unknown.stderr


def test_what_is_missing_is_said_in_one_line(environment: Path, tmp_path: Path) -> None:
    process = run(environment, "export", "--fp16", cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("resnet-deploy export: error: torch is not installed here: ")
    assert list(tmp_path.iterdir()) == []
