"""How long the ONNX step takes beside a bare torch.onnx.export of the same model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from export.base.batch import DEFAULT_BATCH
from export.base.precision import PRECISIONS
from export.base.progress import Progress
from export.benchmark.candidates import plain_onnx
from export.fusion.program import fuse, output_names
from export.lowering.onnx_file import lower_onnx

ROUNDS = 3


def time_export_step(model: nn.Module, images: Tensor, progress: Progress) -> dict[str, Any]:
    """Time a bare torch.onnx.export, this project's ONNX step, and fusion with it, in turn; for JSON."""
    program = fuse(model, images)
    names = output_names(program.graph_module)

    def bare() -> object:
        return plain_onnx(model, images, DEFAULT_BATCH, names)

    def ours(precision: str) -> Callable[[], object]:
        return lambda: lower_onnx(program, PRECISIONS[precision], {}).serialize()

    def with_fusion() -> object:
        return lower_onnx(fuse(model, images), PRECISIONS["fp16"], {}).serialize()

    steps = {
        "torch.onnx.export": bare,
        "ONNX step, fp32": ours("fp32"),
        "ONNX step, fp16": ours("fp16"),
        "capture, fuse and ONNX step, fp16": with_fusion,
    }
    seconds = _take_turns(steps, progress)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    bare_median = medians["torch.onnx.export"]
    rows = [{"step": label, "median_s": m, "times_torch": m / bare_median} for label, m in medians.items()]
    return {"rounds": ROUNDS, "rows": rows}


def _take_turns(steps: dict[str, Callable[[], object]], progress: Progress) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a run that does not count."""
    for label, step in steps.items():
        progress(f"warm up {label}")
        step()
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for number in range(ROUNDS):
        for label, step in steps.items():
            progress(f"round {number + 1}: {label}")
            started = time.perf_counter()
            step()
            seconds[label].append(time.perf_counter() - started)
    return seconds
