"""Time the writing of an ONNX file by this project and by torch alone, in turn, in one run."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

import torch
from rich.console import Console
from rich.table import Table

from export import ExportError, fuse
from export.capture import DEFAULT_BATCH
from export.console import Parser, Progress
from export.images import crops, photographs
from export.lowering.onnx_file import lower_onnx
from export.precision import PRECISIONS
from resnet import MODELS, create_model, initialise

ROUNDS = 3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="benchmark.py", description=__doc__)
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="default resnet50")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with Progress() as progress:
            seconds = onnx_step(args.model, progress)
    except (ExportError, ValueError) as error:
        sys.stderr.write(f"benchmark.py: error: {error}\n")
        return 2
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}"
    table = Table("step", "median s", "ratio", title=f"{args.model}, {ROUNDS} rounds; {machine}")
    for name, median in medians.items():
        table.add_row(name, f"{median:.2f}", f"{median / medians['torch.onnx.export']:.2f}")
    Console().print(table)
    return 0


def onnx_step(name: str, progress: Progress) -> dict[str, list[float]]:
    """Seconds of a bare torch.onnx.export, of this project's ONNX step and of fusion with it, taken in turn."""
    model = create_model(name)
    size = MODELS[name].image_size
    images = crops(photographs(), 4, 3, (size, size))
    initialise(model, images)

    def bare() -> None:
        batch = torch.export.Dim("batch", min=DEFAULT_BATCH.minimum, max=DEFAULT_BATCH.maximum)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                model, (images,), dynamo=True, opset_version=18, dynamic_shapes=({0: batch},), verbose=False
            )
        assert exported is not None
        exported.model_proto.SerializeToString()

    def ours(precision: str) -> Callable[[], None]:
        def step() -> None:
            lower_onnx(program, images, PRECISIONS[precision], {}).serialize()

        return step

    program = fuse(model, images)

    def with_fusion() -> None:
        lower_onnx(fuse(model, images), images, PRECISIONS["fp16"], {}).serialize()

    steps = {
        "torch.onnx.export": bare,
        "ONNX step, fp32": ours("fp32"),
        "ONNX step, fp16": ours("fp16"),
        "capture, fuse and ONNX step, fp16": with_fusion,
    }
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for label, step in steps.items():
        progress(f"warm up {label}")
        step()
    for round_number in range(ROUNDS):
        for label, step in steps.items():
            progress(f"round {round_number + 1}: {label}")
            started = time.perf_counter()
            step()
            seconds[label].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
