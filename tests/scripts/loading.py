"""The scripts as modules, in this process: starting one for each refusal would take longer than the refusals."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def load_script(name: str) -> ModuleType:
    """scripts/<name>.py, loaded once and not run; sys.path is then as it was."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module, path = importlib.util.module_from_spec(spec), sys.path.copy()
    sys.modules[spec.name] = module  # where its dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def exit_code(script: str, *arguments: object) -> int | str | None:
    """Of the script's main, called in this process; argparse exits by itself."""
    try:
        code: int = load_script(script).main([*map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code
    return code
