"""What is made of what the CUDA bindings answer; where there is no GPU, test_runner.py asks the real ones."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import Mock

import pytest
from cuda.bindings import runtime as real_cuda

from export import ExportError, MissingDependency
from export.runtime.engines import cuda_runtime
from export.runtime.engines.cuda_runtime import checked, import_cuda, why_no_gpu

SUCCESS, NO_MEMORY = real_cuda.cudaError_t.cudaSuccess, real_cuda.cudaError_t.cudaErrorMemoryAllocation


def test_a_status_is_looked_at_and_taken_off() -> None:
    assert checked((SUCCESS,)) == () and checked((SUCCESS, 7)) == 7 and checked((SUCCESS, 7, 8)) == (7, 8)
    with pytest.raises(ExportError, match=r"^the GPU refuses: cudaErrorMemoryAllocation$"):
        checked((NO_MEMORY, 0))


INSUFFICIENT = real_cuda.cudaError_t.cudaErrorInsufficientDriver
MACHINES: dict[str, tuple[Any, Any, str]] = {
    "a GPU": ((SUCCESS, 13000), (SUCCESS, 2), ""),
    "no GPU": ((SUCCESS, 13000), (real_cuda.cudaError_t.cudaErrorNoDevice, None), "cudaErrorNoDevice"),
    "no GPU and no error": ((SUCCESS, 13000), (SUCCESS, 0), "no NVIDIA GPU here"),
    "old driver": ((SUCCESS, 11080), (INSUFFICIENT, None), "the NVIDIA driver, for CUDA 11, does not serve"),
    "no library of the driver": (RuntimeError("Failed to dlopen libcuda.so.1"), None, "no NVIDIA GPU here"),
    "no driver": ((SUCCESS, 0), (INSUFFICIENT, None), "no NVIDIA GPU here"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_what_is_said_of_a_machine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version, count, expected = MACHINES[case]
    fake = Mock(**{"cudaDriverGetVersion.side_effect": [version], "cudaGetDeviceCount.return_value": count})
    monkeypatch.setattr(cuda_runtime, "import_cuda", lambda extra: fake)
    reason = why_no_gpu("tensorrt")
    assert expected in reason and bool(reason) == bool(expected)


@pytest.mark.parametrize("extra", ["tensorrt", "tensorrt-rtx"])
def test_missing_bindings_name_the_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # an import of it fails
    expected = rf"cuda.bindings is not installed; install it with: pip install -e '.\[{extra}\]'"
    with pytest.raises(MissingDependency, match=expected):
        import_cuda(extra)
    assert why_no_gpu(extra).startswith("cuda.bindings is not installed")
