"""Runtimes that hold the network at one batch size, ready to be timed.

What is timed is one forward pass whose input is already where the provider reads it.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from export.base.batch import Arrays
from export.base.errors import ExportError, first_line
from export.base.precision import Precision
from export.fusion.program import FusedProgram
from export.lowering.cuda_graph import CudaGraphProgram
from export.runtime.engines.engine import Engine
from export.runtime.engines.runner import TensorRTRunner
from export.runtime.onnx_session import import_onnxruntime
from export.runtime.runner import Runner

WARM_UP = 3  # runs; the compiler's CUDA graph is recorded in the second


class Provider(Runner):
    """One runtime holding the network at one batch size, its input in a place of its own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    @abstractmethod
    def load(self, x: Tensor) -> None:
        """Put a batch where `step` reads it."""

    @abstractmethod
    def step(self) -> Any:
        """One forward pass, returning its outputs; on a GPU it may return before the device is done."""

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        self.load(torch.from_numpy(inputs["input"]))
        return named_arrays(self._names, self.step())


class ModuleProvider(Provider):
    """A module called on a tensor that stays where it is."""

    def __init__(self, module: Callable[[Tensor], Any], x: Tensor, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self._module, self._x = module, x

    def load(self, x: Tensor) -> None:
        self._x.copy_(x)

    def step(self) -> Any:
        with torch.inference_mode():
            return self._module(self._x)


class OnnxProvider(Provider):
    """An ONNX file in ONNX Runtime on the CPU, with its default optimisations."""

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, names: tuple[str, ...]) -> None:
        """Raises ExportError where ONNX Runtime is missing or does not take the file."""
        super().__init__(names)
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        try:
            self._session = runtime.InferenceSession(model, options, ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise ExportError(f"onnxruntime cannot load the file: {first_line(error)}") from error
        entry = self._session.get_inputs()[0]
        half = entry.type == "tensor(float16)"
        self._inputs = {entry.name: np.zeros(shape, np.float16 if half else np.float32)}

    def load(self, x: Tensor) -> None:
        for values in self._inputs.values():
            np.copyto(values, x.numpy(), casting="same_kind")

    def step(self) -> Any:
        return self._session.run(None, self._inputs)


class GraphProvider(Provider):
    """Work on the current CUDA stream, recorded as one CUDA graph."""

    def __init__(self, run: Callable[[], Any], x: Tensor, names: tuple[str, ...]) -> None:
        """Record `run`, which reads `x` and returns its outputs."""
        super().__init__(names)
        self._x = x
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # cuDNN looks for its algorithms before anything is recorded
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._outputs = run()

    def load(self, x: Tensor) -> None:
        self._x.copy_(x)

    def step(self) -> Any:
        self._graph.replay()
        return self._outputs


class FusedProvider(Provider):
    """This project's Triton kernels in their CUDA graph."""

    def __init__(self, program: FusedProgram, precision: Precision, batch: int, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self._program = CudaGraphProgram(program, precision)
        self._graph = self._program.capture(batch)

    def load(self, x: Tensor) -> None:
        """A call fills the graph's input, which nobody else can reach, and runs it once."""
        self._program(x)

    def step(self) -> None:
        self._graph.replay()

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        return named_arrays(self._names, self._program(torch.from_numpy(inputs["input"]).cuda()))


class EngineProvider(Provider):
    """An engine in a process of its own, which also times it: its float32 input and outputs are on the device."""

    def __init__(self, engine: Engine, names: tuple[str, ...]) -> None:
        """Raises ExportError where the engine does not load."""
        super().__init__(names)
        self._runner = TensorRTRunner(engine, names)
        self._runner.__enter__()
        weakref.finalize(self, self._runner.__exit__, None, None, None)

    def load(self, x: Tensor) -> None:
        self._inputs = {"input": x.float().contiguous().cpu().numpy()}

    def step(self) -> list[NDArray]:
        return list(self._runner.infer(self._inputs).values())

    def turn(self, count: int) -> list[float]:
        """Seconds of each of `count` runs on what was loaded, as `cuda_turn` takes them."""
        return self._runner.time(self._inputs, count)


def named_arrays(names: tuple[str, ...], outputs: Any) -> Arrays:
    leaves = [torch.as_tensor(y) for y in pytree.tree_leaves(outputs)]
    arrays = [(y.float() if y.is_floating_point() else y).cpu().numpy() for y in leaves]
    return dict(zip(names, arrays, strict=True))
