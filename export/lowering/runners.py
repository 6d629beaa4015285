"""Runners of the forms that PyTorch or ONNX Runtime executes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from typing_extensions import Self

from export.base.batch import Arrays
from export.base.errors import ExportError, first_line
from export.base.machine import installed_version
from export.base.precision import Precision
from export.fusion.capture import eager_copy, plain_torch
from export.fusion.interpreter import GraphInterpreter
from export.fusion.program import FusedProgram
from export.lowering.cuda_graph import CudaGraphProgram
from export.lowering.onnx_file import OnnxFile
from export.runtime.onnx_session import (
    ONNX_FILE,
    ONNX_FORMS,
    import_onnxruntime,
    open_file,
    open_session,
    rounded_copy,
    runs_rounded,
)
from export.runtime.runner import Runner


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


class UnfusedRunner(Runner):
    """A graph of a program before anything was fused, on the CPU: every operator rounds its result."""

    runtime = EagerRunner.runtime

    def __init__(
        self,
        name: str,
        program: FusedProgram,
        graph_module: fx.GraphModule,
        precision: Precision,
        output_names: tuple[str, ...],
    ) -> None:
        """`graph_module` is the program's captured or its folded graph."""
        self.name, self._program, self._unfused = name, program, graph_module
        self._precision, self._output_names = precision, output_names

    def __enter__(self) -> Self:
        self._graph_module = self._program.unfused_at(self._unfused, self._precision)
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
        self.runtime = f"{package} {installed_version(package)}"

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

    def __init__(
        self, file: OnnxFile, precision: Precision, artefact: str = ONNX_FILE, rounded: bool | None = None
    ) -> None:
        """`artefact` is the name of the file in the bundle; `rounded` as in `open_file`, by default by precision."""
        self._file, self.file = file, artefact
        self._rounded = runs_rounded(precision.name, artefact) if rounded is None else rounded
        self.name = ONNX_FORMS[artefact]

    def __enter__(self) -> Self:
        self.runtime = f"onnxruntime {import_onnxruntime().__version__}"
        self._session = open_file(self._file.serialize(), self._rounded)
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
        values = dict(zip(names, open_session(copy.SerializeToString()).run(names, dict(inputs)), strict=True)) | dict(
            inputs
        )
        return {node: torch.from_numpy(values[value]) for node, value in self._file.values.items()}


def _named(names: tuple[str, ...], outputs: list[Tensor]) -> Arrays:
    arrays = [(y.double() if y.dtype == torch.float64 else y.float()) if y.is_floating_point() else y for y in outputs]
    return dict(zip(names, (y.detach().cpu().numpy() for y in arrays), strict=True))
