"""Runners: each executes one form of the network behind the same call, infer(dict) -> dict.

Inputs and outputs are numpy arrays, float32 or wider, batch first. A runner is a context manager: what
it loads or allocates lives between enter and exit.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import Self

from export.batch import Arrays
from export.bundle import ONNX_FILE
from export.capture import eager_copy, plain_torch
from export.cuda_graph import CudaGraphProgram
from export.errors import ExportError, first_line
from export.graph import converted
from export.interpreter import GraphInterpreter
from export.lowering.onnx_file import OnnxFile
from export.lowering.tensorrt_engine import Engine, import_flavour
from export.onnx_session import import_onnxruntime, open_file, open_session, rounded_copy
from export.precision import Precision
from export.program import FusedProgram


class Runner(ABC):
    """One runtime holding one form of the network.

    Attributes:
        name: of the form: `eager`, `folded`, `fused`, `triton`, `onnx`, or an engine's flavour.
        runtime: what executes it, with version where that matters.
        file: the artefact in the bundle, empty where there is none.
    """

    name: str
    runtime: str
    file = ""

    @abstractmethod
    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        """Run one batch: {"input": [N, C, H, W] float32} -> {output name: array}."""

    def trace(self, inputs: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """Every intermediate tensor of one batch that this runtime can show, by fused-graph node name."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class EagerRunner(Runner):
    """The user's model as it is, on the CPU, in any floating-point type."""

    name = "eager"
    runtime = f"torch {torch.__version__}"

    def __init__(self, model: nn.Module, dtype: torch.dtype, output_names: tuple[str, ...]) -> None:
        self._model, self._dtype, self._output_names = model, dtype, output_names

    def __enter__(self) -> Self:
        self._copy = eager_copy(self._model, self._dtype)
        return self

    def __exit__(self, *error: object) -> None:
        del self._copy

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        with plain_torch():
            x = torch.from_numpy(inputs["input"]).to(self._dtype, copy=True)
            try:
                outputs = pytree.tree_leaves(self._copy(x))
            except RuntimeError as error:
                raise ExportError(f"the eager model does not run in {self._dtype}: {first_line(error)}") from error
        return _named(self._output_names, outputs)


class FoldedRunner(Runner):
    """The captured graph with BatchNorm folded and nothing fused, on the CPU: every operator rounds its result."""

    name = "folded"
    runtime = EagerRunner.runtime

    def __init__(self, program: FusedProgram, precision: Precision, output_names: tuple[str, ...]) -> None:
        self._program, self._precision, self._output_names = program, precision, output_names

    def __enter__(self) -> Self:
        self._graph_module = converted(self._program.folded, self._precision.dtype)
        return self

    def __exit__(self, *error: object) -> None:
        del self._graph_module

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        x = torch.from_numpy(inputs["input"]).to(self._precision.dtype, copy=True)
        with plain_torch():
            return _named(self._output_names, pytree.tree_leaves(self._graph_module(x)))


class ProgramRunner(Runner):
    """The fused program: on the CPU node by node by the operators' references, on CUDA as graphs of Triton kernels."""

    def __init__(
        self,
        program: FusedProgram,
        precision: Precision,
        output_names: tuple[str, ...],
        device: str = "cpu",
        operators: Mapping[Callable, Callable] | None = None,
    ) -> None:
        """On the CPU, `operators` replaces some operators, such as by their Triton launchers in the interpreter."""
        self._program, self._precision, self._output_names = program, precision, output_names
        self._device, self._operators = device, dict(operators or {})
        self.name, package = ("triton", "triton") if device != "cpu" or operators else ("fused", "torch")
        self.runtime = f"{package} {importlib.metadata.version(package)}"

    def __enter__(self) -> Self:
        if self._device == "cpu":
            self._interpreter = GraphInterpreter(self._program.at(self._precision), self._operators)
            self._call: Callable[[Tensor], Any] = self._interpreter.run
        else:
            graphs = CudaGraphProgram(self._program, self._precision, self._device)
            self._interpreter, self._call = graphs.interpreter, graphs
        return self

    def __exit__(self, *error: object) -> None:
        del self._interpreter, self._call

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        with plain_torch():
            return _named(self._output_names, pytree.tree_leaves(self._call(self._input(inputs))))

    def trace(self, inputs: Mapping[str, NDArray]) -> dict[str, Tensor]:
        self._interpreter.values = {}
        with plain_torch():
            self._interpreter.run(self._input(inputs))
        values, self._interpreter.values = self._interpreter.values, None
        return {name: value.cpu() for name, value in values.items()}

    def _input(self, inputs: Mapping[str, NDArray]) -> Tensor:
        return torch.from_numpy(inputs["input"]).to(self._device, self._precision.dtype, copy=True)


