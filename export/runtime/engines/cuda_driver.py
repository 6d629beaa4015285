"""The CUDA driver by NVIDIA's bindings, which need no toolkit, with every status looked at and said in words."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from export.base.errors import ExportError, MissingDependency, first_line

EXTRA = "kernels"  # of this project, which installs the bindings

# What a person can do about it, by the name of the error.
_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "its memory is full; end what else uses it, or export a smaller largest batch",
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU here",
    "CUDA_ERROR_STUB_LIBRARY": "libcuda.so.1 is the toolkit's stub; take its folder out of LD_LIBRARY_PATH",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has the GPU for itself",
    "CUDA_ERROR_INVALID_DEVICE": "no such GPU here",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "its kernel module and its library are of different versions; start it anew",
    "CUDA_ERROR_SYSTEM_NOT_READY": "its services are not running",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the file is for another GPU; export it for this one",
    "CUDA_ERROR_INVALID_IMAGE": "the file's machine code is not what this driver reads; update the driver",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the file is newer than the driver; update the driver",
    "CUDA_ERROR_NOT_FOUND": "the file's machine code lacks what its plan names; export it again",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "a kernel needs more registers or shared memory than this GPU has",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel left its memory; check the bundle with verify.py, export it again",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "a kernel left its memory; check the bundle with verify.py, export it again",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel failed; check the bundle with verify.py, export it again",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "a kernel took too long for a GPU that has a screen",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "its memory has a fault; reset it, or start the machine anew",
    "CUDA_ERROR_OPERATING_SYSTEM": "the system refuses it; may this user open /dev/nvidia* or /dev/nvgpu?",
}


def import_driver() -> ModuleType:
    """Import the bindings of the CUDA driver.

    Raises:
        MissingDependency: they are not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependency("cuda.bindings", EXTRA, error) from error
    module: ModuleType = driver
    return module


def start_driver() -> ModuleType:
    """The bindings once the driver serves.

    Raises:
        MissingDependency: they are not installed.
        ExportError: there is no driver, or it does not serve.
    """
    cuda = import_driver()
    try:
        checked(cuda.cuInit(0))
    except ExportError:
        raise
    except RuntimeError as error:  # of the bindings, which look for the driver's library themselves
        raise ExportError(f"no NVIDIA driver here ({first_line(error)})") from error
    return cuda


def checked(outcome: tuple[Any, ...]) -> Any:
    """What a call of the driver returned beside its status: nothing, one value or several.

    Raises:
        ExportError: the call failed; names the error and what to do about it.
    """
    status, *values = outcome
    if status:
        advice = _ADVICE.get(status.name)
        raise ExportError(f"the GPU's driver refuses: {status.name}{f': {advice}' if advice else ''}")
    return values[0] if len(values) == 1 else tuple(values)
