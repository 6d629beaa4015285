"""The flags of `export` and what they ask the library for; known without PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from export.base.errors import ExportError
from export.runtime.engines.options import TARGETS, EngineConfig
from export.terminal.command_line import Parser
from export.terminal.picture_flags import add_classes_flag, add_preprocessing_flags, parse_size

if TYPE_CHECKING:
    from export.base.batch import Batch

PRETRAINED = "pretrained"  # as a value of --weights: the published file of that model
_MOST_IMAGES = 2**31 - 1  # of a batch


def export_parser(about: str | None, methods: Collection[str], method: str) -> Parser:
    """All of them; `methods` are those of calibration, `method` the default."""
    parser = Parser("export", about)
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
    _add_what_is_built(parser)
    _add_what_is_checked(parser)
    _add_what_is_rounded(parser, methods, method)
    add_preprocessing_flags(parser, "that of the weights, else ImageNet's")
    _add_what_is_written(parser)
    return parser


def _add_what_is_built(parser: Parser) -> None:
    """Engines of TensorRT and of this project's kernels."""
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


def _add_what_is_checked(parser: Parser) -> None:
    """Pictures, outputs and labelled data."""
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
        "--quick",
        action="store_true",
        help="compare on the fewest pictures that the evidence allows, in batches of no more; every operator is "
        "checked all the same, and the bundle says so",
    )
    parser.add_argument(
        "--data",
        metavar="digits|PATH",
        help="labelled pictures to measure accuracy on; default digits where the weights were trained on them",
    )


def _add_what_is_rounded(parser: Parser, methods: Collection[str], method: str) -> None:
    """What 8 bits are calibrated on, and what stays in a wider type."""
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="int8: a folder of pictures like those the network will see, 100 or more; or digits, or an archive of "
        "CIFAR; default digits where the weights were trained on them",
    )
    parser.add_argument("--calibration-method", choices=methods, help=f"int8: default {method}")
    parser.add_argument(
        "--keep-fp16",
        nargs="+",
        default=(),
        metavar="NAME|auto",
        help="int8: layers, or modules with all their layers, to leave in floating point; auto: the fewest with which "
        "the accuracy is retained",
    )
    parser.add_argument(
        "--layer-costs",
        action="store_true",
        help="int8: measure what each layer costs in 8 bits; done unasked where accuracy is lost",
    )
    parser.add_argument(
        "--keep-fp32",
        nargs="+",
        default=(),
        metavar="NAME|auto",
        help="fp16 and bf16: layers, or modules with all their layers, to leave in float32; auto: the fewest with "
        "which the network is equal to the eager model",
    )


def _add_what_is_written(parser: Parser) -> None:
    """The bundle, and what the summary says."""
    parser.add_argument("--output", type=Path, metavar="DIR", help="default build/<model>-<precision>")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on stdout")
    parser.add_argument(
        "--profile", action="store_true", help="say what each step used of CPU time and memory; --json always does"
    )


def add_engine_arguments(parser: Parser) -> None:
    """How engines are built; what a flavour of TensorRT does not take is refused, or with auto leaves it out."""
    parser.add_argument("--workspace", type=int, metavar="MIB", help="memory a kernel of an engine may use for itself")
    parser.add_argument("--optimization-level", type=int, metavar="N", help="0 to 5: how long to look for fast kernels")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="measured kernels, read and written")
    parser.add_argument("--version-compatible", action="store_true", help="engines for later minor versions too")
    parser.add_argument("--hardware-compatible", action="store_true", help="engines for every GPU from Ampere on")
    parser.add_argument("--targets", nargs="+", default=(), metavar="SM", help=f"tensorrt-rtx: of {' '.join(TARGETS)}")
    parser.add_argument("--dla", type=int, metavar="CORE", help="the deep-learning accelerator of a Jetson Orin")


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
    from export.base.batch import Batch  # imports numpy

    try:
        sizes = [int(part) for part in text.split(":")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3):
        raise ExportError(f"--batch: expected MIN:OPT:MAX or one number, got {text!r}")
    if max(sizes) > _MOST_IMAGES:
        raise ExportError(f"--batch: expected at most {_MOST_IMAGES}, got {max(sizes)}")
    return Batch(sizes[0], sizes[len(sizes) // 2], sizes[-1])