class OnnxRuntimeRunner(Runner):
    """The ONNX file in ONNX Runtime on the CPU."""

    name = "onnx"
    file = ONNX_FILE

    def __init__(self, file: OnnxFile, precision: Precision) -> None:
        self._file, self._precision = file, precision

    def __enter__(self) -> Self:
        self.runtime = f"onnxruntime {import_onnxruntime().__version__}"
        self._session = open_file(self._file.model, self._precision)
        return self

    def __exit__(self, *error: object) -> None:
        del self._session

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        values = self._session.run(list(self._file.output_names), dict(inputs))
        return dict(zip(self._file.output_names, values, strict=True))

    def trace(self, inputs: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """Read from a throw-away copy of the file that outputs its intermediate values.

        The copy rounds after every node: left to itself, ONNX Runtime drops a rounding where two casts
        follow each other, and the values would not be those a 16-bit device computes.
        """
        copy = rounded_copy(self._file.model)
        outputs = {value.name for value in copy.graph.output}
        names = list(dict.fromkeys(value for value in self._file.values.values() if value != "input"))
        if not names:
            return {}
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(v) for v in names if v not in outputs)
        values = dict(zip(names, open_session(copy).run(names, dict(inputs)), strict=True)) | dict(inputs)
        dtype = self._precision.dtype
        return {node: torch.from_numpy(values[value]).to(dtype) for node, value in self._file.values.items()}


_TORCH_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class TensorRTRunner(Runner):
    """A TensorRT or TensorRT-RTX engine on the first CUDA device."""

    def __init__(self, engine: Engine, output_names: tuple[str, ...]) -> None:
        self._engine, self._output_names = engine, output_names
        self.name, self.file = engine.flavour.name, engine.flavour.file_name
        self.runtime = f"{engine.flavour.name} {engine.version}"

    def __enter__(self) -> Self:
        trt = import_flavour(self._engine.flavour)
        self._logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(self._logger)
        self._plan = runtime.deserialize_cuda_engine(self._engine.plan)
        if self._plan is None:
            raise ExportError(f"{self.runtime} cannot load the engine on {torch.cuda.get_device_name()}")
        self._context = self._plan.create_execution_context()
        self._stream = torch.cuda.Stream()
        return self

    def __exit__(self, *error: object) -> None:
        del self._context, self._plan, self._stream

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        x = torch.from_numpy(inputs["input"]).cuda().contiguous()
        smallest, _, largest = self._plan.get_tensor_profile_shape("input", 0)
        if not all(low <= n <= high for low, n, high in zip(smallest, x.shape, largest, strict=True)):
            raise ExportError(f"the engine takes {tuple(smallest)} to {tuple(largest)}, got {tuple(x.shape)}")
        if not self._context.set_input_shape("input", tuple(x.shape)):
            raise ExportError(f"the engine refuses an input of shape {tuple(x.shape)}")
        self._context.set_tensor_address("input", x.data_ptr())
        outputs = []
        for name in self._output_names:
            dtype = getattr(torch, _TORCH_TYPES[self._plan.get_tensor_dtype(name).name])
            y = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            y.view(torch.uint8).fill_(0xFF)  # NaN in every floating-point type: what is not written is noticed
            self._context.set_tensor_address(name, y.data_ptr())
            outputs.append(y)
        self._stream.wait_stream(torch.cuda.current_stream())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ExportError(f"{self.runtime} failed to run a batch of {len(x)}")
        self._stream.synchronize()
        return _named(self._output_names, outputs)


def _named(names: tuple[str, ...], outputs: list[Tensor]) -> Arrays:
    arrays = [(y.double() if y.dtype == torch.float64 else y.float()) if y.is_floating_point() else y for y in outputs]
    return dict(zip(names, (y.detach().cpu().numpy() for y in arrays), strict=True))
