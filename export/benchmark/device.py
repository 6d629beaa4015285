"""The GPU of this machine, and whether the kernels can run on it."""

from __future__ import annotations

import subprocess
import warnings
from typing import Any

import torch

from export.base.errors import ExportError, first_line
from export.base.machine import describe_machine

_ASKED = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
_SECONDS = 20.0


def describe_gpu() -> dict[str, Any]:
    """The machine with its GPU, for JSON. To be run in a process of its own, which then holds no memory of the GPU.

    Raises:
        ExportError: there is none that the kernels run on; says what is missing.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = "is built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} finds none"
        reason = f" ({first_line(Warning(said[0].message))})" if said else ""  # such as of a driver that is too old
        raise ExportError(f"no NVIDIA GPU here: torch {torch.__version__} {why}{reason}")
    from kernels.launch import target_of

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        target = target_of(device)
    except ValueError as error:  # an older GPU
        raise ExportError(str(error)) from error
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks some
    return {
        **describe_machine(properties.name),
        "target": target.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
    }


def _driver() -> str:
    """Its version, highest clocks and power limit as nvidia-smi says them; empty where there is no such program."""
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.partition("\n")[0].strip()
