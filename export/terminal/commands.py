"""The programs of this project, and what a person types to run one: as a file, or through the console script."""

from __future__ import annotations

import sys

CONSOLE_SCRIPT = "resnet-deploy"
PACKAGE = "resnet_deploy"  # what scripts/ is called where it is installed
# Subcommand of the console script -> file in scripts/.
SCRIPTS = {
    "export": "export.py",
    "verify": "verify.py",
    "evaluate": "evaluate.py",
    "classify": "classify.py",
    "serve-config": "serve_config.py",
    "convert": "convert.py",
    "benchmark": "benchmark.py",
    "train": "train.py",
    "compile": "compile_kernels.py",
    "tune": "tune.py",
    "gpu": "gpu.py",
}


def program(command: str) -> str:
    """What a command calls itself in its messages: `verify.py`, or `resnet-deploy verify`."""
    return f"{CONSOLE_SCRIPT} {command}" if _installed() else SCRIPTS[command]


def typed(command: str) -> str:
    """How to run a command in the way that this process was run: `python scripts/verify.py`, `resnet-deploy verify`."""
    return f"{CONSOLE_SCRIPT} {command}" if _installed() else f"python scripts/{SCRIPTS[command]}"


def _installed() -> bool:
    """Whether what runs is a module of the installed package, as the console script starts it, and not a file."""
    return getattr(sys.modules["__main__"], "__package__", None) == PACKAGE
