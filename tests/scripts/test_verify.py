"""verify.py as a user of a device runs it: with few packages, with --build, and with a signature."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from export import ExportError
from export.runtime.build import DeviceBuild
from export.runtime.engines.cuda_runtime import why_no_gpu
from export.runtime.engines.options import EngineConfig
from export.runtime.parity.network import NetworkCheck
from export.runtime.parity.rungs import Rung
from tests.export import digits, summing
from tests.scripts.loading import load_script, refusal, run, run_here

ABSENT = ("onnx", "rich", "PIL", "sklearn", "scipy", "matplotlib", "jinja2", "model_signing")


def test_a_bundle_is_verified_with_what_a_device_has(tmp_path: Path) -> None:
    """Where nothing but numpy, safetensors and ONNX Runtime can be imported; the cache stays as it was."""
    environment = digits.without_torch(tmp_path / "hidden", *ABSENT) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    bundle = summing.write(tmp_path / "fp16")
    process = run("verify", bundle, cwd=tmp_path, **environment)
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "cache" / "resnet-deploy").exists()
    lines = process.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["eager", "onnx"]
    assert lines[-1] == f"{bundle}: whole, and every artefact computes what was exported; ready to deploy"
    assert [line.split("s  ")[1] for line in process.stderr.splitlines()] == ["check the files", "run model.onnx"]


@pytest.mark.skipif(not why_no_gpu("tensorrt"), reason="there is a GPU")
def test_build_without_a_gpu_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX could build here, but nothing could verify what it built."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused = refusal(run_here("verify", summing.write(tmp_path / "fp16"), "--build"))
    assert refused.endswith("no tensorrt-rtx engine: no NVIDIA GPU here")
    assert not (tmp_path / "cache" / "resnet-deploy").exists()


# Builds that no machine here can make.

ENGINE = Path("/cache/b-tensorrt-12345678/model.trt.engine")


def built(origin: str, reason: str = "") -> DeviceBuild:
    check = NetworkCheck.refused(3.0, reason) if reason else NetworkCheck(1e-3, 1e-3, 1.0, 3.0, 1.0, "equal")
    rung = Rung("tensorrt, built here", "tensorrt 10.3.0", "fp16", str(ENGINE), {"output": check})
    return DeviceBuild(rung, ENGINE, origin, 5_000_000)


NOT_IN_PLACE = "some/bundle: model.trt.engine as built here is WRONG and was not put in place; do not deploy"
BUILDS = {
    "built": (built("built"), 0, f"{ENGINE}: built here, computes what was exported"),
    "kept": (built("kept"), 0, f"{ENGINE}: built here before, computes what was exported"),
    "restored": (built("restored"), 0, f"{ENGINE}: back again, built here before, computes what was exported"),
    "wrong": (built("built", "NaN"), 1, NOT_IN_PLACE),
    "kept and wrong": (built("kept", "NaN"), 1, f"{ENGINE}: WRONG; do not deploy, remove {ENGINE.parent} and build"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_what_was_built_is_said_with_the_next_command(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, code, line = BUILDS[case]
    build_on_device = Mock(return_value=([], [build]))
    monkeypatch.setattr(load_script("verify"), "build_on_device", build_on_device)
    process = run_here("verify", "some/bundle", "--build", "--workspace", 64)
    assert process.returncode == code
    assert build_on_device.call_args.args[:2] == (Path("some/bundle"), EngineConfig(workspace_mib=64))
    _, row, *said = process.stdout.splitlines()
    assert row.startswith("tensorrt, built here  tensorrt 10.3.0") and ("NaN" in row) == bool(code) and " 5.0 " in row
    assert said[0].startswith(line)
    assert len(said) == (1 if code else 2) and (code or said[1].startswith("next: python scripts/evaluate.py"))
    process = run_here("verify", "some/bundle", "--build", "--json")
    record = json.loads(process.stdout)
    assert process.returncode == code and record["passed"] is not bool(code)
    assert record["rungs"][0]["file"] == str(ENGINE)


def test_an_engine_of_this_machine_as_it_was_is_to_be_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.trt.engine").write_bytes(b"plan")
    outdated = Rung("tensorrt, built here", "", "fp16", str(tmp_path / "model.trt.engine"), not_run="another GPU")
    monkeypatch.setattr(load_script("verify"), "verify_bundle", lambda *arguments: [outdated])
    process = run_here("verify", tmp_path)
    last = f"next: the same command with --build, for {outdated.file}"
    assert process.returncode == 0 and process.stdout.splitlines()[-1] == last


def test_the_signature_is_checked_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Mock(side_effect=ExportError("bundle.sig: not the signature of some/bundle"))
    monkeypatch.setattr(load_script("verify"), "check_signature", check)
    for name in ("verify_bundle", "build_on_device"):
        monkeypatch.setattr(load_script("verify"), name, Mock(side_effect=AssertionError("the bundle was read")))
    for flags in ([], ["--build"]):
        line = refusal(run_here("verify", "some/bundle", "--public-key", "key.pem", *flags))
        assert line == "bundle.sig: not the signature of some/bundle"
        check.assert_called_with(Path("some/bundle"), Path("key.pem"))
