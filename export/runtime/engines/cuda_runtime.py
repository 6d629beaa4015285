"""The CUDA runtime by NVIDIA's bindings, with every status looked at."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from export.base.errors import ExportError, MissingDependency


def import_cuda(extra: str) -> ModuleType:
    """Import the bindings of the CUDA runtime.

    Raises:
        MissingDependency: they are not installed; `extra` installs them.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingDependency("cuda.bindings", extra, error) from error
    module: ModuleType = runtime
    return module


def why_no_gpu(extra: str) -> str:
    """Why there is no NVIDIA GPU to use here, empty where there is one."""
    try:
        cuda = import_cuda(extra)
        (_, version), (status, count) = cuda.cudaDriverGetVersion(), cuda.cudaGetDeviceCount()
    except MissingDependency as error:
        return str(error)
    except RuntimeError:  # bindings that look for the driver's library themselves
        version = 0
    if not version:
        return "no NVIDIA GPU here"
    if status:
        return f"the NVIDIA driver, for CUDA {version // 1000}, does not serve: {status.name}"
    return "" if count else "no NVIDIA GPU here"


def gpu_name(extra: str) -> str:
    """The first GPU: `Orin, compute capability 8.7, 16 multiprocessors`, as one name is that of several products.

    Raises:
        MissingDependency: the bindings are not installed; `extra` installs them.
        ExportError: there is no GPU that serves.
    """
    properties = checked(import_cuda(extra).cudaGetDeviceProperties(0))
    name = properties.name.decode(errors="replace")
    capability = f"{properties.major}.{properties.minor}"
    return f"{name}, compute capability {capability}, {properties.multiProcessorCount} multiprocessors"


def compute_capability(extra: str) -> tuple[int, int]:
    """Of the first GPU, such as (8, 7); raises as `gpu_name` does."""
    properties = checked(import_cuda(extra).cudaGetDeviceProperties(0))
    return properties.major, properties.minor


def checked(outcome: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime returned beside its status: nothing, one value or several.

    Raises:
        ExportError: the call failed; names the error.
    """
    status, *values = outcome
    if status:
        raise ExportError(f"the GPU refuses: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
