"""Export a ResNet to a bundle: ONNX file, TensorRT engine, and the proof that they equal the eager model."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be this file

from export.quantisation.methods import DEFAULT_METHOD, METHODS
from export.runtime.engines.options import TARGETS, EngineConfig
from export.terminal.command_line import Parser, importing, run_script
from export.terminal.commands import typed
from export.terminal.flags import in_flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("export", __doc__)
    parser.add_argument("--model", metavar="NAME", help="default: what the weights are for, else resnet50")
    parser.add_argument(
        "--weights",
        metavar="PATH|pretrained",
        help=".safetensors, .pt, .pth, .pth.tar, .ckpt, .bin, .th, .pkl or .model; absent: seeded, untrained",
    )
    parser.add_argument(
        "--weights-key",
        metavar="KEY",
        help="of a checkpoint with several networks in it, the one to take: state_dict_ema, teacher, ...; default: "
        "the first that is no average",
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: the weights', else 1000 or 10")
    parser.add_argument("--in-channels", type=int, metavar="N", help="default: the weights', else 3")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--precision", choices=("fp32", "fp16", "bf16", "int8"), default="fp32")
    for name in ("fp32", "fp16", "bf16", "int8"):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name)
    parser.add_argument("--batch", default="1:8:32", metavar="MIN:OPT:MAX|N", help="default 1:8:32; N is static")
    parser.add_argument("--image-size", metavar="H[xW]", help="default: the weights', else 224 or 32")
    parser.add_argument(
        "--input",
        choices=("float32", "uint8"),
        default="float32",
        help="what the artefacts take: float32 [N, C, H, W], normalised, or uint8 [N, H, W, C], bytes as a camera or "
        "decoder gives them, with mean and deviation in the artefacts; default float32",
    )
    parser.add_argument("--engine", choices=("auto", "none", "tensorrt", "tensorrt-rtx"), default="auto")
    add_engine_arguments(parser)
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=(),
        metavar="SM|auto",
        help="GPU architectures to compile this project's own kernels for, such as sm_87 (Orin): they run there with "
        "the driver alone; auto: that of the GPU here",
    )
    parser.add_argument("--images", nargs="+", metavar="PATH", help="pictures to compare on")
    parser.add_argument(
        "--outputs",
        choices=("scores", "values"),
        help="what the network returns: scores of classes, whose highest may not change, or values such as landmarks; "
        "default: found out from labels, names of classes and the last operator",
    )
    parser.add_argument(
        "--unverified",
        action="store_true",
        help="where nothing is wrong but the evidence is too weak for a verdict: write a bundle marked as such; the "
        "exit code is 1 all the same",
    )
    parser.add_argument(
        "--data",
        metavar="digits|PATH",
        help="labelled pictures to measure accuracy on; default digits where the weights were trained on them",
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="int8: a folder of pictures like those the network will see, 100 or more; or digits, or an archive of "
        "CIFAR; default digits where the weights were trained on them",
    )
    parser.add_argument("--calibration-method", choices=METHODS, help=f"int8: default {DEFAULT_METHOD}")
    parser.add_argument(
        "--keep-fp16",
        nargs="+",
        default=(),
        metavar="NAME|auto",
        help="int8: layers, or modules with all their layers, to leave in floating point; auto: the fewest with which "
        "the accuracy is retained",
    )
    parser.add_argument(
        "--keep-fp32",
        nargs="+",
        default=(),
        metavar="NAME|auto",
        help="fp16 and bf16: layers, or modules with all their layers, to leave in float32; auto: the fewest with "
        "which the network is equal to the eager model",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default build/<model>-<precision>")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on stdout")
    return parser.parse_args(argv)


def add_engine_arguments(parser: Parser) -> None:
    """How engines are built; what a flavour of TensorRT does not take is refused, or with auto leaves it out."""
    parser.add_argument("--workspace", type=int, metavar="MIB", help="memory a kernel of an engine may use for itself")
    parser.add_argument("--optimization-level", type=int, metavar="N", help="0 to 5: how long to look for fast kernels")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="measured kernels, read and written")
    parser.add_argument("--version-compatible", action="store_true", help="engines for later minor versions too")
    parser.add_argument("--hardware-compatible", action="store_true", help="engines for every GPU from Ampere on")
    parser.add_argument("--targets", nargs="+", default=(), metavar="SM", help=f"tensorrt-rtx: of {' '.join(TARGETS)}")
    parser.add_argument("--dla", type=int, metavar="CORE", help="the deep-learning accelerator of a Jetson Orin")


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("export"):
    import numpy as np
    import torch
    from torch import Tensor

    from export import Batch, ExportConfig, ExportError, ExportResult, export_bundle
    from export.base.batch import UINT8
    from export.pipeline import PARITY_IMAGES
    from export.sample_inputs import byte_crops, crops, photographs
    from export.terminal.console import Progress, print_accuracy, print_quantisation, print_rungs
    from resnet.data.calibration_pictures import PictureInputs, open_calibration
    from resnet.data.labelled import LabelledInputs
    from resnet.data.preprocessing import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        MOST_PIXELS,
        Preprocessing,
        imagenet_preprocessing,
        open_picture,
    )
    from resnet.data.sources import open_test
    from resnet.errors import ResNetError
    from resnet.initialise import initialise
    from resnet.model_card import read_model_card
    from resnet.models import MODELS, create_model
    from resnet.pretrained import download
    from resnet.weights import load_weights, recognise_weights


DEFAULT_MODEL = "resnet50"
PRETRAINED = "pretrained"  # as a value of --weights: the published file of that model
MOST_IMAGES = 2**31 - 1  # of a batch
CALIBRATION_IMAGES = 16
CALIBRATION_SEED = 1  # other crops than those the result is checked on


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.command = f"{typed('export')} {shlex.join(sys.argv[1:] if argv is None else argv)}".rstrip()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("resnet").setLevel(logging.INFO)
    return run_script("export", args, export, refusals=(ResNetError,))


def export(args: argparse.Namespace) -> int:
    """Export what the arguments describe and say what was found; the exit code, which is 1 for what is not equal."""
    source = taking(args.input, describe_source(args, parse_size(args.image_size) if args.image_size else None))
    with Progress() as progress:
        result = run(args, source, progress)
    summarise(args, source, result)
    return 0 if result else 1


def run(args: argparse.Namespace, source: Source, progress: Progress) -> ExportResult:
    """Make the model and export it."""
    check_int8_arguments(args)
    config = ExportConfig(
        precision=args.precision,
        batch=parse_batch(args.batch),
        engine=args.engine,
        engine_config=engine_config(args),
        calibration_method=args.calibration_method or DEFAULT_METHOD,
        keep_fp16=args.keep_fp16,
        keep_fp32=args.keep_fp32,
        outputs=args.outputs or ("scores" if args.weights == PRETRAINED else "auto"),
        unverified=args.unverified,
        kernels=args.kernels,
        input=args.input,
    )
    model = create_model(source.model, num_classes=source.num_classes, in_channels=source.in_channels)
    labelled = open_labelled(args, source)
    calibration = open_calibration_inputs(args, source, labelled)
    pictures = [open_picture(path).convert("RGB") for path in args.images or ()] or photographs()

    def cut(count: int, seed: int) -> Tensor:
        return crops(pictures, count, source.in_channels, source.size, seed, source.mean, source.std)

    count = max(PARITY_IMAGES, len(pictures))
    if labelled is not None and not args.images:
        images = spread(labelled, PARITY_IMAGES)
    elif args.input == UINT8:
        images = byte_crops(pictures, count, source.in_channels, source.size)
    else:
        images = cut(count, seed=0)
    metadata: dict[str, Any] = {
        "name": source.model,
        "trained": args.weights is not None,
        "preprocessing": source.preprocessing and source.preprocessing.to_json(),
        "classes": source.classes and list(source.classes),
        "data": source.data or None,
    }
    if args.weights is not None:
        path = args.weights
        if path == PRETRAINED:
            progress("fetch the published weights")
            path = download(source.model, progress=progress.transferred)
        progress("load the weights")
        info = load_weights(model, path, key=args.weights_key)
        metadata["weights"] = {"file": Path(info.path).name, "sha256": info.sha256}
        if info.others:
            metadata["weights"]["key"] = info.key
    else:
        progress("initialise: UNTRAINED, seeded weights with calibrated BatchNorm")
        initialise(model, cut(CALIBRATION_IMAGES, CALIBRATION_SEED))
        metadata["weights"] = "UNTRAINED: seed 0"
    return export_bundle(
        model.eval(),
        torch.zeros(1, source.in_channels, *source.size),
        args.output or Path("build") / f"{source.model}-{args.precision}",
        config,
        images=images,
        labelled=labelled,
        calibration=calibration,
        metadata=metadata,
        command=args.command,
        progress=progress,
    )


def check_int8_arguments(args: argparse.Namespace) -> None:
    """Refuse flags of calibration in another precision."""
    flags = {"--calibration": args.calibration, "--calibration-method": args.calibration_method}
    given = [flag for flag, value in flags.items() if value]
    if args.precision != "int8" and given:
        raise ExportError(f"{', '.join(given)}: for --int8, got --{args.precision}")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        workspace_mib=args.workspace,
        optimization_level=args.optimization_level,
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        targets=tuple(args.targets),
        dla_core=args.dla,
    )


@dataclass(frozen=True)
class Source:
    """What is exported and what it is fed: from the flags, else from the card in the weights, else by default.

    Attributes:
        size: height and width of the input in pixels.
        preprocessing: from a picture to the input; None where pictures do not have that many channels.
        classes: what the logits stand for; None where nobody said.
        data: what the weights were trained on, empty where nobody said.
    """

    model: str
    num_classes: int | None
    in_channels: int
    size: tuple[int, int]
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None = None
    data: str = ""

    @property
    def mean(self) -> tuple[float, ...]:
        return self.preprocessing.mean if self.preprocessing else IMAGENET_MEAN

    @property
    def std(self) -> tuple[float, ...]:
        return self.preprocessing.std if self.preprocessing else IMAGENET_STD


def describe_source(args: argparse.Namespace, size: tuple[int, int] | None) -> Source:
    own = args.weights not in (None, PRETRAINED)
    if args.weights_key is not None and not own:
        raise ExportError(f"--weights-key: for --weights PATH, got {args.weights or 'no weights'}")
    card = read_model_card(args.weights) if own else None
    if card is None:
        name, channels, classes = args.model or DEFAULT_MODEL, args.in_channels, args.num_classes
        if own and args.model is None:
            network = recognise_weights(args.weights, args.weights_key)
            if network is not None and network.certain:
                name = network.name
                channels = network.in_channels if channels is None else channels
                classes = network.num_classes if classes is None else classes
        channels = 3 if channels is None else channels
        size = size or (MODELS[name].image_size if name in MODELS else 224,) * 2  # create_model refuses other names
        preprocessing = imagenet_preprocessing(channels)
        return Source(name, classes, channels, size, preprocessing and preprocessing.at(size))
    card.check(args.weights, args.model, args.num_classes, args.in_channels)
    preprocessing = card.preprocessing.at(size) if size else card.preprocessing
    channels = preprocessing.channels
    return Source(card.model, len(card.classes), channels, preprocessing.size, preprocessing, card.classes, card.data)


def taking(dtype: str, source: Source) -> Source:
    """What is fed as the artefacts take it; raises ExportError for bytes where the inputs are no pictures."""
    if dtype != UINT8:
        return source
    if source.preprocessing is None:
        raise ExportError(
            f"--input {dtype}: expected a model for pictures of 1 or 3 channels, got {source.in_channels}"
        )
    return replace(source, preprocessing=replace(source.preprocessing, as_bytes=True))


def open_labelled(args: argparse.Namespace, source: Source) -> LabelledInputs | None:
    """The labelled inputs to measure accuracy on: --data, or the digits for weights that were trained on them."""
    name = args.data or ("digits" if source.data == "digits" else None)
    if name is None:
        return None
    if args.weights is None:
        raise ExportError("--data: expected trained weights to measure, got none; give --weights")
    if source.preprocessing is None:
        raise ExportError(f"--data: expected a model for pictures of 1 or 3 channels, got {source.in_channels}")
    return LabelledInputs(open_test(name, {source.data}), source.preprocessing)


def open_calibration_inputs(
    args: argparse.Namespace, source: Source, labelled: LabelledInputs | None
) -> PictureInputs | None:
    """The inputs to calibrate on: --calibration, or the digits for weights that were trained on them."""
    name = args.calibration or ("digits" if source.data == "digits" and args.precision == "int8" else None)
    if name is None:
        return None
    if source.preprocessing is None:
        raise ExportError(f"--calibration: expected a model for pictures of 1 or 3 channels, got {source.in_channels}")
    measured = labelled.pictures.pictures if labelled is not None else ()
    return open_calibration(name, source.preprocessing, [path for path in measured if isinstance(path, Path)])


def spread(labelled: LabelledInputs, count: int) -> Tensor:
    """Inputs from all over a set, which may be sorted by class."""
    chosen = np.linspace(0, len(labelled) - 1, min(count, len(labelled))).astype(int).tolist()
    return torch.from_numpy(labelled.pictures.inputs(chosen, labelled.preprocessing))


def parse_batch(text: str) -> Batch:
    """`8` is static, `1:8:32` is minimum, optimum and maximum."""
    try:
        sizes = [int(part) for part in text.split(":")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3):
        raise ExportError(f"--batch: expected MIN:OPT:MAX or one number, got {text!r}")
    if max(sizes) > MOST_IMAGES:
        raise ExportError(f"--batch: expected at most {MOST_IMAGES}, got {max(sizes)}")
    return Batch(sizes[0], sizes[len(sizes) // 2], sizes[-1])


def parse_size(text: str) -> tuple[int, int]:
    """`224` is square, `224x320` is height and width in pixels."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ExportError(f"--image-size: expected H or HxW in pixels, got {text!r}")
    if max(sizes) > MOST_PIXELS:
        raise ExportError(f"--image-size: expected at most {MOST_PIXELS} pixels, got {text!r}")
    return sizes[0], sizes[-1]


