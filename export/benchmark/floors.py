"""What one image costs at each level of fusion: counted from the programs, with nothing run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from export.base.batch import DEFAULT_BATCH, Batch
from export.base.precision import Precision
from export.base.progress import Progress
from export.benchmark.roofline import workloads
from export.fusion.passes import LEVELS
from export.fusion.program import FusedProgram, fuse


def count_floors(model: nn.Module, example: Tensor, precision: Precision, progress: Progress) -> dict[str, Any]:
    """FLOPs, bytes and kernels of one image per level, for JSON; of `example` [N, C, H, W] only the shape matters."""
    programs = fused_at(LEVELS, model, example, DEFAULT_BATCH, progress)
    rows = [
        {
            "level": level,
            "flops": sum(work.flops for work in works),
            "weight_bytes": sum(work.weight_bytes for work in works),
            "activation_bytes": sum(work.activation_bytes for work in works),
            "kernels": len(works),
        }
        for level, works in workloads(programs, precision, 1).items()
    ]
    return {"precision": precision.name, "rows": rows}


def fused_at(
    levels: Iterable[str], model: nn.Module, images: Tensor, batch: Batch, progress: Progress
) -> dict[str, FusedProgram]:
    """Level of fusion -> the program."""
    programs = {}
    for level in levels:
        progress(f"capture and fuse, level {level}")
        programs[level] = fuse(model, images, batch, level)
    return programs
