"""Which engines an export builds, and building them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from export.base.batch import as_batch
from export.base.errors import ExportError
from export.base.precision import FORMATS
from export.base.progress import Progress
from export.config import ExportConfig
from export.runtime.engines.engine import FLAVOURS, Engine, Flavour, build_engine, why_not_buildable

_ADVICE = "lower --workspace, --batch or --optimization-level, or export with --engine none"


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


def build_engines(
    flavours: Sequence[Flavour],
    onnx_bytes: bytes,
    config: ExportConfig,
    image_shape: tuple[int, int, int],
    kept: Collection[str],
    progress: Progress,
) -> list[Engine]:
    """Build an engine of each flavour; `kept` as in `build_engine`, which raises what this raises."""
    engines = []
    for flavour in flavours:
        progress(f"build the {flavour.name} engine")
        precision, batch = FORMATS[config.precision], as_batch(config.batch)
        arguments = (flavour, precision, batch, image_shape, config.engine_config, kept, _ADVICE)
        engines.append(build_engine(onnx_bytes, *arguments))
    return engines
