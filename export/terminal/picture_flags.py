"""The flags that say how a picture becomes an input of the network, and what the network's classes are called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from export.terminal.command_line import Parser

_MOST_PIXELS = 2**15  # of a side
_VALUES = ("mean", "std", "resize", "crop", "interpolation")


def add_preprocessing_flags(parser: Parser, otherwise: str) -> None:
    """`otherwise` is what holds where none of them is given."""
    group = parser.add_argument_group("preprocessing", f"how pictures become inputs; default: {otherwise}")
    group.add_argument(
        "--preprocessing",
        metavar="imagenet|digits|FILE",
        help="what the flags below then change; FILE: JSON with a data configuration of timm, such as the config.json "
        "beside weights on the Hugging Face hub",
    )
    group.add_argument("--mean", nargs="+", type=float, metavar="X", help="of x / 255, one per channel or one for all")
    group.add_argument("--std", nargs="+", type=float, metavar="X", help="of x / 255, one per channel or one for all")
    group.add_argument(
        "--resize",
        type=parse_size,
        metavar="S|HxW",
        help="S: the shorter side, before the middle is cut out; HxW: the whole picture, whatever its proportions",
    )
    group.add_argument(
        "--crop", type=parse_size, metavar="H[xW]", help="what is cut out of the middle: the network's input"
    )
    group.add_argument(
        "--interpolation",
        metavar="NAME",
        help="nearest, box, bilinear, hamming, bicubic or lanczos, as Pillow computes them: all but nearest average "
        "where a picture shrinks",
    )


def add_classes_flag(parser: Parser, otherwise: str) -> None:
    """`otherwise` as for `add_preprocessing_flags`."""
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help=f"their names, one per line, in order; default: {otherwise}"
    )


def preprocessing_values(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_preprocessing_flags` say value by value: name -> tuple or text, None of what none says."""
    given = {name: getattr(args, name) for name in _VALUES}
    if given["crop"] is not None:
        given["crop"] = (given["crop"][0], given["crop"][-1])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def parse_size(text: str) -> tuple[int, ...]:
    """`256` is one number, `224x320` height and width in pixels."""
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected H or HxW in pixels, got {text!r}")
    if max(sizes) > _MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_PIXELS} pixels, got {text!r}")
    return sizes
