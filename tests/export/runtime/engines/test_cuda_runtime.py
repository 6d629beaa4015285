"""The real CUDA bindings where there is no GPU, and what is made of what they answer."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from cuda.bindings import runtime as real_cuda

from export import ExportError, MissingDependency
from export.runtime.engines import cuda_runtime
from export.runtime.engines.cuda_runtime import checked, import_cuda, why_no_gpu

SUCCESS, NO_MEMORY = real_cuda.cudaError_t.cudaSuccess, real_cuda.cudaError_t.cudaErrorMemoryAllocation


def gpus() -> int:
    status, count = real_cuda.cudaGetDeviceCount()
    return 0 if status else count


@pytest.mark.skipif(gpus() > 0, reason="there is a GPU")
def test_without_a_gpu_every_call_is_a_refusal_of_one_line() -> None:
    cuda = import_cuda("tensorrt")
    assert why_no_gpu("tensorrt") == "no NVIDIA GPU here"
    for call in (
        lambda: cuda.cudaMalloc(16),
        lambda: cuda.cudaSetDevice(0),
        lambda: cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking),
        lambda: cuda.cudaEventCreate(),
    ):
        with pytest.raises(ExportError, match=r"^the GPU refuses: cudaError[A-Za-z]+$"):
            checked(call())


def test_a_status_is_looked_at_and_taken_off() -> None:
    assert checked((SUCCESS,)) == () and checked((SUCCESS, 7)) == 7 and checked((SUCCESS, 7, 8)) == (7, 8)
    with pytest.raises(ExportError, match=r"^the GPU refuses: cudaErrorMemoryAllocation$"):
        checked((NO_MEMORY, 0))


INSUFFICIENT = real_cuda.cudaError_t.cudaErrorInsufficientDriver
MACHINES = {
    "a GPU": ((SUCCESS, 13000), (SUCCESS, 2), ""),
    "no GPU": ((SUCCESS, 13000), (real_cuda.cudaError_t.cudaErrorNoDevice, None), "cudaErrorNoDevice"),
    "no GPU and no error": ((SUCCESS, 13000), (SUCCESS, 0), "no NVIDIA GPU here"),
    "old driver": ((SUCCESS, 11080), (INSUFFICIENT, None), "the NVIDIA driver, for CUDA 11, does not serve"),
    "no driver": ((SUCCESS, 0), (INSUFFICIENT, None), "no NVIDIA GPU here"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_what_is_said_of_a_machine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version, count, expected = MACHINES[case]
    fake = SimpleNamespace(cudaDriverGetVersion=lambda: version, cudaGetDeviceCount=lambda: count)
    monkeypatch.setattr(cuda_runtime, "import_cuda", lambda extra: fake)
    reason = why_no_gpu("tensorrt")
    assert expected in reason and bool(reason) == bool(expected)


def test_bindings_that_find_no_driver_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(cuda_runtime, "import_cuda", lambda extra: SimpleNamespace(cudaDriverGetVersion=fail))
    assert why_no_gpu("tensorrt") == "no NVIDIA GPU here"


@pytest.mark.parametrize("extra", ["tensorrt", "tensorrt-rtx"])
def test_missing_bindings_name_the_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # an import of it fails
    expected = rf"cuda.bindings is not installed; install it with: pip install -e '.\[{extra}\]'"
    with pytest.raises(MissingDependency, match=expected):
        import_cuda(extra)
    assert why_no_gpu(extra).startswith("cuda.bindings is not installed")
