"""Every refusal is one line, whatever it quotes, and says what is missing only where it is."""

from __future__ import annotations

import platform

import pytest

from export.base.errors import ExportError, MissingDependency


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("class 'a\nb'", r"class 'a\nb'"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\u2028b\u202e", r"a\u2028b\u202e"),
        ("größer ≤ 1 µs", "größer ≤ 1 µs"),
    ],
)
def test_what_cannot_be_printed_is_escaped(given: str, shown: str) -> None:
    assert str(ExportError(given)) == shown


ABSENT = ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
ERRORS: dict[str, tuple[str, ImportError, str]] = {
    "absent": ("tensorrt", ABSENT, "tensorrt is not installed; install it with: pip install -e '.[x]'"),
    "parent absent": ("cuda.bindings", ModuleNotFoundError(name="cuda"), "cuda.bindings is not installed; "),
    "library": (
        "tensorrt",
        ImportError("libnvinfer.so.10: cannot open shared object file: No such file or directory"),
        "tensorrt is installed but does not load: libnvinfer.so.10: cannot open shared object file: No such file or",
    ),
    "what it needs": (
        "onnxruntime",
        ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers"),
        "onnxruntime is installed but does not load: No module named 'flatbuffers'",
    ),
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