def summarise(args: argparse.Namespace, source: Source, result: ExportResult) -> None:
    """What was found and, last, what to do next."""
    coverage, report = result.coverage, result.report
    if args.json:
        record = {
            "model": source.model,
            "trained": args.weights is not None,
            "precision": report.precision,
            "input": args.input,
            "output": str(result.output) if result.written else None,
            "fused": len(coverage.fused),
            "left": [operator.name for operator in coverage.left],
            "notes": list(coverage.notes),
            "files": dict(result.files),
            "skipped": dict(result.skipped),
            "seconds": round(result.seconds, 1),
            **report.to_json(),
        }
        print(in_flags(json.dumps(record)))
        return
    print_rungs(report.rungs, result.files)
    print(f"{len(coverage.fused)} fused operators; left: {', '.join(op.name for op in coverage.left) or 'none'}")
    for note in coverage.notes:
        print(note)
    if args.input == UINT8:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (source.mean, source.std))
        print("input: uint8 [N, H, W, C], bytes as a camera or decoder gives them")
        print(f"normalised in the artefacts by mean {mean} and std {std}")
    if report.kept:
        print(f"kept in float32: {', '.join(report.kept)}")
    for rung in report.rungs:
        if rung.operators is not None and rung.operators.unchecked:
            print(f"{rung.name}: no operator criterion for {', '.join(rung.operators.unchecked)}")
    for name, reason in result.skipped.items():
        print(f"{name} engine not built: {in_flags(reason)}")
    if report.precision == "fp16" and not any(name.endswith((".engine", ".kernels")) for name in result.files):
        print("fp16 is for GPUs: on a CPU this file takes half the disk of fp32, and neither less memory nor less time")
    if report.quantisation is not None:
        print_quantisation(report.quantisation)
    if report.accuracy:
        print_accuracy(report.accuracy)
    elif args.weights is not None or report.quantisation is not None:
        print("accuracy not measured: give labelled pictures with --data")
    for line in report.evidence.lines:
        print(in_flags(line))
    for weakness in report.evidence.weaknesses:
        print(in_flags(f"weak evidence: {weakness}"))
    if args.weights is None:
        print("UNTRAINED weights: this checks the export, not the network; give --weights to deploy")
    print(f"{in_flags(report.verdict)} ({report.images} images, {result.seconds:.0f} s)")
    if result:
        print(f"{result.output} written; next: {typed('verify')} {result.output}")
    elif result.written:
        print(f"{result.output} written, UNVERIFIED: not for deployment")
    else:
        print(f"nothing written to {result.output}")


if __name__ == "__main__":
    sys.exit(main())
