"""Export a ResNet to a bundle: ONNX file, TensorRT engine, and the proof that they equal the eager model."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be this file

from export.base.errors import ExportError
from export.quantisation.methods import DEFAULT_METHOD, METHODS
from export.runtime.engines.options import TARGETS, EngineConfig
from export.terminal.command_line import Parser, importing, run_script, show_log
from export.terminal.commands import typed
from export.terminal.flags import in_flags
from export.terminal.picture_flags import add_classes_flag, add_preprocessing_flags, parse_size, preprocessing_values
from resnet.errors import ResNetError

if TYPE_CHECKING:
    from export.base.batch import Batch
    from export.config import ExportConfig


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
    parser.add_argument(
        "--image-size",
        type=parse_size,
        metavar="H[xW]",
        help="of the input, cut out of the same part of a picture; default: the weights', else 224 or 32",
    )
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
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="PATH", help="pictures to compare on, or folders of them"
    )
    add_classes_flag(parser, "those of the weights, else the folders of --data or --calibration, one for each output")
    parser.add_argument(
        "--outputs",
        choices=("scores", "probabilities", "values"),
        help="what the network returns: scores of classes, whose highest may not change, or values such as landmarks; "
        "default: found out from labels, names of classes and the last operator; probabilities puts a softmax behind "
        "the scores",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=(),
        metavar="NAME",
        help="return what these modules return, such as layer2 layer3 layer4, and not the network's own output: the "
        "backbone of a detector or segmenter; with fc among them also the scores",
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
    add_preprocessing_flags(parser, "that of the weights, else ImageNet's")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default build/<model>-<precision>")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on stdout")
    parser.add_argument(
        "--profile", action="store_true", help="say what each step used of CPU time and memory; --json always does"
    )
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


def describe_config(args: argparse.Namespace) -> ExportConfig:
    """What the library is asked for."""
    from export.config import ExportConfig

    return ExportConfig(
        precision=args.precision,
        batch=parse_batch(args.batch),
        engine=args.engine,
        engine_config=engine_config(args),
        calibration_method=args.calibration_method or DEFAULT_METHOD,
        keep_fp16=args.keep_fp16,
        keep_fp32=args.keep_fp32,
        outputs=args.outputs or ("scores" if args.weights == PRETRAINED and not args.features else "auto"),
        unverified=args.unverified,
        kernels=args.kernels,
        input=args.input,
        features=args.features,
    )


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


def parse_batch(text: str) -> Batch:
    """`8` is static, `1:8:32` is minimum, optimum and maximum."""
    from export.base.batch import Batch

    try:
        sizes = [int(part) for part in text.split(":")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3):
        raise ExportError(f"--batch: expected MIN:OPT:MAX or one number, got {text!r}")
    if max(sizes) > MOST_IMAGES:
        raise ExportError(f"--batch: expected at most {MOST_IMAGES}, got {max(sizes)}")
    return Batch(sizes[0], sizes[len(sizes) // 2], sizes[-1])


def check(args: argparse.Namespace) -> int:
    """Refuse what the arguments, the files they name and the packages here rule out, before PyTorch is imported; 0."""
    from export.config import choose_flavours
    from export.runtime.bundle.folder import check_output
    from resnet.data.files import picture_files

    config, asked_for = describe_config(args), engine_config(args).given
    calibrating = {"--calibration": args.calibration, "--calibration-method": args.calibration_method}
    given = [flag for flag, value in calibrating.items() if value]
    if args.precision != "int8" and given:
        raise ExportError(f"{', '.join(given)}: for --int8, got --{args.precision}")
    if args.data and args.weights is None:
        raise ExportError("--data: expected trained weights to measure, got none; give --weights")
    if args.weights in (None, PRETRAINED):  # others may come with a card that names their data
        check_data(args, args.calibration, args.data)
    if args.output is not None or args.model is not None or args.weights is None:
        check_output(args.output or default_output(args.model or DEFAULT_MODEL, args.precision))
    picture_files(args.images or ())
    if asked_for or args.engine not in ("auto", "none"):
        choose_flavours(config)
    return 0


def check_data(args: argparse.Namespace, calibration: object, labelled: object) -> None:
    """Raises ExportError where there is nothing to calibrate on, or to decide by, and it is needed."""
    if args.precision != "int8":
        return
    if calibration is None:
        raise ExportError("int8 needs pictures to calibrate on, got none; give --calibration DIR")
    if [*args.keep_fp16] == ["auto"] and labelled is None:
        raise ExportError("--keep-fp16 auto needs labelled pictures to decide by, got none; give --data")


def default_output(model: str, precision: str) -> Path:
    return Path("build") / f"{model}-{precision}"


DEFAULT_MODEL = "resnet50"
PRETRAINED = "pretrained"  # as a value of --weights: the published file of that model
MOST_IMAGES = 2**31 - 1  # of a batch

if __name__ == "__main__":  # --help and what can be refused at once are answered before the imports below: seconds
    if refused := run_script("export", parse_args(), check, refusals=(ResNetError,)):
        sys.exit(refused)

with importing("export"):
    import numpy as np
    import torch
    from torch import Tensor

    from export import ExportResult, export_bundle
    from export.base.batch import UINT8
    from export.base.errors import printable
    from export.base.usage import StepUsage
    from export.job import PARITY_IMAGES
    from export.runtime.bundle.folder import check_output
    from export.sample_inputs import byte_crops, crops, photographs
    from export.terminal.console import Progress, print_accuracy, print_quantisation, print_rungs, print_usage
    from resnet.data.calibration_pictures import PictureInputs, open_calibration
    from resnet.data.files import picture_files
    from resnet.data.labelled import LabelledInputs
    from resnet.data.preprocessing import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        Preprocessing,
        imagenet_preprocessing,
        open_picture,
    )
    from resnet.data.presets import Changes, Preset, open_preset, read_classes
    from resnet.data.sources import folder_classes, open_test
    from resnet.initialise import initialise
    from resnet.model_card import ModelCard, read_model_card
    from resnet.models import MODELS, create_model
    from resnet.pretrained import download
    from resnet.weights import load_weights, recognise_weights


CALIBRATION_IMAGES = 16
SCORES = "fc"  # what every model of this project calls the layer that makes its scores
SHOWN_NAMES = 8  # of operators, or of classes, in one line
CALIBRATION_SEED = 1  # other crops than those the result is checked on


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.command = f"{typed('export')} {shlex.join(sys.argv[1:] if argv is None else argv)}".rstrip()
    show_log(informing="resnet")
    return run_script("export", args, export, refusals=(ResNetError,))


def export(args: argparse.Namespace) -> int:
    """Export what the arguments describe and say what was found; the exit code, which is 1 for what is not equal."""
    check(args)
    source = taking(args.input, describe_source(args))
    with Progress(measured=args.profile or args.json) as progress:
        result, classes = run(args, source, progress)
    summarise(args, source, classes, result, progress.usage.steps if progress.usage else ())
    return 0 if result else 1


def run(
    args: argparse.Namespace, source: Source, progress: Progress
) -> tuple[ExportResult, tuple[tuple[str, ...], str] | None]:
    """Make the model and export it; with the names of its classes and who said them."""
    config, output = describe_config(args), args.output or default_output(source.model, args.precision)
    check_output(output)
    labelled = open_labelled(args, source)
    scored = not args.features or args.features[0] == SCORES
    if args.data and not scored:
        raise ExportError(
            f"--data: expected class scores to measure, got --features {args.features[0]} first; "
            f"--features {SCORES} {' '.join(args.features)} has them too"
        )
    calibration = open_calibration_inputs(args, source, labelled)
    check_data(args, calibration, labelled)
    model = create_model(source.model, num_classes=source.num_classes, in_channels=source.in_channels)
    classes = source.classes or folder_names(args, labelled, model)
    said_by = source.classes_said_by if source.classes else "the folders of --data or --calibration"
    pictures = [open_picture(path).convert("RGB") for path in picture_files(args.images or ())] or photographs()

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
        "classes": classes and list(classes),
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
    result = export_bundle(
        model.eval(),
        torch.zeros(1, source.in_channels, *source.size),
        output,
        config,
        images=images,
        labelled=labelled if scored else None,
        calibration=calibration,
        preprocessing=source.preprocessing,
        metadata=metadata,
        command=args.command,
        progress=progress,
    )
    return result, (classes, said_by) if classes else None


@dataclass(frozen=True)
class Source:
    """What is exported and what it is fed: from the flags, else from the card in the weights, else by default.

    Attributes:
        preprocessing: from a picture to the input; None where pictures do not have that many channels.
        size: height and width of the input in pixels.
        said_by: who said what the preprocessing is.
        classes: what the logits stand for; None where nobody said.
        classes_said_by: who said that.
        data: what the weights were trained on, empty where nobody said.
    """

    model: str
    num_classes: int | None
    in_channels: int
    preprocessing: Preprocessing | None
    size: tuple[int, int]
    said_by: str
    classes: tuple[str, ...] | None = None
    classes_said_by: str = ""
    data: str = ""

    @property
    def mean(self) -> tuple[float, ...]:
        return self.preprocessing.mean if self.preprocessing else IMAGENET_MEAN

    @property
    def std(self) -> tuple[float, ...]:
        return self.preprocessing.std if self.preprocessing else IMAGENET_STD


def describe_source(args: argparse.Namespace) -> Source:
    """A flag before what the weights say of themselves, before what nobody said."""
    own = args.weights not in (None, PRETRAINED)
    if args.weights_key is not None and not own:
        raise ExportError(f"--weights-key: for --weights PATH, got {args.weights or 'no weights'}")
    card = read_model_card(args.weights) if own else None
    name, channels, count = args.model or DEFAULT_MODEL, args.in_channels, args.num_classes
    if card is not None:
        card.check(args.weights, args.model, args.num_classes, args.in_channels)
        name, channels, count = card.model, card.preprocessing.channels, len(card.classes)
    elif own and args.model is None:
        network = recognise_weights(args.weights, args.weights_key)
        if network is not None and network.certain:
            name = network.name
            channels = network.in_channels if channels is None else channels
            count = network.num_classes if count is None else count
    spec = MODELS.get(name)  # create_model refuses other names
    designed = (spec.image_size if spec else 224,) * 2
    preset, said_by = described_pictures(args, card, channels, designed)
    outputs = count
    if count is None and spec is not None and (args.classes is None or args.weights == PRETRAINED):
        outputs = spec.num_classes
    classes, named_by = described_classes(args, card, preset, outputs)
    if count is None and args.classes is not None and classes is not None:
        count = len(classes)
    changes = Changes(**preprocessing_values(args))
    size = args.image_size and (args.image_size[0], args.image_size[-1])
    if preset is None:
        assert channels is not None
        if changes.said:
            raise ExportError(f"{changes.said[0]}: expected a model for pictures of 1 or 3 channels, got {channels}")
        return Source(name, count, channels, None, size or designed, "", classes, named_by)
    if size is not None and changes.crop not in (None, size):
        raise ExportError("--image-size and --crop both say the size of the input: expected one of them")
    base = preset.preprocessing.at(size) if size else preset.preprocessing
    preprocessing = changes.of(base, fixed_size=size is not None)
    if changes.said:
        said_by = f"{in_flags(' '.join(changes.said))}, the rest by {said_by}"
    channels, data = preprocessing.channels, card.data if card else ""
    return Source(name, count, channels, preprocessing, preprocessing.size, said_by, classes, named_by, data)


def described_pictures(
    args: argparse.Namespace, card: ModelCard | None, channels: int | None, designed: tuple[int, int]
) -> tuple[Preset | None, str]:
    """How pictures become inputs, without what is said value by value, and who said so; None where they cannot.

    Args:
        args: of the command line.
        card: what the weights say of themselves.
        channels: of the network, None where nobody said.
        designed: height and width that the network was designed for.
    """
    if args.preprocessing is not None:
        size = card.preprocessing.size if card else designed
        return open_preset(args.preprocessing, channels, size), f"--preprocessing {args.preprocessing}"
    if card is not None:
        return Preset(card.preprocessing), "the weights"
    imagenet = imagenet_preprocessing(3 if channels is None else channels)
    said_by = "the published weights" if args.weights == PRETRAINED else "nobody: ImageNet's is assumed"
    return None if imagenet is None else Preset(imagenet.at(designed)), said_by


def described_classes(
    args: argparse.Namespace, card: ModelCard | None, preset: Preset | None, count: int | None
) -> tuple[tuple[str, ...] | None, str]:
    """What the classes are called, and who said so; None where nobody did.

    Args:
        args: of the command line.
        card: what the weights say of themselves.
        preset: of the preprocessing, whose file may name classes of another network.
        count: how many outputs there are, None where nobody said.
    """
    if args.classes is not None:
        classes = read_classes(args.classes)
        if count not in (None, len(classes)):
            raise ExportError(f"{args.classes}: expected a name for each of {count} outputs, got {len(classes)} names")
        return classes, f"--classes {args.classes}"
    if card is not None:
        return card.classes, "the weights"
    if preset is not None and preset.classes is not None and len(preset.classes) == count:
        return preset.classes, f"--preprocessing {args.preprocessing}"
    return None, ""


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


def folder_names(
    args: argparse.Namespace, labelled: LabelledInputs | None, model: torch.nn.Module
) -> tuple[str, ...] | None:
    """What the folders of labelled pictures, or of those to calibrate on, are called, if there is one per output."""
    count = len(model.get_parameter("fc.weight"))
    if args.data is not None and labelled is not None and len(labelled.classes) == count:
        return labelled.classes
    return None if args.calibration is None else folder_classes(args.calibration, count)


def spread(labelled: LabelledInputs, count: int) -> Tensor:
    """Inputs from all over a set, which may be sorted by class."""
    chosen = np.linspace(0, len(labelled) - 1, min(count, len(labelled))).astype(int).tolist()
    return torch.from_numpy(labelled.pictures.inputs(chosen, labelled.preprocessing))


def some(names: Sequence[str]) -> str:
    """The first few; all are in parity.json, classes in manifest.json."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def summarise(
    args: argparse.Namespace,
    source: Source,
    classes: tuple[tuple[str, ...], str] | None,
    result: ExportResult,
    usage: Sequence[StepUsage] = (),
) -> None:
    """What was found and, last, what to do next.

    Args:
        classes: with who said what they are called.
        usage: of each step, where it was measured.
    """
    coverage, report = result.coverage, result.report
    if args.json:
        record = {
            "model": source.model,
            "trained": args.weights is not None,
            "precision": report.precision,
            "input": args.input,
            "preprocessing": source.preprocessing and {**source.preprocessing.to_json(), "said_by": source.said_by},
            "classes": classes and list(classes[0]),
            "output": str(result.output) if result.written else None,
            "fused": len(coverage.fused),
            "left": [operator.name for operator in coverage.left],
            "notes": list(coverage.notes),
            "strides": {name: list(stride) for name, stride in result.strides.items()},
            "files": dict(result.files),
            "skipped": dict(result.skipped),
            "seconds": round(result.seconds, 1),
            "profile": [step.to_json() for step in usage],
            **report.to_json(),
        }
        print(in_flags(json.dumps(record)))
        return
    print_rungs(report.rungs, result.files)
    print(f"{len(coverage.fused)} fused operators; left: {', '.join(op.name for op in coverage.left) or 'none'}")
    for note in coverage.notes:
        print(note)
    for name, (height, width) in result.strides.items():
        print(f"{name}: one cell for {height} x {width} pixels of the input")
    if args.input == UINT8:
        print("input: uint8 [N, H, W, C], bytes as a camera or decoder gives them, normalised in the artefacts")
    if source.preprocessing is not None:
        print(f"pictures: {source.preprocessing} (said by {source.said_by})")
    if classes is not None:
        names, said_by = classes
        print(f"classes: {len(names)}, {some([*map(printable, names)])} (said by {said_by})")
    if report.kept:
        print(f"kept in float32: {', '.join(report.kept)}")
    for rung in report.rungs:
        if rung.operators is not None and rung.operators.unchecked:
            lacking = (
                "no operator criterion for" if rung.emulated is None else "instructions not known to the emulator in"
            )
            print(f"{rung.name}: {lacking} {some(rung.operators.unchecked)}")
    for name, reason in result.skipped.items():
        print(f"{name} engine not built: {in_flags(reason)}")
    if report.precision == "fp16" and not any(name.endswith((".engine", ".kernels")) for name in result.files):
        print("fp16 is for GPUs: on a CPU this file takes half the disk of fp32, and neither less memory nor less time")
    if report.quantisation is not None:
        print_quantisation(report.quantisation)
    if report.accuracy:
        print_accuracy(report.accuracy)
    elif args.features and args.features[0] != SCORES:
        print(f"accuracy not measured: {args.features[0]} is no class scores; judge what is built on it")
    elif args.weights is not None or report.quantisation is not None:
        print("accuracy not measured: give labelled pictures with --data")
    for line in report.evidence.lines:
        print(in_flags(line))
    for weakness in report.evidence.weaknesses:
        print(in_flags(f"weak evidence: {weakness}"))
    if usage:
        print_usage(usage)
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
