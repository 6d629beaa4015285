"""What to export and how."""

from __future__ import annotations

from dataclasses import dataclass

from export.base.batch import DEFAULT_BATCH, Batch, as_batch
from export.base.errors import ExportError
from export.base.precision import FORMATS, INT8
from export.quantisation.calibration import DEFAULT_METHOD, METHODS
from export.runtime.engines.engine import FLAVOURS, Flavour, why_not_buildable
from export.runtime.engines.options import DEFAULT_ENGINE, EngineConfig

AUTO = "auto"


@dataclass(frozen=True)
class ExportConfig:
    """What to export.

    Attributes:
        precision: `fp32`, `fp16`, `bf16` or `int8`.
        batch: the batch sizes the artefacts accept; also (minimum, optimum, maximum) or one static size.
        engine: `none`, `tensorrt`, `tensorrt-rtx`, or `auto` for each that can be built here.
        engine_config: how engines are built.
        calibration_method: int8 only; one of `export.quantisation.calibration.METHODS`.
        keep_fp16: int8 only; layers, or modules that hold them, to keep in floating point: float16 for TensorRT,
            float32 for CPUs. `auto` finds the fewest with which the accuracy is retained.
        keep_fp32: fp16 and bf16 only; layers, or modules that hold them, to keep in float32. `auto` finds the fewest
            with which the network is equal to the eager model.
    """

    precision: str = "fp32"
    batch: Batch | tuple[int, int, int] | int = DEFAULT_BATCH
    engine: str = "auto"
    engine_config: EngineConfig = DEFAULT_ENGINE
    calibration_method: str = DEFAULT_METHOD
    keep_fp16: tuple[str, ...] | str = ()
    keep_fp32: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        if self.precision not in FORMATS:
            raise ExportError(f"expected a precision of {', '.join(FORMATS)}, got {self.precision!r}")
        if self.calibration_method not in METHODS:
            expected = ", ".join(METHODS)
            raise ExportError(f"expected a calibration method of {expected}, got {self.calibration_method!r}")
        object.__setattr__(self, "batch", as_batch(self.batch))
        if self.engine not in ("auto", "none", *FLAVOURS):
            raise ExportError(f"expected an engine of auto, none, {', '.join(FLAVOURS)}, got {self.engine!r}")
        for flag, names, precisions in (
            ("--keep-fp16", self.keep_fp16, (INT8.name,)),
            ("--keep-fp32", self.keep_fp32, ("fp16", "bf16")),
        ):
            if names and self.precision not in precisions:
                raise ExportError(f"{flag} is for --{' and --'.join(precisions)}, got --{self.precision}")
            if isinstance(names, str) and names != AUTO:
                raise ExportError(f"{flag}: expected {AUTO} or a tuple of names, got {names!r}")
            if AUTO in names and names != AUTO:
                raise ExportError(f"{flag}: expected {AUTO} or names, got both: {' '.join(names)}")


def choose_flavours(config: ExportConfig) -> tuple[list[Flavour], dict[str, str]]:
    """The flavours to build, and why the others are not: name -> reason.

    Raises:
        ExportError: one that was asked for, or an option of engines, is not to be had here.
    """
    asked, batch = config.engine_config, as_batch(config.batch)
    if config.engine == "none":
        if asked.flags:
            raise ExportError(f"{', '.join(asked.flags)}: expected an engine to build, got --engine none")
        return [], {}
    reasons = {}
    for name, flavour in FLAVOURS.items():
        if config.engine in ("auto", name):
            why_not = asked.why_not(name, config.precision, batch)
            reasons[name] = why_not or why_not_buildable(flavour, asked.dla_core)
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if config.engine in skipped or (asked.flags and skipped.keys() == reasons.keys()):
        raise ExportError("; ".join(f"--engine {name}: {reason}" for name, reason in skipped.items()))
    return [FLAVOURS[name] for name in reasons if name not in skipped], skipped
