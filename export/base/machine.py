"""What figures depend on: the machine and the versions of what ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "triton", "numpy")


def installed_version(package: str) -> str:
    """What is installed, with its build: `2.14.1+cu130` where that is what torch.__version__ says.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    distribution = importlib.metadata.distribution(package)
    if package == "torch":  # on PyPI its metadata leave the build out, which it writes into this file
        stated = Path(str(distribution.locate_file("torch/version.py")))
        found = re.search(r"^__version__ = '(.+)'$", stated.read_text(), re.MULTILINE) if stated.is_file() else None
        if found is not None:
            return found[1]
    return distribution.version


def installed_versions() -> dict[str, str]:
    """Of those of PACKAGES that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = installed_version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine(gpu: str | None) -> dict[str, Any]:
    """What to write beside figures.

    Args:
        gpu: the name of the GPU that was used, None where none was.
    """
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        **installed_versions(),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """What `describe_machine` found, for a person."""
    versions = [f"{package} {facts[package]}" for package in PACKAGES if package in facts]
    return ", ".join([*filter(None, [facts["gpu"]]), f"{facts['cpu']}, {facts['cpus']} CPUs", *versions])


def cpu_has(feature: str) -> bool:
    """Whether Linux lists it among the features of this CPU, as `amx_int8`; False on other systems."""
    return feature in _cpu_fact("flags").split()


def _cpu_name() -> str:
    """As Linux calls it, else as Python does."""
    return _cpu_fact("model name") or platform.processor() or platform.machine()


def _cpu_fact(key: str) -> str:
    """What Linux says of the first CPU, empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
