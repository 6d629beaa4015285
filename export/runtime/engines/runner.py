"""A TensorRT or TensorRT-RTX engine, run in a process of its own: a crash there ends as one line here."""

from __future__ import annotations

from collections.abc import Mapping

from numpy.typing import NDArray

from export.base.batch import Arrays
from export.base.process import Child
from export.runtime.engines.engine import Engine
from export.runtime.runner import Runner

_DEVICE_ENGINE = "export.runtime.engines.run_worker:DeviceEngine"
_ADVICE = "export with a smaller ExportConfig.batch"


class TensorRTRunner(Runner):
    """An engine on the first CUDA device. Its process lives between enter and exit."""

    def __init__(self, engine: Engine, output_names: tuple[str, ...]) -> None:
        self._engine, self._output_names = engine, output_names
        self.name, self.file = engine.flavour.name, engine.flavour.file_name
        self.runtime = f"{engine.flavour.name} {engine.version}"

    def __enter__(self) -> TensorRTRunner:
        engine = self._engine
        self._child = Child(f"running the {self.name} engine", _ADVICE)
        self._child.__enter__()
        try:
            self._child.hold(_DEVICE_ENGINE, engine.flavour, engine.plan, engine.config, self._output_names)
        except BaseException as error:
            self._child.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._child.__exit__(*error)  # type: ignore[arg-type]

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        found: Arrays = self._child.call("infer", {"input": inputs["input"]})
        return found

    def time(self, inputs: Mapping[str, NDArray], count: int) -> list[float]:
        """Seconds of each of `count` runs on one batch, by the device's clock; its input is on the device already."""
        seconds: list[float] = self._child.call("time", {"input": inputs["input"]}, count)
        return seconds
