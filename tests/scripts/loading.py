"""The scripts as a user runs them: as modules in this process, which is quick, or in one of their own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests import children

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


def run_here(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What a script says and its exit code, in this process; what it sets for the process is put back."""
    out, err, level = io.StringIO(), io.StringIO(), logging.getLogger("resnet").level
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = load_script(script).main([*map(str, arguments)])
        except SystemExit as stopped:  # argparse exits by itself
            code = stopped.code
    logging.getLogger("resnet").setLevel(level)
    assert isinstance(code, int)
    return subprocess.CompletedProcess([script], code, out.getvalue(), err.getvalue())


def start(script: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """A script that has just begun in a process of its own, in the folder `cwd`, with more in its environment."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
    return children.start(command, cwd=cwd, env={**os.environ, **environment})


def run(script: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same, run to its end."""
    return children.finish(start(script, *arguments, cwd=cwd, **environment))


def refusal(process: subprocess.CompletedProcess[str]) -> str:
    """The one line, beside those about progress, of a script that refused: exit code 2 and nothing on stdout."""
    (line,) = (line for line in process.stderr.splitlines() if " s  " not in line)
    script = Path(process.args[-1] if len(process.args) == 1 else process.args[1]).stem
    assert process.returncode == 2 and process.stdout == "", process.stderr
    assert line.startswith(f"{script}.py: error: ")
    return line.removeprefix(f"{script}.py: error: ")
