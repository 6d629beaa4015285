"""ONNX Runtime on the CPU: the same session and the same runner for the export, for the device and for the clock."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Inputs
from export.base.errors import ExportError, MissingDependency, first_line
from export.base.memory import give_back
from export.runtime.onnx_wire import refuse_external_data
from export.runtime.runner import Interface, TimedRunner

ONNX_FILE = "model.onnx"
_MOST_SHAPE_BYTES = 4096  # of a constant that shapes may follow from
CPU_ONNX_FILE = "model.cpu.onnx"  # beside it in int8, where one file cannot suit every runtime
ONNX_FORMS = {CPU_ONNX_FILE: "onnx cpu", ONNX_FILE: "onnx"}  # what ONNX Runtime runs, the first that there is

if TYPE_CHECKING:
    import onnx
    from typing_extensions import Self


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        MissingDependency: it is not installed.
    """
    # Some versions store what they were used for in the user's cache and send it to their makers, from the import on.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime", "onnxruntime", error) from error
    return onnxruntime


def import_onnx() -> Any:
    """Import ONNX, which files need that do not run as they are.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError("onnx is not installed; install it with: pip install onnx") from error
    return onnx


def runs_rounded(precision: str, file: str) -> bool:
    """Whether a file of a bundle runs as `rounded_copy`.

    ONNX Runtime has no bfloat16 arithmetic on CPUs, and of the int8 file for TensorRT, whose scales are float16, it
    fuses pairs of quantisation and dequantisation into something less exact.
    """
    return precision == "bf16" or (precision == "int8" and file == ONNX_FILE)


class OnnxRunner(TimedRunner):
    """An ONNX file in ONNX Runtime on the CPU.

    Its session lives until the exit, and begins with the enter, or with the first batch where it does not last.
    """

    name, runtime = "onnx", "onnxruntime"

    def __init__(
        self,
        read: Callable[[], bytes],
        interface: Interface,
        rounded: bool = False,
        threads: int = 0,
        lasts: bool = True,
    ) -> None:
        """Nothing is read yet.

        Args:
            read: gives the file.
            interface: its inputs and outputs by their names in the file.
            rounded: as in `open_file`.
            threads: that run an operator; 0 leaves it to ONNX Runtime.
            lasts: as in `open_session`.
        """
        super().__init__(interface)
        self._read, self._rounded, self._threads, self._lasts = read, rounded, threads, lasts
        self._inputs: Arrays = {}

    def __enter__(self) -> Self:
        self.runtime = f"onnxruntime {import_onnxruntime().__version__}"
        self._session: Any = None
        if self._lasts:
            self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self._session, self._inputs = None, {}

    def _open(self) -> None:
        self._session = open_file(self._read(), self._rounded, self._threads, self._lasts)
        if not self._lasts:
            give_back()  # what loading took
        narrow = {entry.name for entry in self._session.get_inputs() if entry.type == "tensor(float16)"}
        self._inputs = {
            name: np.empty(0, np.float16 if name in narrow else self.interface.dtype) for name in self.interface.inputs
        }

    def load(self, x: NDArray) -> None:
        """Copy the batch to where it stays; `x` may be a tensor on the CPU."""
        (name,) = self.interface.inputs
        self._put(name, np.asarray(x))

    def step(self) -> list[NDArray]:
        return self._compute(self._session, list(self.interface.outputs), self._inputs)

    def _run(self, inputs: Inputs) -> Arrays:
        for name, x in inputs.items():
            self._put(name, x)
        return self._named(self.step())

    def _put(self, name: str, x: NDArray) -> None:
        if self._session is None:
            self._open()
        if self._inputs[name].shape != x.shape:
            self._inputs[name] = np.empty(x.shape, self._inputs[name].dtype)
        np.copyto(self._inputs[name], x, casting="same_kind")

    def _compute(self, session: Any, names: Sequence[str], inputs: Inputs) -> list[NDArray]:
        """The values of these names, in order; raises ExportError where ONNX Runtime does."""
        try:
            values: list[NDArray] = session.run(names, inputs)
        except Exception as error:  # its exceptions share no base class
            raise ExportError(f"{self} does not run: {first_line(error)}") from error
        return values


def open_file(content: bytes, rounded: bool, threads: int = 0, lasts: bool = True) -> Any:
    """A session for an exported file, or for its `rounded_copy`; `threads` and `lasts` as in `OnnxRunner`.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        ExportError: not an ONNX file, or ONNX Runtime refuses it; ONNX is not installed and needed.
    """
    refuse_external_data(content)
    if rounded:
        onnx = import_onnx()
        try:
            content = rounded_copy(onnx.load_model_from_string(content)).SerializeToString()
        except Exception as error:  # of protobuf, or of shape inference
            raise ExportError(f"expected an ONNX file ({first_line(error)})") from error
    return open_session(content, threads, lasts)


def open_session(content: bytes, threads: int = 0, lasts: bool = True) -> Any:
    """A session for the file as it is; raises as `open_file` does.

    One that does not last, for a few batches, keeps no memory and no second layout of the weights; its threads sleep
    while they wait, where they would compute nothing all the time.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not lasts:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return _session(content, options)


def _session(content: bytes, options: Any) -> Any:
    runtime = import_onnxruntime()
    try:
        session = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise ExportError(f"onnxruntime cannot load the ONNX file: {first_line(error)}") from error
    if session.get_providers() != ["CPUExecutionProvider"]:
        raise ExportError(f"ONNX Runtime chose {session.get_providers()}: expected CPUExecutionProvider alone")
    return session


def optimised_operators(model: onnx.ModelProto) -> Counter[str]:
    """How many of each operator ONNX Runtime runs of a file, after its own optimisations on this machine."""
    runtime, onnx = import_onnxruntime(), import_onnx()
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        _session(model.SerializeToString(), options)
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def rounded_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes every 16-bit node in float32 and rounds its result to the 16-bit type.

    That is what a 16-bit device does; the values are exact, held in float32.

    Raises:
        ExportError: ONNX gives a value another shape than the file does.
    """
    onnx = import_onnx()
    narrow_types = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if len(tensor.raw_data) > _MOST_SHAPE_BYTES:
            tensor.ClearField("raw_data")  # of weights: shape inference would copy them three times
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the ONNX file has shapes that ONNX does not infer: {first_line(error)}") from error
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    copy.CopyFrom(model)
    nodes = []
    for tensor in copy.graph.initializer:
        if tensor.data_type in narrow_types:  # half the size of what it is cast to when the file is loaded
            name, tensor.name = tensor.name, f"{tensor.name}/stored"
            nodes.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    for node in model.graph.node:
        narrow = {name: types[name] for name in node.output if types.get(name) in narrow_types}
        wide_node = onnx.NodeProto()
        wide_node.CopyFrom(node)
        wide_node.output[:] = [f"{name}/wide" if name in narrow else name for name in node.output]
        for attribute in wide_node.attribute:
            if node.op_type == "Cast" and attribute.i in narrow_types:
                attribute.i = onnx.TensorProto.FLOAT
        nodes.append(wide_node)
        for name, kind in narrow.items():
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/wide"], [f"{name}/narrow"], to=kind))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}/narrow"], [name], to=onnx.TensorProto.FLOAT))
    del copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    return copy
