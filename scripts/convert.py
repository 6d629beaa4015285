"""Load a checkpoint into a model, which checks all of it, and write it as .safetensors, which holds no code."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, importing, leave, run_script, show_log
from export.terminal.commands import typed
from export.terminal.flags import in_flags
from export.terminal.picture_flags import add_classes_flag, add_preprocessing_flags, preprocessing_values


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("convert", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="as export.py takes with --weights")
    parser.add_argument("output", metavar="OUTPUT.safetensors", help="replaced if it is a file")
    parser.add_argument("--model", required=True, metavar="NAME", help="what the weights are for")
    parser.add_argument("--num-classes", type=int, metavar="N", help="default: the model's, 1000 or 10")
    parser.add_argument("--in-channels", type=int, metavar="N", help="default 3")
    parser.add_argument("--weights-key", metavar="KEY", help="of a checkpoint with several networks, the one to take")
    add_classes_flag(parser, "those of the checkpoint, if it says; they and the preprocessing go into the file")
    add_preprocessing_flags(parser, "that of the checkpoint, if it says")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("convert"):
    from export.base.errors import ExportError
    from resnet.data.presets import Changes, open_preset, read_classes
    from resnet.errors import ResNetError
    from resnet.model_card import ModelCard, read_model_card
    from resnet.models import MODELS, create_model
    from resnet.weights import load_weights, save_weights


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    show_log(informing="resnet")
    return run_script("convert", args, convert, refusals=(ResNetError,))


def convert(args: argparse.Namespace) -> int:
    """Through the model: what is written is exactly what `load_weights` accepts, under its names and in float32."""
    card = read_model_card(args.checkpoint)
    classes, channels = args.num_classes, 3 if args.in_channels is None else args.in_channels
    if card is not None:
        card.check(args.checkpoint, args.model, args.num_classes, args.in_channels)
        classes, channels = len(card.classes), card.preprocessing.channels
    card = described(args, card, channels)
    if card is not None and classes is None:
        classes = len(card.classes)
    model = create_model(args.model, num_classes=classes, in_channels=channels)
    info = load_weights(model, args.checkpoint, key=args.weights_key)
    metadata = {"converted_from": Path(info.path).name, "converted_from_sha256": info.sha256}
    save_weights(args.output, model.state_dict(), metadata | (card.to_metadata() if card else {}))
    if card is not None:
        print(f"pictures: {card.preprocessing}")
    print(f"{args.output} written; next: {next_command(args)}")
    return 0


def described(args: argparse.Namespace, card: ModelCard | None, channels: int) -> ModelCard | None:
    """What the file will say of itself: the card of the checkpoint, with what the flags say in its place.

    Raises:
        ExportError: half of what a card says; names that are not as many as the classes.
    """
    changes = Changes(**preprocessing_values(args))
    if args.preprocessing is None and args.classes is None and not changes.said:
        return card
    if card is None and (args.classes is None or args.preprocessing is None):
        given = "--classes" if args.classes else "--preprocessing" if args.preprocessing else in_flags(changes.said[0])
        raise ExportError(f"{given}: the file would say of itself how pictures are prepared and what its classes are "
                          "called: expected both --preprocessing and --classes")  # fmt: skip
    classes = card.classes if card else ()
    if args.classes is not None:
        classes = read_classes(args.classes)
        count = len(card.classes) if card else len(classes) if args.num_classes is None else args.num_classes
        if len(classes) != count:
            raise ExportError(f"{args.classes}: expected a name for each of {count} outputs, got {len(classes)} names")
    if args.preprocessing is not None:
        designed = (MODELS[args.model].image_size if args.model in MODELS else 224,) * 2
        base = open_preset(args.preprocessing, channels, card.preprocessing.size if card else designed).preprocessing
    else:
        assert card is not None
        base = card.preprocessing
    preprocessing = changes.of(base, fixed_size=False)
    if card is not None:
        card = card if preprocessing == card.preprocessing else replace(card, accuracy=None, test_images=0)
        return replace(card, preprocessing=preprocessing, classes=classes)
    return ModelCard(args.model, preprocessing, classes, "")


def next_command(args: argparse.Namespace) -> str:
    """How to export what was written: with the counts that were given, because export needs the same."""
    command = ["--model", args.model, "--weights", args.output]
    for flag, count in (("--num-classes", args.num_classes), ("--in-channels", args.in_channels)):
        if count is not None:
            command += [flag, str(count)]
    return f"{typed('export')} {shlex.join([*command, '--fp16'])}"


if __name__ == "__main__":
    leave(main())
