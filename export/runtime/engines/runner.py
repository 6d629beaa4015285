"""An engine, of TensorRT or of kernels, run in a process of its own: a crash there ends as one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from export.base.batch import Arrays, Inputs
from export.base.process import Child
from export.runtime.engines.engine import Engine
from export.runtime.runner import Interface, TimedRunner

if TYPE_CHECKING:
    from typing_extensions import Self

_DEVICE_ENGINE = "export.runtime.engines.run_worker:DeviceEngine"
_KERNEL_ENGINE = "export.runtime.engines.kernel_engine:KernelEngine"
_ADVICE = "export with a smaller ExportConfig.batch"


class EngineRunner(TimedRunner):
    """What runs on the first CUDA device. Its process lives between enter and exit."""

    in_host_memory = False

    def __init__(self, interface: Interface, target: str, *arguments: Any) -> None:
        """`target` is the class that the process holds, of these arguments and the names of inputs and outputs."""
        super().__init__(interface)
        self._target, self._arguments = target, arguments

    def __enter__(self) -> Self:
        names = tuple(self.interface.inputs), tuple(self.interface.outputs)
        self._child = Child(f"running the {self.name} engine", _ADVICE)
        self._child.__enter__()
        try:
            self._child.hold(self._target, *self._arguments, *names)
        except BaseException as error:
            self._child.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._child.__exit__(*error)

    def load(self, x: NDArray) -> None:
        """`x` is of the engine's type and contiguous: its way to the device is not part of what `time` says."""
        (name,) = self.interface.inputs
        self._inputs: Inputs = {name: x}

    def step(self) -> Arrays:
        found: Arrays = self._child.call("infer", self._inputs)
        return found

    def time(self, count: int) -> list[float]:
        """Seconds of each of `count` runs on what was loaded, by the device's clock; all of it is on the device."""
        seconds: list[float] = self._child.call("time", self._inputs, count)
        return seconds

    def _run(self, inputs: Inputs) -> Arrays:
        self._inputs = inputs
        return self.step()


class TensorRTRunner(EngineRunner):
    """An engine of TensorRT or TensorRT-RTX."""

    def __init__(self, engine: Engine, interface: Interface) -> None:
        super().__init__(interface, _DEVICE_ENGINE, engine.flavour, engine.plan, engine.config)
        self.name, self.file = engine.flavour.name, engine.flavour.file_name
        self.runtime = f"{engine.flavour.name} {engine.version}"


class KernelRunner(EngineRunner):
    """An engine of this project's own kernels."""

    name, runtime = "kernels", "CUDA driver"

    def __init__(self, content: bytes, interface: Interface) -> None:
        """`content` is that of its file."""
        super().__init__(interface, _KERNEL_ENGINE, content)
