"""A serialised engine made ready to use, and TensorRT's messages handed to `logging`."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from export.base.errors import ExportError
from export.runtime.engines.options import EngineConfig

log = logging.getLogger(__name__)


def make_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that writes at debug level and keeps the last error as `last_error`."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = message.splitlines()[0] if message else self.last_error
            log.debug("%s", message)

    return Logger()


def load_engine(trt: ModuleType, logger: Any, plan: bytes, config: EngineConfig) -> tuple[Any, Any]:
    """The runtime, which must outlive it, and the engine of a plan that was built with `config`.

    Raises:
        ExportError: the plan does not load on this device.
    """
    runtime = trt.Runtime(logger)
    if config.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan brings the part of TensorRT that runs it
    if config.dla_core is not None:
        runtime.DLA_core = config.dla_core
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"the engine does not load on this device: {logger.last_error}")
    return runtime, engine
