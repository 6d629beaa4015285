"""TensorRT's runtime and CUDA's on numpy: device memory is host memory, and misuse is an error as on a device.

The module stands in for `tensorrt`; a test holds its public names against those of the real package. The network it
"runs" sums every channel of its inputs. Plans are JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from cuda.bindings import runtime as real_cuda
from numpy.typing import NDArray
from tensorrt_rtx import DataType, ILogger, TensorIOMode  # these need no device

from export.runtime.engines.engine import FLAVOURS, Flavour
from export.runtime.engines.options import EngineConfig
from export.runtime.engines.run_worker import DeviceEngine

__all__ = ["DataType", "ILogger", "TensorIOMode"]
__version__ = "10.3.0"

FLAVOUR = replace(FLAVOURS["tensorrt"], module=__name__)


def plan(
    smallest: int = 1,
    largest: int = 8,
    behaviour: str = "",
    outputs: dict[str, str] | None = None,
    inputs: dict[str, tuple[int, ...]] | None = None,
    kind: str = "FLOAT",
) -> bytes:
    """A plan for inputs [N, 3, 4, 4] of a `kind`.

    `behaviour`: `crash`, `fails`, `silent` (writes nothing) or `no context`.
    """
    record = {"batch": [smallest, largest], "behaviour": behaviour, "outputs": outputs or {"output": "FLOAT"}}
    return json.dumps({**record, "inputs": inputs or {"input": (3, 4, 4)}, "kind": kind}).encode()


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 3, 4, 4)).astype(np.float32)


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False
        self.DLA_core = -1

    def deserialize_cuda_engine(self, content: bytes) -> ICudaEngine | None:
        try:
            return ICudaEngine(json.loads(content), self)
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "bad magic\nsecond line")
            return None


class ICudaEngine:
    def __init__(self, record: dict[str, Any], runtime: Runtime) -> None:
        self._record, self._runtime = record, runtime
        self._names = [*record["outputs"], *record["inputs"]]

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._record["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return getattr(DataType, self._record["outputs"].get(name, self._record["kind"]))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        smallest, largest = self._record["batch"]
        return [(size, *self._record["inputs"][name]) for size in (smallest, largest, largest)]

    def create_execution_context(self, config: object = None) -> IExecutionContext | None:
        self.config = config
        return None if self._record["behaviour"] == "no context" else IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._record = engine, engine._record
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self._record["inputs"]
        smallest, largest = self._record["batch"]
        self._shapes[name] = shape
        return smallest <= shape[0] <= largest

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name) or self._output

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._record["behaviour"] == "crash":
            os.abort()
        if self._record["behaviour"] == "fails":
            return False
        assert self._addresses.keys() == {*self._shapes, *self._record["outputs"]}
        if self._record["behaviour"] != "silent":
            present.submit(stream_handle, self._run)
        return True

    @property
    def _output(self) -> tuple[int, ...]:
        assert self._shapes.keys() == self._record["inputs"].keys()
        return next(iter(self._shapes.values()))[:2]

    def _run(self) -> None:
        kind = np.dtype({"FLOAT": np.float32, "UINT8": np.uint8}[self._record["kind"]])
        found = [present.view(self._addresses[n], kind, s) for n, s in self._shapes.items()]
        total = sum(x.sum(axis=tuple(range(2, x.ndim))) for x in found)
        for name, kind in self._record["outputs"].items():
            dtype = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}[kind]
            present.view(self._addresses[name], np.dtype(dtype), self._output)[...] = total


class FakeCuda:
    """The calls of `cuda.bindings.runtime` that an engine needs; work is done at once, unless it is being recorded."""

    cudaMemcpyKind = real_cuda.cudaMemcpyKind
    cudaStreamCaptureMode = real_cuda.cudaStreamCaptureMode
    cudaStreamNonBlocking = real_cuda.cudaStreamNonBlocking

    def __init__(self, memory: int = 2**20) -> None:
        self.free = memory
        self.driver = 12060
        self.properties = SimpleNamespace(name=b"Orin", major=8, minor=7, multiProcessorCount=16)
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.live: set[int] = set()
        self.recording: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.events: dict[int, int] = {}
        self.launches = self.clock = 0
        self._next = 1000

    def submit(self, stream: int, work: Callable[[], object]) -> None:
        assert stream in self.live and stream != 0
        if self.recording is None:
            self.clock += 1
            work()
        else:
            self.recording.append(work)

    def view(self, address: int, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
        size = int(np.prod(shape)) * dtype.itemsize
        return self.memory[address][:size].view(dtype).reshape(shape)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self._done(self.driver)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._done(1)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        assert device == 0
        return self._done(self.properties)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return self._done() if device == 0 else (real_cuda.cudaError_t.cudaErrorInvalidDevice,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self.free:
            return real_cuda.cudaError_t.cudaErrorMemoryAllocation, None
        self.free -= size
        buffer = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        self.memory[buffer.ctypes.data] = buffer
        return self._done(buffer.ctypes.data)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.free += self.memory.pop(address).nbytes
        return self._done()

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any, ...]:
        device = target if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        if device not in self.memory or size > self.memory[device].nbytes:
            return (real_cuda.cudaError_t.cudaErrorInvalidValue,)
        self.submit(int(stream), lambda: ctypes.memmove(target, source, size))
        return self._done()

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        self.submit(int(stream), lambda: self.memory[address][:size].fill(value))
        return self._done()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._done(self._handle()) if flags == self.cudaStreamNonBlocking else self._done(0)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert stream in self.live and self.recording is None
        return self._done()

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        assert stream in self.live and mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.recording = []
        return self._done()

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        work, self.recording = self.recording, None
        assert work is not None and stream in self.live
        graph = self._handle()
        self.graphs[graph] = work
        return self._done(graph)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        executable = self._handle()
        self.graphs[executable] = self.graphs[graph]
        return self._done(executable)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        assert graph in self.live
        self.launches += 1
        for work in self.graphs[graph]:
            self.submit(stream, work)
        return self._done()

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return self._done(self._handle())

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        assert {event, stream} <= self.live
        self.events[event] = self.clock
        return self._done()

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, ...]:
        return self._done(float(self.events[end] - self.events[start]))

    def _done(self, *values: Any) -> tuple[Any, ...]:
        return (real_cuda.cudaError_t.cudaSuccess, *values)

    def _handle(self) -> int:
        self._next += 1
        self.live.add(self._next)
        return self._next

    def cudaStreamDestroy(self, handle: int) -> tuple[Any, ...]:
        self.live.remove(handle)
        return self._done()

    cudaGraphDestroy = cudaGraphExecDestroy = cudaEventDestroy = cudaStreamDestroy


present = FakeCuda()
IMPORT_CUDA = "export.runtime.engines.run_worker.import_cuda"


@contextmanager
def device(memory: int = 2**20) -> Iterator[FakeCuda]:
    """A CUDA device for what is loaded inside."""
    with mock.patch(f"{__name__}.present", FakeCuda(memory)) as cuda, mock.patch(IMPORT_CUDA, lambda extra: cuda):
        yield cuda


def device_engine(
    flavour: Flavour, content: bytes, config: EngineConfig, inputs: tuple[str, ...], names: tuple[str, ...]
) -> DeviceEngine:
    """A DeviceEngine for a process of its own, which ends with its device."""
    mock.patch(IMPORT_CUDA, lambda extra: present).start()
    return DeviceEngine(flavour, content, config, inputs, names)
