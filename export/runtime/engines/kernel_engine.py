"""A kernel engine on a CUDA device, by its driver alone: neither PyTorch, Triton nor the CUDA toolkit.

For the process that `export.runtime.engines.runner` starts. The C++ runtime (kernels/runtime) does the same in the same
order, so that both give the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Inputs, count_of
from export.base.errors import ExportError
from export.runtime.engines.cuda_driver import checked, start_driver
from export.runtime.engines.kernel_file import KernelFile, read_kernel_file
from export.runtime.engines.kernel_plan import (
    DESCRIPTOR_BYTES,
    ITEM_BYTES,
    Argument,
    Descriptor,
    Kernel,
    Launch,
    Pointer,
    Table,
    parameter_sizes,
)

_CAPABILITY = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR")
_SHARED = "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"
_POISON = 0xFF  # NaN in every floating-point type: what is not written is noticed
_PLAIN_SHARED = 48 << 10  # bytes that a block has without being asked for
_FIRST_WITH_TENSOR_MAPS = 12000
_GRAPHS_WITH_EDGES = 12030  # the driver from which a graph keeps a programmatic edge between two launches
_TENSOR_MAP_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # of CUtensorMapDataType
_NO_INTERLEAVE, _PROMOTION_TO_128_BYTES, _ZEROS_OUTSIDE = 0, 2, 0
# The bindings have a class for a tensor map and this call, but keep it where its 64 bytes of alignment are chance.
_Encode = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64),
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),
)
_DRIVER_OF_SMALL_TENSORS, _SMALL_TENSOR, _SMALL_TENSOR_BIT = 13010, 128 << 10, 1 << 21


def why_not_here(content: bytes, target: str) -> str:
    """Why a file of a bundle, named for `target`, cannot run on the first GPU here, empty where it can.

    Nothing of the file is read where its name says enough.
    """
    try:
        cuda = start_driver()
        device = checked(cuda.cuDeviceGet(0))
        *capability, shared = (_attribute(cuda, name, device) for name in (*_CAPABILITY, _SHARED))
        here = f"sm_{capability[0]}{capability[1]}"
        if here != target:
            return f"it is for {target}, this GPU is {here}: export it for that one"
        plan = read_kernel_file(content).plan
        return plan.obstacle((capability[0], capability[1]), checked(cuda.cuDriverGetVersion()), shared)
    except ExportError as error:
        return str(error)


def _attribute(cuda: Any, name: str, device: Any) -> int:
    return int(
        checked(cuda.cuDeviceGetAttribute(getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device))
    )


class KernelEngine:
    """A loaded engine with its stream, its memory on the device, and a CUDA graph for each batch size."""

    def __init__(self, content: bytes, inputs: tuple[str, ...], outputs: tuple[str, ...], device: int = 0) -> None:
        """Check a file and load it.

        Args:
            content: of the file.
            inputs: their names.
            outputs: those to return, in order.
            device: its number.

        Raises:
            ExportError: the file is not sound, not for this device or driver, or of another network; or the device
                fails.
        """
        file = read_kernel_file(content)
        self._plan = file.plan
        found = tuple(t.name for t in file.plan.inputs), tuple(t.name for t in file.plan.outputs)
        if set(found[0]) != set(inputs) or not set(outputs) <= set(found[1]):
            expected = f"{', '.join(inputs)} and {', '.join(outputs)}"
            raise ExportError(f"the engine has {', '.join(found[0])} and {', '.join(found[1])}: expected {expected}")
        self._outputs, self._last = outputs, 0
        self._cuda = cuda = start_driver()
        self._driver = checked(cuda.cuDriverGetVersion())
        self._device = checked(cuda.cuDeviceGet(device))
        self._shared = _attribute(cuda, _SHARED, self._device)
        major, minor = (_attribute(cuda, name, self._device) for name in _CAPABILITY)
        if obstacle := file.plan.obstacle((major, minor), self._driver, self._shared):
            raise ExportError(f"the engine cannot run here: {obstacle}")
        self._context = checked(cuda.cuDevicePrimaryCtxRetain(self._device))
        try:
            with self._current(), ExitStack() as stack:
                self._load(file, stack)
                self._loaded = stack.pop_all()
        except BaseException:
            cuda.cuDevicePrimaryCtxRelease(self._device)
            raise

    def infer(self, inputs: Inputs) -> Arrays:
        """Run one batch: {input name: [N, ...]}, float32 or bytes as the plan says -> {output name: [N, ...] float32}.

        Raises:
            ExportError: the engine has no table for so many, or the device fails.
        """
        with self._current():
            count = self._put(inputs)
            checked(self._cuda.cuGraphLaunch(self._graphs[self._last], self._stream))
            return self._results(count)

    def time(self, inputs: Inputs, count: int) -> list[float]:
        """Seconds of each of `count` runs on one batch, by CUDA events, each behind a run that does not count."""
        cuda, stream = self._cuda, self._stream
        with self._current(), ExitStack() as stack:
            self._put(inputs)
            graph, events = self._graphs[self._last], []
            for _ in range(count):
                events.append([stack.enter_context(self._event()) for _ in range(2)])
            for start, end in events:
                checked(cuda.cuGraphLaunch(graph, stream))
                checked(cuda.cuEventRecord(start, stream))
                checked(cuda.cuGraphLaunch(graph, stream))
                checked(cuda.cuEventRecord(end, stream))
            checked(cuda.cuStreamSynchronize(stream))
            return [checked(cuda.cuEventElapsedTime(start, end)) / 1e3 for start, end in events]

    def close(self) -> None:
        """Give everything on the device back."""
        with self._current():
            self._loaded.close()
        checked(self._cuda.cuDevicePrimaryCtxRelease(self._device))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context, in which everything is done; the thread's own again afterwards."""
        checked(self._cuda.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._cuda.cuCtxPopCurrent()

    @contextmanager
    def _event(self) -> Iterator[Any]:
        event = checked(self._cuda.cuEventCreate(0))
        yield event
        self._cuda.cuEventDestroy(event)

    def _load(self, file: KernelFile, stack: ExitStack) -> None:
        """Modules, memory, weights and graphs; `stack` gives back what was made, also where this raises."""
        cuda, plan = self._cuda, file.plan
        functions = self._functions(file, stack)
        self._stream = checked(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
        stack.callback(cuda.cuStreamDestroy, self._stream)
        self._memory = {
            "weight": self._allocated(plan.weights_bytes, stack),
            "arena": self._allocated(plan.arena_bytes, stack),
        }
        for weight in plan.weights:
            data = np.frombuffer(file.weights[weight.tensor], np.uint8)
            checked(cuda.cuMemcpyHtoD(self._memory["weight"] + weight.offset, data.ctypes.data, data.nbytes))
        most = max(plan.batches)
        self._arrays = {tensor.name: np.empty((most, *tensor.shape), np.float32) for tensor in plan.outputs}
        if self._plan.uses_descriptors:
            address = checked(cuda.cuGetProcAddress(b"cuTensorMapEncodeTiled", _FIRST_WITH_TENSOR_MAPS, 0))[0]
            self._encode = _Encode(address)
        self._graphs = {
            size: self._recorded(plan.kernels, functions, table, stack) for size, table in plan.batches.items()
        }

    def _allocated(self, size: int, stack: ExitStack) -> int:
        address = checked(self._cuda.cuMemAlloc(max(1, size)))
        stack.callback(self._cuda.cuMemFree, address)
        return int(address)

    def _functions(self, file: KernelFile, stack: ExitStack) -> list[Any]:
        """The function of each kernel, allowed the shared memory that it needs."""
        cuda, attributes = self._cuda, self._cuda.CUfunction_attribute
        modules, found = {}, []
        for sha256, cubin in file.cubins.items():
            modules[sha256] = checked(cuda.cuModuleLoadData(bytes(cubin)))
            stack.callback(cuda.cuModuleUnload, modules[sha256])
        for kernel in file.plan.kernels:
            function = checked(cuda.cuModuleGetFunction(modules[kernel.cubin], kernel.symbol.encode()))
            asked = attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, attributes.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
            static, threads = (int(checked(cuda.cuFuncGetAttribute(attribute, function))) for attribute in asked)
            if kernel.shared + static > self._shared or 32 * kernel.warps > threads:
                raise ExportError(
                    f"{kernel.symbol} needs {kernel.shared + static} bytes of shared memory and {32 * kernel.warps} "
                    f"threads per block: this GPU has {self._shared} and {threads}"
                )
            if kernel.shared + static > _PLAIN_SHARED:
                most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                checked(cuda.cuFuncSetAttribute(function, most, self._shared - static))
            found.append(function)
        return found

    def _recorded(self, kernels: Sequence[Kernel], functions: Sequence[Any], table: Table, stack: ExitStack) -> Any:
        """The launches of a batch size as a CUDA graph."""
        cuda, stream = self._cuda, self._stream
        launches = [
            self._prepared(kernels[launch.kernel], functions[launch.kernel], launch) for launch in table.launches
        ]
        checked(cuda.cuStreamBeginCapture(stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            for launch in launches:
                launch()
        finally:
            outcome = cuda.cuStreamEndCapture(stream)
        graph = checked(outcome)
        try:
            executable = checked(cuda.cuGraphInstantiate(graph, 0))
        finally:
            cuda.cuGraphDestroy(graph)
        stack.callback(cuda.cuGraphExecDestroy, executable)
        return executable

    def _prepared(self, kernel: Kernel, function: Any, launch: Launch) -> Callable[[], None]:
        """What launches a kernel, with its arguments as the machine reads them."""
        cuda, config = self._cuda, self._cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * kernel.warps, 1, 1
        config.sharedMemBytes, config.hStream = kernel.shared, self._stream
        if kernel.pdl and self._driver >= _GRAPHS_WITH_EDGES:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        values: list[bytes] = []
        for kind, argument in zip(kernel.parameters, launch.arguments, strict=True):
            values += self._values(kind, argument)
        values += [bytes(8)] * 2  # to scratch memory, of which kernels have none
        room = 128  # for each: the largest, and a multiple of every alignment
        buffer = np.zeros(room * (len(values) + 1), np.uint8)
        start = -buffer.ctypes.data % room
        pointers = (ctypes.c_void_p * len(values))()
        for index, value in enumerate(values):
            at = start + room * index
            buffer[at : at + len(value)] = np.frombuffer(value, np.uint8)
            pointers[index] = buffer.ctypes.data + at

        def run() -> None:
            assert buffer.size  # which stays as long as its addresses are needed
            checked(cuda.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))

        return run

    def _values(self, kind: str, argument: Argument) -> list[bytes]:
        """The machine's parameters that one of the plan's becomes."""
        if isinstance(argument, Descriptor):
            numbers: list[int] = [*argument.shape, *argument.strides]
            sizes = parameter_sizes(kind)[1:]
            pairs = zip(numbers, sizes, strict=True)
            return [self._tensor_map(argument), *(number.to_bytes(size, "little") for number, size in pairs)]
        (size,) = parameter_sizes(kind)
        number = self._address(argument) if isinstance(argument, Pointer) else argument or 0
        return [number.to_bytes(size, "little", signed=number < 0)]

    def _address(self, pointer: Pointer) -> int:
        return self._memory[pointer.space] + pointer.offset

    def _tensor_map(self, tensor: Descriptor) -> bytes:
        """As Triton's own driver encodes it: innermost axis first, strides in bytes but for the innermost."""
        cuda, item = self._cuda, ITEM_BYTES[tensor.dtype]
        rank, shape = len(tensor.shape), tensor.shape[::-1]
        strides = [stride * item for stride in tensor.strides[-2::-1]]
        outermost = shape[-1] * (strides[-1] if strides else item)
        room = (ctypes.c_uint64 * (3 * DESCRIPTOR_BYTES // 16))()
        words = (ctypes.c_uint64 * (DESCRIPTOR_BYTES // 8)).from_buffer(room, -ctypes.addressof(room) % 64)
        status = self._encode(
            ctypes.addressof(words),
            _TENSOR_MAP_TYPES[tensor.dtype],
            rank,
            self._address(tensor.base),
            (ctypes.c_uint64 * rank)(*shape),
            (ctypes.c_uint64 * rank)(*strides, outermost),
            (ctypes.c_uint32 * rank)(*tensor.box[::-1]),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            _NO_INTERLEAVE,
            tensor.swizzle,
            _PROMOTION_TO_128_BYTES,
            _ZEROS_OUTSIDE,
        )
        checked((cuda.CUresult(status),))
        last = sum((size - 1) * stride for size, stride in zip(shape, (item, *strides), strict=True))
        if self._driver <= _DRIVER_OF_SMALL_TENSORS and last + 1 < _SMALL_TENSOR:
            words[1] &= ~_SMALL_TENSOR_BIT  # as Triton and CUTLASS do for these drivers
        return bytes(words)

    def _put(self, inputs: Inputs) -> int:
        """Put a batch where the graph of `_last` reads it, and NaN where it writes; how many images there are."""
        cuda, count, arena = self._cuda, count_of(inputs), self._memory["arena"]
        size = self._plan.batch_for(count)
        if size is None:
            raise ExportError(f"the engine runs batches of up to {max(self._plan.batches)} images, got {count}")
        table = self._plan.batches[size]
        if size != self._last:  # another batch size has other values in its place
            self._fill(arena + table.zeroed[0], 0, table.zeroed[1])
            self._last = size
        for tensor in self._plan.outputs:
            self._fill(arena + table.outputs[tensor.name], _POISON, size * tensor.row_bytes)
        for tensor in self._plan.inputs:
            x = np.ascontiguousarray(inputs[tensor.name])
            if x.shape != (count, *tensor.shape) or x.dtype != tensor.dtype:
                wanted = f"{tensor.dtype} [N, *{list(tensor.shape)}]"
                raise ExportError(f"the engine takes {tensor.name} as {wanted}, got {x.dtype} {list(x.shape)}")
            address = arena + table.inputs[tensor.name]
            checked(cuda.cuMemcpyHtoDAsync(address, x.ctypes.data, x.nbytes, self._stream))
            self._fill(address + x.nbytes, 0, size * tensor.row_bytes - x.nbytes)
            checked(cuda.cuStreamSynchronize(self._stream))  # `x` may be this function's own copy
        return count

    def _fill(self, address: int, value: int, size: int) -> None:
        if size:
            checked(self._cuda.cuMemsetD8Async(address, value, size, self._stream))

    def _results(self, count: int) -> Arrays:
        """Wait for the device and give copies of the outputs."""
        table, found = self._plan.batches[self._last], {}
        rows = {tensor.name: tensor.row_bytes for tensor in self._plan.outputs}
        for name in self._outputs:
            array: NDArray[np.float32] = self._arrays[name][:count]
            address = self._memory["arena"] + table.outputs[name]
            checked(self._cuda.cuMemcpyDtoHAsync(array.ctypes.data, address, count * rows[name], self._stream))
            found[name] = array
        checked(self._cuda.cuStreamSynchronize(self._stream))
        return {name: array.copy() for name, array in found.items()}
