"""OpenVINO on the CPU, in the arithmetic of the file and in none that OpenVINO would rather have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Inputs
from export.base.errors import ExportError, MissingDependency, first_line
from export.base.machine import cpu_has
from export.base.precision import INT8, Precision
from export.runtime.onnx_session import CPU_ONNX_FILE, ONNX_FILE
from export.runtime.onnx_wire import refuse_external_data
from export.runtime.runner import Interface, TimedRunner

if TYPE_CHECKING:
    from typing_extensions import Self

OPENVINO = "openvino"
_SINGLE = "f32"
# What OpenVINO is told to compute in: left to itself, it takes bfloat16 for a file of float32 where the CPU has that.
# What an int8 file leaves in floating point is little: float32 takes no longer for it, where float16 can ruin it.
_ARITHMETIC = {"fp32": _SINGLE, "fp16": "f16", "bf16": "bf16", "int8": _SINGLE}
_CAPABILITIES = {"f16": "FP16", "bf16": "BF16"}  # of a CPU, as OpenVINO calls them


def import_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingDependency(OPENVINO, OPENVINO, error) from error
    return openvino


def openvino_version() -> str:
    """The version that is installed, without its build; raises as `import_openvino` does."""
    return str(import_openvino().__version__).partition("-")[0]


def openvino_file(precision: Precision) -> str:
    """Which file of a bundle it runs fastest.

    In 8 bits the one for ONNX Runtime: with VNNI, whose activations are unsigned, ResNet-50 takes 0.9 of what it takes
    from the one for TensorRT. With AMX, that one was seen to run twice as fast as the other does in ONNX Runtime.
    """
    return CPU_ONNX_FILE if precision == INT8 and not cpu_has("amx_int8") else ONNX_FILE


class OpenVINORunner(TimedRunner):
    """An ONNX file in OpenVINO on the CPU. What is compiled lives between enter and exit."""

    name = runtime = OPENVINO

    def __init__(self, read: Callable[[], bytes], interface: Interface, precision: Precision, threads: int = 0) -> None:
        """Nothing is read yet.

        Args:
            read: gives the file.
            interface: its inputs and outputs by their names in the file.
            precision: of the file.
            threads: that run it; 0 leaves it to OpenVINO.
        """
        super().__init__(interface)
        self._read, self._precision, self._threads = read, precision, threads

    def __enter__(self) -> Self:
        openvino, content = import_openvino(), self._read()
        self.runtime = f"{OPENVINO} {openvino_version()}"
        refuse_external_data(content)
        try:
            core = openvino.Core()
            wanted = _arithmetic(self._precision, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
            options = {"INFERENCE_PRECISION_HINT": wanted, "INFERENCE_NUM_THREADS": self._threads}
            model = core.read_model(content)
            batch = self.interface.batch
            if batch is not None and batch.static:  # a batch that is known makes faster code
                model.reshape({port: [batch.minimum, *port.partial_shape[1:]] for port in model.inputs})
            compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options})
            found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        except Exception as error:  # whatever its plugins raise
            raise ExportError(f"openvino cannot load the ONNX file: {first_line(error)}") from error
        if found != wanted:
            raise ExportError(f"openvino would compute in {found}: expected {wanted}")
        self._request, self._inputs = compiled.create_infer_request(), dict[str, NDArray]()
        return self

    def __exit__(self, *error: object) -> None:
        del self._request, self._inputs

    def load(self, x: NDArray) -> None:
        """Copy the batch to where it stays; `x` may be a tensor on the CPU."""
        (name,) = self.interface.inputs
        self._inputs = {name: np.array(np.asarray(x), self.interface.dtype, order="C")}

    def step(self) -> Any:
        """The outputs of the request, which the next step overwrites."""
        return self._compute(self._inputs)

    def _run(self, inputs: Inputs) -> Arrays:
        results = self._compute({name: np.ascontiguousarray(x) for name, x in inputs.items()})
        return {name: np.array(results[name]) for name in self.interface.outputs}

    def _compute(self, inputs: Inputs) -> Any:
        """The results by name; raises ExportError where OpenVINO does."""
        try:
            return self._request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        except Exception as error:  # whatever its plugins raise
            raise ExportError(f"{self} does not run: {first_line(error)}") from error


def _arithmetic(precision: Precision, capabilities: list[str]) -> str:
    """What OpenVINO is to compute in: the type of the file, or float32 on a CPU that does not compute in that type.

    Asked for float16 on such a CPU, OpenVINO takes bfloat16.
    """
    wanted = _ARITHMETIC[precision.name]
    return wanted if wanted == _SINGLE or _CAPABILITIES[wanted] in capabilities else _SINGLE
