"""Take a trained ResNet-like nn.Module, fuse it, and write artefacts proved equal to the eager model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.batch import Batch as Batch
    from export.config import ExportConfig as ExportConfig
    from export.errors import ExportError as ExportError
    from export.errors import MissingDependency as MissingDependency
    from export.pipeline import ExportResult as ExportResult
    from export.pipeline import export_bundle as export_bundle
    from export.program import Coverage as Coverage
    from export.program import FusedProgram as FusedProgram
    from export.program import fuse as fuse
    from export.verify import verify_bundle as verify_bundle

# Imported when first asked for: what reads and runs a bundle serves devices that have no PyTorch.
_HOMES = {
    "Batch": "batch",
    "Coverage": "program",
    "ExportConfig": "config",
    "ExportError": "errors",
    "ExportResult": "pipeline",
    "FusedProgram": "program",
    "MissingDependency": "errors",
    "export_bundle": "pipeline",
    "fuse": "program",
    "verify_bundle": "verify",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
