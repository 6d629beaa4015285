"""Take a trained ResNet-like nn.Module, fuse it, and write artefacts proved equal to the eager model."""

from export.capture import Batch
from export.errors import ExportError, MissingDependency
from export.pipeline import ExportConfig, ExportResult, export_bundle
from export.program import Coverage, FusedProgram, fuse
from export.verify import verify_bundle

__all__ = [
    "Batch",
    "Coverage",
    "ExportConfig",
    "ExportError",
    "ExportResult",
    "FusedProgram",
    "MissingDependency",
    "export_bundle",
    "fuse",
    "verify_bundle",
]
