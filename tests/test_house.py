"""The house: which room may import which, and that what runs on a device does without PyTorch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.children import run

ROOT = Path(__file__).resolve().parents[1]

# Room -> the rooms it may import, beside itself. A module's room is the longest of these names that it begins with.
_RUNTIME = (
    *("export.runtime.build", "export.runtime.verify", "export.runtime.serving"),
    *("export.runtime.artefacts", "export.runtime.engine_store"),
    *("export.runtime.bundle", "export.runtime.engines", "export.runtime.parity"),
    *("export.runtime.openvino_session", "export.runtime.onnx_session", "export.runtime.onnx_wire"),
    "export.runtime.runner",
)
_OPERATORS = ("kernels.problems", "kernels.rounding", "kernels.operators")
_LOWER = ("export.fusion", *_RUNTIME, "export.base", "kernels", *_OPERATORS)
_KERNELS = ("kernels.plan", "kernels.configs", "kernels.jit", "kernels.problems")
_FLOORS = ("kernels.configs", "kernels.problems")
_ENGINES = ("kernels.between", "kernels.compile", "kernels.emulator", "kernels.oracle", *_KERNELS)
_STATES = ("resnet.weights", "resnet.model_card", "resnet.initialise")
_NETWORKS = ("resnet.models", "resnet.data", "resnet.errors")
RULE: dict[str, tuple[str, ...]] = {
    "export": (
        *("export.criteria", "export.report", "export.lowering", "export.quantisation", *_LOWER),
        *("kernels.configs", "kernels.compile", "kernels.launch"),
    ),
    "export.benchmark": ("export.criteria", "export.lowering", "export.quantisation", *_LOWER, "kernels.launch"),
    "export.criteria": ("export.lowering", "export.quantisation", *_LOWER, "kernels.emulator"),
    "export.lowering": (*_LOWER, "kernels.launch", *_ENGINES),
    "export.quantisation": _LOWER,
    "export.fusion": ("export.base", "kernels", *_OPERATORS),
    "export.report": (*_RUNTIME, "export.base"),
    "export.terminal": (*_RUNTIME, "export.base"),
    **{room: (*_RUNTIME[index + 1 :], "export.base") for index, room in enumerate(_RUNTIME)},
    "export.base": (),
    "kernels": ("kernels.operators",),
    "kernels.between": ("kernels.configs", *_OPERATORS),
    "kernels.emulator": (),
    "kernels.compile": (*_KERNELS, "kernels.prediction", "kernels.workers"),
    "kernels.workers": (),
    "kernels.prediction": _FLOORS,
    "kernels.launch": (*_KERNELS, "kernels.operators"),
    "kernels.plan": _KERNELS[1:],
    "kernels.configs": ("kernels.problems",),
    "kernels.oracle": _OPERATORS,
    # How an operator's kernel is launched lies beside it; launch is what a call on a GPU imports, and nothing before.
    "kernels.operators": ("kernels.configs", "kernels.problems", "kernels.rounding", "kernels.launch"),
    "kernels.rounding": (),
    "kernels.jit": (),
    "kernels.problems": (),
    "resnet.training": (*_STATES, *_NETWORKS),
    **dict.fromkeys(_STATES, _NETWORKS),
    **dict.fromkeys(("resnet.pretrained", "resnet.models", "resnet.data"), ("resnet.errors",)),
    "resnet.errors": (),
}
WITHOUT_TORCH = (
    *("export.base", "export.runtime", "export.report", "export.terminal", "export.quantisation.methods"),
    *("resnet.data", "resnet.errors", "resnet.training.settings"),
)
HIDDEN = ("torch", "triton", "onnxscript")


def modules() -> Iterator[tuple[str, Path]]:
    for top in ("export", "kernels", "resnet"):
        for path in sorted((ROOT / top).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


NAMES = {name for name, _ in modules()}


def room(module: str) -> str:
    return max((name for name in RULE if f"{module}.".startswith(f"{name}.")), key=len)


def imported(path: Path) -> Iterator[str]:
    """The modules of the project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module in NAMES:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
            yield from below or {node.module}


@pytest.mark.parametrize(("module", "path"), [*modules()], ids=lambda value: value if isinstance(value, str) else "")
def test_a_room_imports_those_below_it(module: str, path: Path) -> None:
    if path.name == "__init__.py" and module in ("export", "resnet"):
        return  # the public face imports what is asked for
    own = room(module)
    above = {f"{name} ({room(name)})" for name in imported(path) if room(name) not in (own, *RULE[own])}
    assert not above, f"{module} ({own}) imports {', '.join(sorted(above))}"


def test_rooms_of_the_device_do_without_pytorch() -> None:
    wanted = [name for name in sorted(NAMES) if name.startswith(WITHOUT_TORCH)]
    assert len(wanted) > 30
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({HIDDEN}))\n"  # None: an import of it fails
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {wanted}: importlib.import_module(name)"
    )
    outcome = run([sys.executable, "-I", "-c", code])
    assert not outcome.returncode, outcome.stderr[-2000:]
