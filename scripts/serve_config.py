"""Write what Triton Inference Server or DeepStream reads of a bundle: its files, unchanged, and their configuration."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, importing, leave, run_script
from export.terminal.flags import in_flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("serve-config", __doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder written by export.py")
    parser.add_argument(
        "--triton",
        type=Path,
        metavar="DIR",
        help="a model repository, in which the bundle becomes a model, or two where it has a TensorRT engine",
    )
    parser.add_argument(
        "--deepstream", type=Path, metavar="DIR", help="a folder for nvinfer's configuration, the labels and the model"
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.triton is None and args.deepstream is None:
        parser.error("expected --triton DIR, --deepstream DIR or both")
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("serve-config"):
    from export.runtime.bundle.contents import open_bundle
    from export.runtime.serving.deepstream import deepstream_config, start_command
    from export.runtime.serving.triton import start_commands, triton_models


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("serve-config", args, serve_config)


def serve_config(args: argparse.Namespace) -> int:
    """Write what was asked for and say what starts it; the exit code."""
    bundle = open_bundle(args.bundle)
    served, notes, commands = [], [], []
    if args.triton is not None:
        models, said = triton_models(bundle, args.triton)
        served, notes, commands = models, said, start_commands(models)
    if args.deepstream is not None:
        config, said = deepstream_config(bundle, args.deepstream)
        served, notes, commands = [*served, config], [*notes, *said], [*commands, start_command(config)]
    for one in served:
        one.write()
    if bundle.unverified:
        notes.append(f"{bundle.path} is UNVERIFIED; it was exported with {bundle.unverified}")
    notes = list(map(in_flags, notes))
    if args.json:
        print(json.dumps({"written": [str(one.path) for one in served], "notes": notes, "commands": commands}))
        return 0
    print("\n".join([*(one.summary for one in served), *notes, "start it with", *commands]))
    return 0


if __name__ == "__main__":
    leave(main())
