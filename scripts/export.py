"""Export a ResNet to a bundle: ONNX file, TensorRT engine, and the proof that they equal the eager model."""

from __future__ import annotations

import argparse
import json
import os
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
from export.terminal.command_line import importing, leave, run_script, show_log
from export.terminal.commands import typed
from export.terminal.export_flags import PRETRAINED, engine_config, export_parser, parse_batch
from export.terminal.flags import in_flags
from export.terminal.picture_flags import preprocessing_values
from resnet.errors import ResNetError

if TYPE_CHECKING:
    from export.config import ExportConfig


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return export_parser(__doc__, METHODS, DEFAULT_METHOD).parse_args(argv)


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
        quick=args.quick,
        kernels=args.kernels,
        input=args.input,
        features=args.features,
        layer_costs=args.layer_costs,
    )


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

if __name__ == "__main__":  # --help and what can be refused at once are answered before the imports below: seconds
    if "OMP_WAIT_POLICY" not in os.environ:
        # PyTorch's threads spin between two of its loops, by default for a tenth of an export's processor time.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if refused := run_script("export", parse_args(), check, refusals=(ResNetError,)):
        sys.exit(refused)

with importing("export"):
    import numpy as np
    import torch
    from torch import Tensor

    from export import ExportResult, export_bundle
    from export.base.batch import UINT8
    from export.base.errors import printable
    from export.base.memory import keep
    from export.base.usage import StepUsage
    from export.job import PARITY_IMAGES
    from export.runtime.bundle.folder import check_output
    from export.sample_inputs import byte_crops, crops, photographs
    from export.terminal.console import Progress
    from export.terminal.export_summary import print_summary, some, summary_record
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
CALIBRATION_SEED = 1  # other crops than those the result is checked on


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.command = f"{typed('export')} {shlex.join(sys.argv[1:] if argv is None else argv)}".rstrip()
    show_log(informing="resnet")
    return run_script("export", args, export, refusals=(ResNetError,))


def export(args: argparse.Namespace) -> int:
    """Export what the arguments describe and say what was found; the exit code, which is 1 for what is not equal."""
    check(args)
    keep()
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
        metadata["weights"] = load(model, args, source, progress)
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


def load(model: torch.nn.Module, args: argparse.Namespace, source: Source, progress: Progress) -> dict[str, str]:
    """Give the model its weights, fetched where they are the published ones; what the manifest says of them."""
    path = args.weights
    if path == PRETRAINED:
        progress("fetch the published weights")
        path = download(source.model, progress=progress.transferred)
    progress("load the weights")
    info = load_weights(model, path, key=args.weights_key)
    facts = {"file": Path(info.path).name, "sha256": info.sha256}
    return facts | ({"key": info.key} if info.others else {})


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
    if args.json:
        own = {
            "model": source.model,
            "trained": args.weights is not None,
            "input": args.input,
            "preprocessing": source.preprocessing and {**source.preprocessing.to_json(), "said_by": source.said_by},
            "classes": classes and list(classes[0]),
        }
        print(in_flags(json.dumps({**own, **summary_record(result, usage)})))
        return
    facts = []
    if args.input == UINT8:
        facts.append("input: uint8 [N, H, W, C], bytes as a camera or decoder gives them, normalised in the artefacts")
    if source.preprocessing is not None:
        facts.append(f"pictures: {source.preprocessing} (said by {source.said_by})")
    if classes is not None:
        names, said_by = classes
        facts.append(f"classes: {len(names)}, {some([*map(printable, names)])} (said by {said_by})")
    unmeasured = ""
    if args.features and args.features[0] != SCORES:
        unmeasured = f"{args.features[0]} is no class scores; judge what is built on it"
    elif args.weights is not None or args.precision == "int8":
        unmeasured = "give labelled pictures with --data"
    print_summary(result, facts, unmeasured, usage, trained=args.weights is not None)


if __name__ == "__main__":
    leave(main())
