"""An engine on the first CUDA device, for the process that `export.runtime.engines.runner` starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Inputs
from export.base.errors import ExportError
from export.runtime.engines.cuda_runtime import checked, import_cuda
from export.runtime.engines.engine import Flavour, import_flavour
from export.runtime.engines.loader import load_engine, make_logger
from export.runtime.engines.options import EngineConfig

_POISON = 0xFF  # NaN in every floating-point type: what is not written is noticed
_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
_INPUTS = ("FLOAT", "UINT8")  # float32 of a network, bytes of pictures


class DeviceEngine:
    """A loaded engine with its stream, and what the present shapes of its inputs need."""

    def __init__(
        self, flavour: Flavour, plan: bytes, config: EngineConfig, inputs: tuple[str, ...], names: tuple[str, ...]
    ) -> None:
        """Load a plan.

        Args:
            plan: built by the installed version of `flavour` with `config`.
            inputs: their names.
            names: the outputs to return, in order.

        Raises:
            ExportError: there is no device, the plan does not load on it, or it has other inputs or no such output.
        """
        self._trt, self._cuda = import_flavour(flavour), import_cuda(flavour.name)
        self._logger = make_logger(self._trt)
        self._names, self._on_gpu = names, config.dla_core is None
        self._shape: _Shape | None = None
        checked(self._cuda.cudaSetDevice(0))
        self._stream = checked(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
        self._runtime, self._engine = load_engine(self._trt, self._logger, plan, config)
        every = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._outputs = [n for n in every if self._engine.get_tensor_mode(n) == self._trt.TensorIOMode.OUTPUT]
        if not set(names) <= set(self._outputs) or set(every) - set(self._outputs) != set(inputs):
            expected = f"{', '.join(inputs)} and {', '.join(names)}"
            raise ExportError(f"the engine has {', '.join(every)}: expected {expected}")

    def infer(self, inputs: Inputs) -> Arrays:
        """Run one batch: {input name: [N, ...]} -> {output name: array}, float32 or wider.

        Raises:
            ExportError: the engine does not take these types or shapes, or the device fails.
        """
        shape = self._prepared(inputs)
        shape.load(inputs)
        shape.poison()
        shape.step()
        return shape.results(self._names)

    def time(self, inputs: Inputs, count: int) -> list[float]:
        """Seconds of each of `count` runs on one batch, by CUDA events, each behind a run that does not count.

        While the device is busy with that one, the timed one is launched: its time is the device's.
        """
        shape, cuda, stream = self._prepared(inputs), self._cuda, self._stream
        shape.load(inputs)
        events = [(checked(cuda.cudaEventCreate()), checked(cuda.cudaEventCreate())) for _ in range(count)]
        try:
            for start, end in events:
                shape.step()
                checked(cuda.cudaEventRecord(start, stream))
                shape.step()
                checked(cuda.cudaEventRecord(end, stream))
            checked(cuda.cudaStreamSynchronize(stream))
            return [checked(cuda.cudaEventElapsedTime(start, end)) / 1e3 for start, end in events]
        finally:
            for event in (event for pair in events for event in pair):
                cuda.cudaEventDestroy(event)

    def close(self) -> None:
        """Give everything on the device back."""
        if self._shape is not None:
            self._shape.close()
        self._shape = self._engine = self._runtime = None
        checked(self._cuda.cudaStreamDestroy(self._stream))

    def _prepared(self, inputs: Inputs) -> _Shape:
        """What the shapes of `inputs` need: those of one batch at a time, since memory is short where engines run."""
        for name, x in inputs.items():
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in _INPUTS or x.dtype != _TYPES[kind]:
                wanted = " or ".join(f"{known} for {np.dtype(_TYPES[known])}" for known in _INPUTS)
                raise ExportError(f"the engine's {name} is {kind}, got {x.dtype}: expected {wanted}")
            smallest, _, largest = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))
            if len(x.shape) != len(smallest) or not all(
                low <= size <= high for low, size, high in zip(smallest, x.shape, largest, strict=True)
            ):
                what = "inputs" if len(inputs) == 1 else name
                raise ExportError(f"the engine takes {what} of shape {smallest} to {largest}, got {x.shape}")
        shapes = {name: x.shape for name, x in inputs.items()}
        if self._shape is None or self._shape.shapes != shapes:
            if self._shape is not None:
                self._shape.close()
                self._shape = None
            self._shape = _Shape(self._trt, self._cuda, self._engine, self._stream, shapes, self._outputs)
            self._shape.prepare(self._logger, self._on_gpu)
        return self._shape


class _Shape:
    """Execution context, device memory and CUDA graph for inputs of one shape each."""

    def __init__(
        self, trt: Any, cuda: Any, engine: Any, stream: Any, shapes: Mapping[str, tuple[int, ...]], outputs: list[str]
    ) -> None:
        self.shapes = shapes
        self._trt, self._cuda, self._engine, self._stream, self._outputs = trt, cuda, engine, stream, outputs
        self._memory: dict[str, int] = {}
        self._arrays: Arrays = {}
        self._graph: Any = None
        self._context: Any = None
        self.step: Callable[[], None] = self._enqueue

    def prepare(self, logger: Any, record: bool) -> None:
        """Allocate and run once; `record`: as a CUDA graph from then on.

        Raises:
            ExportError: memory is short, or the engine does not run.
        """
        try:
            self._context = self._make_context()
            for name, shape in self.shapes.items():
                if self._context is None or not self._context.set_input_shape(name, shape):
                    raise ExportError(f"the engine takes no {name} of shape {shape}: {logger.last_error}")
            for name in (*self.shapes, *self._outputs):
                self._allocate(name)
            for name in self.shapes:
                self._copy(name, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
            self._enqueue()  # what is made on the first run must not be recorded
            checked(self._cuda.cudaStreamSynchronize(self._stream))
            if record and not hasattr(self._trt, "CudaGraphStrategy"):
                self._record()
        except BaseException:
            self.close()
            raise

    def load(self, inputs: Inputs) -> None:
        for name, x in inputs.items():
            np.copyto(self._arrays[name], x)
            self._copy(name, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def poison(self) -> None:
        for name in self._outputs:
            size = self._arrays[name].nbytes
            checked(self._cuda.cudaMemsetAsync(self._memory[name], _POISON, size, self._stream))

    def results(self, names: tuple[str, ...]) -> Arrays:
        """Wait for the device and give copies of the outputs."""
        for name in names:
            self._copy(name, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        checked(self._cuda.cudaStreamSynchronize(self._stream))
        arrays = {name: self._arrays[name] for name in names}
        return {name: a.astype(np.float32 if a.dtype == np.float16 else a.dtype) for name, a in arrays.items()}

    def close(self) -> None:
        if self._graph is not None:
            self._cuda.cudaGraphExecDestroy(self._graph)
        self._graph = self._context = None
        for address in self._memory.values():
            self._cuda.cudaFree(address)
        self._memory.clear()

    def _make_context(self) -> Any:
        """TensorRT-RTX compiles for the device now and records its graphs itself, once that is done."""
        if not hasattr(self._trt, "CudaGraphStrategy"):
            return self._engine.create_execution_context()
        options = self._engine.create_runtime_config()
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        options.dynamic_shapes_kernel_specialization_strategy = eager
        options.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(options)

    def _allocate(self, name: str) -> None:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise ExportError(f"the engine's {name} is {kind}: expected {', '.join(_TYPES)}")
        array: NDArray = np.zeros(tuple(self._context.get_tensor_shape(name)), _TYPES[kind])
        self._arrays[name] = array
        self._memory[name] = int(checked(self._cuda.cudaMalloc(max(1, array.nbytes))))
        if not self._context.set_tensor_address(name, self._memory[name]):
            raise ExportError(f"the engine refuses memory for {name}")

    def _copy(self, name: str, kind: Any) -> None:
        device, array = self._memory[name], self._arrays[name]
        host = array.ctypes.data
        to_device = kind == self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        target, source = (device, host) if to_device else (host, device)
        checked(self._cuda.cudaMemcpyAsync(target, source, array.nbytes, kind, self._stream))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise ExportError(f"the engine failed to run a batch of {next(iter(self.shapes.values()))[0]}")

    def _record(self) -> None:
        cuda, stream = self._cuda, self._stream
        checked(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        self._enqueue()
        graph = checked(cuda.cudaStreamEndCapture(stream))
        try:
            self._graph = checked(cuda.cudaGraphInstantiate(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)
        self.step = lambda: checked(cuda.cudaGraphLaunch(self._graph, stream))
