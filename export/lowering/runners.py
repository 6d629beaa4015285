"""Runners of the forms that PyTorch executes, and of an ONNX file that shows its intermediate values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from typing_extensions import Self

from export.base.batch import Arrays, Inputs, count_of, resized, rows_of
from export.base.errors import ExportError, first_line
from export.base.machine import installed_version
from export.base.memory import give_back
from export.base.precision import Precision
from export.fusion.capture import call_arguments, eager_copy, plain_torch
from export.fusion.interpreter import REFERENCES, GraphInterpreter
from export.fusion.program import FusedProgram, leaf_names, returned_tensors
from export.lowering.convolutions import WideConvolutions
from export.lowering.cuda_graph import CudaGraphProgram
from export.lowering.onnx_file import OnnxFile
from export.runtime.onnx_session import ONNX_FILE, ONNX_FORMS, OnnxRunner, open_session, rounded_copy, runs_rounded
from export.runtime.runner import Interface, Runner, Shapes


class EagerRunner(Runner):
    """The user's model as it is, on the CPU, in any floating-point type."""

    name = "eager"
    runtime = f"torch {torch.__version__}"

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, output_names: tuple[str, ...], inputs: Shapes | None = None
    ) -> None:
        """`inputs` as in `Interface.of`."""
        super().__init__(Interface.of(output_names, inputs))
        self._model, self._dtype = model, dtype

    def __enter__(self) -> Self:
        self._copy = eager_copy(self._model, self._dtype)
        return self

    def __exit__(self, *error: object) -> None:
        del self._copy

    def _run(self, inputs: Inputs) -> Arrays:
        single = count_of(inputs) == 1
        try:
            outputs = self._call(inputs)
        except Exception as error:  # whatever the user's code raises
            if not single:
                raise ExportError(f"the eager model does not run in {self._dtype}: {first_line(error)}") from error
            outputs = {}
        if single and (not outputs or any(y.shape[:1] != (1,) for y in outputs.values())):
            # A single image whose batch was squeezed away: it is the first of two.
            outputs = rows_of(self._run(resized(inputs, 2)), slice(1))
        return outputs

    def _call(self, inputs: Inputs) -> Arrays:
        args, kwargs = call_arguments(cast(inputs, self._dtype))
        with plain_torch(), WideConvolutions():
            outputs = self._copy(*args, **kwargs)
        found = dict(zip(leaf_names(outputs, inputs), pytree.tree_leaves(outputs), strict=True))
        wanted = [name for name in self.interface.outputs if isinstance(found.get(name), Tensor)]
        return dict(zip(wanted, arrays([found[name] for name in wanted]), strict=True))


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
        super().__init__(Interface.of(output_names, program.inputs, program.batch))
        self.name, self._program, self._unfused, self._precision = name, program, graph_module, precision

    def __enter__(self) -> Self:
        self._graph_module = self._program.unfused_at(self._unfused, self._precision)
        return self

    def __exit__(self, *error: object) -> None:
        del self._graph_module

    def _run(self, inputs: Inputs) -> Arrays:
        with plain_torch(), WideConvolutions(), _says_what_type(self._precision):
            outputs = self._graph_module(*cast(inputs, self._precision.dtype).values())
        return self._named(arrays(returned_tensors(self._graph_module, outputs)))


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
        super().__init__(Interface.of(output_names, program.inputs, program.batch))
        self._program, self._precision = program, precision
        self._device, self._operators = device, dict(operators or {})
        self.in_host_memory = device == "cpu"
        self.name, package = ("triton", "triton") if device != "cpu" or operators else ("fused", "torch")
        self.runtime = f"{package} {installed_version(package)}"

    def __enter__(self) -> Self:
        if self._device == "cpu":
            self._interpreter = GraphInterpreter(self._program.at(self._precision), {**REFERENCES, **self._operators})
            self._call: Callable[..., Any] = self._interpreter.run
        else:
            graphs = CudaGraphProgram(self._program, self._precision, self._device)
            self._interpreter, self._call = graphs.interpreter, graphs
        return self

    def __exit__(self, *error: object) -> None:
        del self._interpreter, self._call

    def _run(self, inputs: Inputs) -> Arrays:
        with plain_torch(), WideConvolutions(), _says_what_type(self._precision):
            outputs = self._call(*cast(inputs, self._precision.dtype, self._device).values())
        return self._named(arrays(returned_tensors(self._program.master, outputs)))

    def trace(self, inputs: Inputs) -> dict[str, Tensor]:
        self._interpreter.values = {}
        with plain_torch(), WideConvolutions(), _says_what_type(self._precision):
            self._interpreter.run(*cast(inputs, self._precision.dtype, self._device).values())
        values, self._interpreter.values = self._interpreter.values, None
        return {name: value.cpu() for name, value in values.items()}


class TracedOnnxRunner(OnnxRunner):
    """An ONNX file of this project, which knows where the values of the fused graph are in it."""

    def __init__(
        self, file: OnnxFile, precision: Precision, artefact: str = ONNX_FILE, rounded: bool | None = None
    ) -> None:
        """`artefact` is the name of the file in the bundle; `rounded` as in `open_file`, by default by precision."""
        rounded = runs_rounded(precision.name, artefact) if rounded is None else rounded
        super().__init__(file.serialize, file.interface, rounded, lasts=False)
        self._onnx_file, self.name, self.file = file, ONNX_FORMS[artefact], artefact

    def trace(self, inputs: Inputs) -> dict[str, Tensor]:
        """Read from a throw-away copy of the file that outputs its intermediate values.

        The copy rounds after every node: left to itself, ONNX Runtime drops a rounding where two casts
        follow each other, and the values would not be those a 16-bit device computes.
        """
        self._session = None  # two at a time would hold the weights twice
        give_back()
        copy, places = rounded_copy(self._onnx_file.model), self._onnx_file.values
        outputs = {value.name for value in copy.graph.output}
        names = list(dict.fromkeys(value for value in places.values() if value not in inputs))
        if not names:
            return {}
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(v) for v in names if v not in outputs)
        content = copy.SerializeToString()
        del copy  # as large as the weights in float32, as is `content`, which the session reads
        give_back()
        session = open_session(content, lasts=False)
        del content
        give_back()
        found = self._compute(session, names, inputs)
        values = dict(zip(names, found, strict=True)) | dict(inputs)
        return {node: torch.from_numpy(values[value]) for node, value in places.items()}


def cast(inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Copies of the inputs as tensors of a type."""
    return {name: torch.from_numpy(x).to(device, dtype, copy=True) for name, x in inputs.items()}


def arrays(outputs: Any) -> list[NDArray]:
    """The tensors in what a model returns, in order: float64 as it is, narrower ones as float32."""
    leaves = [y.detach() for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor)]
    wide = [y.float() if y.is_floating_point() and y.dtype != torch.float64 else y for y in leaves]
    return [y.cpu().numpy() for y in wide]


@contextmanager
def _says_what_type(precision: Precision) -> Iterator[None]:
    """Raises ExportError for an operator of the user's that PyTorch has in float32 and not in 16 bits."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if precision.dtype.itemsize > 2 or "not implemented" not in str(error):
            raise
        raise ExportError(f"the network does not run in {precision.dtype}: {first_line(error)}") from error
