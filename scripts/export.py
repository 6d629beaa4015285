"""Export a ResNet to a bundle: ONNX file, TensorRT engine, and the proof that they equal the eager model."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be this file

import torch

from export import Batch, ExportConfig, ExportError, ExportResult, export_bundle
from export.capture import as_batch, first_line
from export.console import Parser, Progress, print_rungs
from export.images import crops, open_images, photographs, preprocessing
from export.pipeline import PARITY_IMAGES
from resnet import MODELS, create_model, initialise, load_weights

CALIBRATION_IMAGES = 16
CALIBRATION_SEED = 1  # other crops than those the result is checked on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="default resnet50")
    parser.add_argument("--weights", metavar="PATH", help=".safetensors, .pt or .pth; absent: seeded, untrained")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: the model's, 1000 or 10")
    parser.add_argument("--in-channels", type=int, default=3, metavar="N", help="default 3")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--precision", choices=("fp32", "fp16", "bf16", "int8"), default="fp32")
    for name in ("fp32", "fp16", "bf16", "int8"):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name)
    parser.add_argument("--batch", default="1:8:32", metavar="MIN:OPT:MAX|N", help="default 1:8:32; N is static")
    parser.add_argument("--image-size", metavar="H[xW]", help="default: the model's, 224 or 32")
    parser.add_argument("--engine", choices=("auto", "none", "tensorrt", "tensorrt-rtx"), default="auto")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="pictures to compare on")
    parser.add_argument("--calibration", metavar="DIR", help="int8 only")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default build/<model>-<precision>")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("resnet").setLevel(logging.INFO)
    try:
        with Progress() as progress:
            result = run(args, progress)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        sys.stderr.write(f"export.py: error: {first_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("export.py: interrupted\n")
        return 130
    summarise(args, result)
    return 0 if result else 1


def run(args: argparse.Namespace, progress: Progress) -> ExportResult:
    """Make the model the arguments describe and export it."""
    if args.precision == "int8" or args.calibration:
        raise ExportError("--int8 and --calibration are not available yet; expected --fp32, --fp16 or --bf16")
    if args.weights == "pretrained":
        raise ExportError("--weights pretrained is not available yet; expected the path of a weights file")
    config = ExportConfig(args.precision, parse_batch(args.batch), args.engine)
    model = create_model(args.model, num_classes=args.num_classes, in_channels=args.in_channels)
    height, width = parse_size(args.image_size) if args.image_size else (MODELS[args.model].image_size,) * 2
    pictures = open_images(args.images) if args.images else photographs()
    images = crops(pictures, max(PARITY_IMAGES, len(pictures)), args.in_channels, (height, width))
    metadata: dict[str, Any] = {
        "name": args.model,
        "trained": args.weights is not None,
        "preprocessing": preprocessing(args.in_channels),
    }
    if args.weights is not None:
        progress("load the weights")
        info = load_weights(model, args.weights)
        metadata["weights"] = {"file": Path(info.path).name, "sha256": info.sha256}
    else:
        progress("initialise: UNTRAINED, seeded weights with calibrated BatchNorm")
        calibration = crops(photographs(), CALIBRATION_IMAGES, args.in_channels, (height, width), CALIBRATION_SEED)
        initialise(model, calibration)
        metadata["weights"] = "UNTRAINED: seed 0"
    output = args.output or Path("build") / f"{args.model}-{args.precision}"
    example = torch.zeros(1, args.in_channels, height, width)
    return export_bundle(model.eval(), example, output, config, images=images, metadata=metadata, progress=progress)


def parse_batch(text: str) -> Batch:
    """`8` is static, `1:8:32` is minimum, optimum and maximum."""
    try:
        sizes = [int(part) for part in text.split(":")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3):
        raise ExportError(f"--batch: expected MIN:OPT:MAX or one number, got {text!r}")
    return Batch(*sizes) if len(sizes) == 3 else as_batch(sizes[0])


def parse_size(text: str) -> tuple[int, int]:
    """`224` is square, `224x320` is height and width in pixels."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ExportError(f"--image-size: expected H or HxW in pixels, got {text!r}")
    return sizes[0], sizes[-1]


def summarise(args: argparse.Namespace, result: ExportResult) -> None:
    """What was found and, last, what to do next."""
    coverage, report = result.coverage, result.report
    if args.json:
        record = {
            "model": args.model,
            "trained": args.weights is not None,
            "precision": report.precision,
            "output": str(result.output) if result else None,
            "fused": len(coverage.fused),
            "left": [operator.name for operator in coverage.left],
            "files": dict(result.files),
            "skipped": dict(result.skipped),
            "seconds": round(result.seconds, 1),
            **report.to_json(),
        }
        print(json.dumps(record))
        return
    print_rungs(report.rungs, result.files)
    print(f"{len(coverage.fused)} fused operators; left: {', '.join(op.name for op in coverage.left) or 'none'}")
    for rung in report.rungs:
        if rung.operators is not None and rung.operators.unchecked:
            print(f"{rung.name}: no operator criterion for {', '.join(rung.operators.unchecked)}")
    for name, reason in result.skipped.items():
        print(f"{name} engine not built: {reason}")
    for weakness in report.evidence.weaknesses:
        print(f"weak evidence: {weakness}")
    if args.weights is None:
        print("UNTRAINED weights: this checks the export, not the network; give --weights to deploy")
    print(f"{report.verdict} ({report.images} images, {result.seconds:.0f} s)")
    if result:
        print(f"{result.output} written; next: python scripts/verify.py {result.output}")
    else:
        print(f"nothing written to {result.output}")


if __name__ == "__main__":
    sys.exit(main())
