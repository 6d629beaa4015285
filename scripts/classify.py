"""What is in these pictures: the most probable classes, from a bundle, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, importing, run_script
from export.terminal.commands import program
from export.terminal.flags import in_flags
from export.terminal.picture_flags import add_preprocessing_flags, preprocessing_values


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("classify", __doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder written by export.py")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files, or folders of them")
    parser.add_runtime()
    add_preprocessing_flags(parser, "as the bundle says; where it does not, one of these has to")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("classify"):
    import numpy as np
    from numpy.typing import NDArray

    from export.base.batch import UINT8
    from export.runtime.artefacts import Artefact, running_first
    from export.runtime.bundle.contents import Bundle, open_bundle
    from export.terminal.console import print_predictions
    from resnet.data.files import picture_files
    from resnet.data.preprocessing import open_picture
    from resnet.data.presets import Changes, Said
    from resnet.errors import ResNetError


TOP = 5


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("classify", args, classify, refusals=(ResNetError,))


def classify(args: argparse.Namespace) -> int:
    """Show the classes of every picture; the exit code."""
    bundle = open_bundle(args.bundle)
    names, count = bundle.classes, bundle.class_count
    images, said = picture_files(args.images), Said(args.preprocessing, Changes(**preprocessing_values(args)))
    artefact, scores = run(bundle, images, said, args.runtime)  # which refuses another number of scores
    labels = names or [f"class {i}" for i in range(count)]
    for picture, row in zip(images, scores, strict=True):
        if not np.isfinite(row).all():
            sys.stderr.write(f"{program('classify')}: {picture}: {artefact.file} returns NaN or Inf for this picture\n")
            return 1
    found = scores.astype(np.float64) if bundle.probabilities else softmax(scores)
    results = [(str(picture), most_probable(row)) for picture, row in zip(images, found, strict=True)]
    if args.json:
        records = [
            {
                "path": path,
                "runtime": artefact.runtime,
                "predictions": [{"class": i, "label": labels[i], "probability": p} for i, p in best],
            }
            for path, best in results
        ]
        print(json.dumps({"images": records}))
        return 0
    for path, best in results:
        print_predictions(path, [(labels[i], p) for i, p in best])
    return 0


def run(bundle: Bundle, paths: list[Path], said: Said, runtime: str) -> tuple[Artefact, NDArray]:
    """What ran, and the scores of each picture."""
    preprocessing = said.of(bundle.preprocessing, bundle.image_shape, bundle.dtype == UINT8)
    bundle.check_input(preprocessing.shape)
    size, scores = bundle.batch.maximum, []
    with running_first(bundle, lambda reason: print(in_flags(reason), file=sys.stderr), runtime) as (artefact, infer):
        sys.stderr.write(f"{bundle.path / artefact.file} on {artefact.runtime}\n")
        if bundle.unverified:
            sys.stderr.write(in_flags(f"{bundle.path} is UNVERIFIED; it was exported with {bundle.unverified}\n"))
        for start in range(0, len(paths), size):
            outputs = infer(preprocessing([open_picture(path) for path in paths[start : start + size]]))
            scores.append(next(iter(outputs.values())))
    return artefact, np.concatenate(scores)


def softmax(logits: NDArray) -> NDArray[np.float64]:
    """Of each row [N, classes], in float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def most_probable(probabilities: NDArray) -> list[tuple[int, float]]:
    """The first classes, each with its probability."""
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [(int(index), float(probabilities[index])) for index in order]


if __name__ == "__main__":
    sys.exit(main())
