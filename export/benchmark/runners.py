"""PyTorch and this project's kernels at one batch size, ready to be timed.

What is timed is one forward pass whose input is already where the runner reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from export.base.batch import INPUT, Arrays, Batch, Inputs
from export.base.errors import ExportError, first_line
from export.base.precision import Precision
from export.fusion.program import FusedProgram
from export.lowering.cuda_graph import CudaGraphProgram
from export.lowering.runners import EagerRunner, arrays
from export.runtime.runner import Interface, TimedRunner

WARM_UP = 3  # runs; the compiler's CUDA graph is recorded in the second


class ModuleRunner(TimedRunner):
    """A module called on a tensor that stays where it is."""

    name, runtime = "module", EagerRunner.runtime

    def __init__(self, module: Callable[[Tensor], Any], x: Tensor, names: tuple[str, ...]) -> None:
        """`x` is the place of the input; its size is the batch size, its type and layout what the module runs on."""
        super().__init__(Interface.of(names, {INPUT: tuple(x.shape[1:])}, Batch(len(x), len(x), len(x))))
        self._module, self._x = module, x

    def load(self, x: Any) -> None:
        self._x.copy_(torch.as_tensor(x))

    def step(self) -> Any:
        with torch.inference_mode():
            return self._module(self._x)

    def _run(self, inputs: Inputs) -> Arrays:
        self.load(inputs[INPUT])
        return self._named(arrays(self.step()))


class CompiledRunner(ModuleRunner):
    """A module that torch.compile compiles for the one shape of its input."""

    def __init__(
        self, module: Callable[[Tensor], Any], x: Tensor, names: tuple[str, ...], mode: str = "default"
    ) -> None:
        super().__init__(module, x, names)
        self._plain, self._mode = module, mode

    def __enter__(self) -> Self:
        torch.compiler.reset()  # what was compiled for another batch size neither counts as a limit nor stays in memory
        self._module = torch.compile(self._plain, mode=self._mode, dynamic=False)
        try:
            self.step()
        except Exception as error:  # a compiler fails in many ways, a missing C++ compiler among them
            raise ExportError(first_line(error)) from error
        return self

    def __exit__(self, *error: object) -> None:
        self._module = self._plain


class GraphRunner(ModuleRunner):
    """A module on the current CUDA stream, recorded as one CUDA graph."""

    def __enter__(self) -> Self:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # cuDNN looks for its algorithms before anything is recorded
                self._module(self._x)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._outputs = self._module(self._x)
        return self

    def __exit__(self, *error: object) -> None:
        del self._graph, self._outputs

    def step(self) -> Any:
        self._graph.replay()
        return self._outputs


class FusedRunner(TimedRunner):
    """This project's Triton kernels in the CUDA graph of one batch size."""

    name = runtime = "triton"

    def __init__(self, program: FusedProgram, precision: Precision, batch: int, names: tuple[str, ...]) -> None:
        super().__init__(Interface.of(names, {INPUT: program.image_shape}, Batch(batch, batch, batch)))
        self._program, self._precision, self._batch = program, precision, batch

    def __enter__(self) -> Self:
        self._graphs = CudaGraphProgram(self._program, self._precision)
        self._graph = self._graphs.capture(self._batch)
        return self

    def __exit__(self, *error: object) -> None:
        del self._graph, self._graphs

    def load(self, x: Any) -> None:
        """A call fills the graph's input, which nobody else can reach, and runs it once."""
        self._graphs(torch.as_tensor(x, device="cuda"))

    def step(self) -> None:
        self._graph.replay()

    def _run(self, inputs: Inputs) -> Arrays:
        return self._named(arrays(self._graphs(torch.from_numpy(inputs[INPUT]).cuda())))
