"""How an engine is built, and what each of the two TensorRT packages can be asked."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.base.errors import ExportError

if TYPE_CHECKING:
    from export.base.batch import Batch

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
DEFAULT_TARGETS = TARGETS[1:]  # of TensorRT-RTX, where none are asked for
_LEVELS = range(6)
_RTX_TAKES = ("workspace_mib", "targets")  # no level: its engine is the same, to the byte, at each


@dataclass(frozen=True)
class EngineConfig:
    """How to build an engine; a value that is None or empty leaves it to TensorRT.

    Attributes:
        workspace_mib: the most memory a kernel may use for itself, in MiB: the lever where memory is short. Of
            TensorRT-RTX all that a build uses, the weights included.
        optimization_level: 0 to 5, how long to look for faster kernels.
        timing_cache: a file of measured kernels, read and written: the next build on this device is faster.
        version_compatible: later versions of the same major version run the engine too, at some cost in speed.
        hardware_compatible: every GPU from Ampere on runs the engine, at some cost in speed.
        targets: the GPUs to build for, of TARGETS; TensorRT-RTX's own choice is DEFAULT_TARGETS.
        dla_core: the deep-learning accelerator that is to run every convolution and matrix product.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    targets: tuple[str, ...] = ()
    dla_core: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ExportError(f"EngineConfig.workspace_mib: expected at least 1 MiB, got {self.workspace_mib}")
        if self.optimization_level is not None and self.optimization_level not in _LEVELS:
            expected = f"expected 0 to {_LEVELS[-1]}"
            raise ExportError(f"EngineConfig.optimization_level: {expected}, got {self.optimization_level}")
        if self.dla_core is not None and self.dla_core < 0:
            raise ExportError(f"EngineConfig.dla_core: expected the number of a core, 0 or more, got {self.dla_core}")
        for target in self.targets:
            if target not in TARGETS:
                raise ExportError(
                    f"EngineConfig.targets: TensorRT-RTX builds for {', '.join(TARGETS)}, not for Orin (sm_87), "
                    f"H100 and H200 (sm_90) or Thor (sm_110); got {target!r}"
                )
        if len(set(self.targets)) < len(self.targets):
            raise ExportError(f"EngineConfig.targets: expected each GPU once, got {' '.join(self.targets)}")
        path = self.timing_cache
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ExportError(f"EngineConfig.timing_cache: expected a file in a folder that exists, got {path}")

    @property
    def given(self) -> list[str]:
        """What is asked for, by the names of the fields as messages have them."""
        return _named(self._given())

    def why_not(self, flavour: str, precision: str, batch: Batch) -> str:
        """Why a flavour cannot build what is asked, empty where it can as far as is known without building."""
        taken = _RTX_TAKES if flavour == "tensorrt-rtx" else [f.name for f in fields(self) if f.name != "targets"]
        foreign = [name for name in self._given() if name not in taken]
        if foreign:
            return f"does not take {', '.join(_named(foreign))}; it takes {', '.join(_named(taken))}"
        if flavour == "tensorrt-rtx" and precision == "bf16" and "sm_75" in self.targets:
            return "EngineConfig.targets: sm_75 has no bfloat16; leave it out, or ExportConfig.precision='fp16'"
        if self.hardware_compatible and platform.machine() == "aarch64":
            return "EngineConfig.hardware_compatible: engines for other GPUs are not built on Jetson or aarch64"
        if self.dla_core is not None and precision not in ("fp16", "int8"):
            expected = "expected ExportConfig.precision='fp16' or ExportConfig.precision='int8'"
            return f"EngineConfig.dla_core: {expected}, got ExportConfig.precision={precision!r}"
        if self.dla_core is not None and not batch.static:
            expected = f"expected a static batch, such as ExportConfig.batch={batch.optimum}"
            return f"EngineConfig.dla_core: {expected}, got ExportConfig.batch={batch}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """What is asked for and matters after the build."""
        return {name: value for name, value in self._given().items() if name != "timing_cache"}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EngineConfig:
        """Read `to_json`; raises ExportError or TypeError for what it did not write."""
        return cls(**{**record, "targets": tuple(record.get("targets", ()))})

    def _given(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def _named(names: Iterable[str]) -> list[str]:
    return [f"EngineConfig.{name}" for name in names]


DEFAULT_ENGINE = EngineConfig()
