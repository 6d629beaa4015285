"""How engines are built: values that make no sense, and what each flavour does not take."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from export import Batch, ExportConfig, ExportError
from export.base.errors import MissingDependency
from export.config import choose_flavours
from export.runtime.engines import engine as tensorrt_engine
from export.runtime.engines.options import DEFAULT_ENGINE, TARGETS, EngineConfig
from export.terminal.flags import in_flags

STATIC, DYNAMIC = Batch(8, 8, 8), Batch(1, 8, 32)

NONSENSE: Mapping[str, tuple[dict[str, Any], str]] = {
    "no workspace": ({"workspace_mib": 0}, "--workspace: expected at least 1 MiB, got 0"),
    "Orin after an RTX": ({"targets": ("sm_86", "sm_87")}, "got 'sm_87'"),
    "twice": ({"targets": ("sm_86", "sm_86")}, "expected each GPU once, got sm_86 sm_86"),
    "core -1": ({"dla_core": -1}, "--dla: expected the number of a core, 0 or more, got -1"),
    "folder": ({"timing_cache": Path("/")}, "--timing-cache: expected a file in a folder that exists, got /"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_one_line(case: str) -> None:
    values, expected = NONSENSE[case]
    with pytest.raises(ExportError) as error:
        EngineConfig(**values)
    assert expected in in_flags(str(error.value)) and "\n" not in str(error.value)


REFUSED: Mapping[str, tuple[str, dict[str, Any], str, Batch, str]] = {
    "level": ("tensorrt-rtx", {"optimization_level": 0}, "fp16", DYNAMIC, "does not take --optimization-level"),
    "bf16 on Turing": ("tensorrt-rtx", {"targets": TARGETS}, "bf16", DYNAMIC,
                       "--targets: sm_75 has no bfloat16; leave it out, or --fp16"),
    "cache": ("tensorrt-rtx", {"timing_cache": Path("/c")}, "fp16", DYNAMIC, "does not take --timing-cache"),
    "several": ("tensorrt-rtx", {"hardware_compatible": True, "dla_core": 0}, "fp16", STATIC,
                "does not take --hardware-compatible, --dla; it takes --workspace, --targets"),
    "fp32 on DLA": ("tensorrt", {"dla_core": 0}, "fp32", STATIC, "--dla: expected --fp16 or --int8, got --fp32"),
    "batches on DLA": ("tensorrt", {"dla_core": 0}, "fp16", DYNAMIC,
                       "--dla: expected a static batch, such as --batch 8, got --batch 1:8:32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_flavour_does_not_take(case: str) -> None:
    flavour, values, precision, batch, expected = REFUSED[case]
    assert expected in in_flags(EngineConfig(**values).why_not(flavour, precision, batch))


def test_engines_for_other_gpus_are_not_built_on_jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(hardware_compatible=True)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "not built on Jetson or aarch64" in config.why_not("tensorrt", "fp16", DYNAMIC)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert not config.why_not("tensorrt", "fp16", DYNAMIC)


TAKEN: Mapping[str, tuple[str, dict[str, Any]]] = {
    "all of RTX": ("tensorrt-rtx", {"workspace_mib": 64, "targets": TARGETS}),
    "most of the full one": ("tensorrt", {"workspace_mib": 1, "optimization_level": 5, "timing_cache": Path("/c"),
                                          "version_compatible": True, "dla_core": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_a_flavour_takes(case: str) -> None:
    flavour, values = TAKEN[case]
    config = EngineConfig(**values)
    assert config.why_not(flavour, "fp16", STATIC) == "" and len(config.given) == len(values)


def test_json_keeps_what_matters_after_the_build() -> None:
    config = EngineConfig(64, 0, Path("/cache"), True, False, ("sm_86",), 0)
    record = json.loads(json.dumps(config.to_json()))
    assert "timing_cache" not in record and "/cache" not in json.dumps(record)
    assert EngineConfig.from_json(record) == EngineConfig(64, 0, None, True, False, ("sm_86",), 0)
    assert DEFAULT_ENGINE.to_json() == {} and EngineConfig.from_json({}) == DEFAULT_ENGINE
    with pytest.raises(TypeError):
        EngineConfig.from_json({"speed": "high"})


def test_kernels_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.config.find_spec", lambda name: None)
    assert ExportConfig("fp16").kernels == ()
    with pytest.raises(MissingDependency, match="triton is not installed"):
        ExportConfig("fp16", kernels=("sm_87",))


CHOICES: Mapping[str, tuple[str, dict[str, Any], str, list[str] | str]] = {
    "both": ("auto", {}, "", ["tensorrt", "tensorrt-rtx"]),
    "one is not installed": ("auto", {"workspace_mib": 64}, "tensorrt", ["tensorrt-rtx"]),
    "only RTX takes it": ("auto", {"targets": ("sm_86",)}, "", ["tensorrt-rtx"]),
    "only the full one takes it": ("auto", {"version_compatible": True}, "", ["tensorrt"]),
    "the one that takes it is not installed": (
        "auto", {"version_compatible": True}, "tensorrt",
        "--engine tensorrt: not here; --engine tensorrt-rtx: does not take --version-compatible",
    ),
    "asked of one not installed": ("tensorrt", {}, "tensorrt", "--engine tensorrt: not here"),
    "none": ("none", {}, "", []),
    "none can be built": ("auto", {}, "tensorrt tensorrt-rtx", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_which_engines_are_built(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, values, absent, expected = CHOICES[case]

    def why_not_buildable(flavour: tensorrt_engine.Flavour, dla_core: int | None) -> str:
        return "not here" if flavour.name in absent.split() else ""

    monkeypatch.setattr("export.config.why_not_buildable", why_not_buildable)
    config = ExportConfig("fp16", DYNAMIC, engine, EngineConfig(**values))
    if isinstance(expected, str):
        with pytest.raises(ExportError) as error:
            choose_flavours(config)
        assert in_flags(str(error.value)).startswith(expected)
    else:
        flavours, skipped = choose_flavours(config)
        names = [flavour.name for flavour in flavours]
        assert names == expected
        assert set(names) | set(skipped) == ({"tensorrt", "tensorrt-rtx"} if engine == "auto" else set())
        assert all(skipped.values())
