"""Every refusal is one line, whatever it quotes, and says what is missing only where it is."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from export.base import errors
from export.base.errors import ExportError, MissingDependency


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a\nb", r"a\nb"), ("\x1b[31m", r"\x1b[31m"), ("\u2028b\u202e", r"\u2028b\u202e"), ("größer ≤ µ", "größer ≤ µ")],
)
def test_what_cannot_be_printed_is_escaped(given: str, shown: str) -> None:
    assert str(ExportError(given)) == shown


ABSENT = ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
ERRORS: dict[str, tuple[str, ImportError, str]] = {
    "absent": ("tensorrt", ABSENT, "tensorrt is not installed; install it with: pip install -e '.[x]'"),
    "parent absent": ("cuda.bindings", ModuleNotFoundError(name="cuda"), "cuda.bindings is not installed; "),
    "library": ("tensorrt", ImportError("libnvinfer.so"), "tensorrt is installed but does not load: libnvinfer.so"),
    "what it needs": ("x", ModuleNotFoundError("no y", name="y"), "x is installed but does not load: no y"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_installed_is_not_called_absent(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, error, expected = ERRORS[case]
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert str(MissingDependency(package, "x", error)).startswith(expected)


def test_a_jetson_is_sent_to_its_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    advice = "tensorrt is not installed; docs/deploy.md has the command for a Jetson"
    assert str(MissingDependency("tensorrt", "tensorrt", ABSENT)) == advice


def test_advice_fits_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a wheel was installed there is no checkout that `.` could be."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "install -e '.[ray]'" in str(MissingDependency("ray", "ray", ModuleNotFoundError(name="ray")))
    monkeypatch.setattr(errors, "_ROOT", tmp_path)
    message = "ray is not installed; install it with: pip install 'resnet-deploy[ray]'"
    assert str(MissingDependency("ray", "ray", ModuleNotFoundError(name="ray"))) == message
