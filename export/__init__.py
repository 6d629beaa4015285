"""Take a trained ResNet-like nn.Module, fuse it, and write artefacts proved equal to the eager model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.base.batch import Batch as Batch
    from export.base.errors import ExportError as ExportError
    from export.base.errors import MissingDependency as MissingDependency
    from export.base.precision import PRECISIONS as PRECISIONS
    from export.config import ExportConfig as ExportConfig
    from export.fusion.features import with_features as with_features
    from export.fusion.program import Coverage as Coverage
    from export.fusion.program import FusedProgram as FusedProgram
    from export.fusion.program import fuse as fuse
    from export.lowering.cuda_graph import CudaGraphProgram as CudaGraphProgram
    from export.pipeline import ExportResult as ExportResult
    from export.pipeline import export_bundle as export_bundle
    from export.runtime.bundle.contents import Bundle as Bundle
    from export.runtime.bundle.contents import open_bundle as open_bundle
    from export.runtime.engines.options import EngineConfig as EngineConfig
    from export.runtime.verify import verify_bundle as verify_bundle

# Imported when first asked for: what reads and runs a bundle serves devices that have no PyTorch.
_HOMES = {
    "PRECISIONS": "base.precision",
    "Batch": "base.batch",
    "Bundle": "runtime.bundle.contents",
    "Coverage": "fusion.program",
    "CudaGraphProgram": "lowering.cuda_graph",
    "EngineConfig": "runtime.engines.options",
    "ExportConfig": "config",
    "ExportError": "base.errors",
    "ExportResult": "pipeline",
    "FusedProgram": "fusion.program",
    "MissingDependency": "base.errors",
    "export_bundle": "pipeline",
    "fuse": "fusion.program",
    "open_bundle": "runtime.bundle.contents",
    "verify_bundle": "runtime.verify",
    "with_features": "fusion.features",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
