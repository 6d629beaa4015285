"""What is in these pictures: the most probable classes, from a bundle, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, importing, leave, run_script
from export.terminal.commands import program
from export.terminal.flags import in_flags
from export.terminal.picture_flags import add_preprocessing_flags, preprocessing_values


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("classify", __doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder written by export.py")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files, or folders of them")
    parser.add_runtime()
    add_preprocessing_flags(parser, "as the bundle says; where it does not, one of these has to")
    parser.add_argument(
        "--repeat",
        type=int,
        metavar="N",
        help="also go through the pictures N times, one by one and from memory, as through a camera's frames, and say "
        "how long that takes, and how much of it the runtime",
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("classify"):
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from export.base.batch import UINT8
    from export.base.errors import ExportError
    from export.runtime.artefacts import Artefact, loaded_first, run_images
    from export.runtime.bundle.contents import Bundle, open_bundle
    from export.runtime.runner import Runner, TimedRunner
    from export.terminal.console import print_predictions
    from resnet.data.files import picture_files
    from resnet.data.preprocessing import Preprocessing, open_picture
    from resnet.data.presets import Changes, Said
    from resnet.errors import ResNetError


TOP = 5


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("classify", args, classify, refusals=(ResNetError,))


def classify(args: argparse.Namespace) -> int:
    """Show the classes of every picture; the exit code."""
    if args.repeat is not None and args.repeat < 1:
        raise ExportError(f"--repeat: expected a whole number of at least 1, got {args.repeat}")
    bundle = open_bundle(args.bundle)
    names, count = bundle.classes, bundle.class_count
    images, said = picture_files(args.images), Said(args.preprocessing, Changes(**preprocessing_values(args)))
    # Which refuses another number of scores.
    artefact, scores, timed = run(bundle, images, said, args.runtime, args.repeat or 0)
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
        print(json.dumps({"images": records, **({"loop": timed} if timed else {})}))
        return 0
    for path, best in results:
        print_predictions(path, [(labels[i], p) for i, p in best])
    if timed:
        print(
            f"a picture of {timed['pictures']} takes {timed['median_ms']:.2f} ms from its pixels to its classes, "
            f"{timed['ratio']:.2f} x the {timed['runtime_ms']:.2f} ms of {artefact.runtime} alone"
        )
    return 0


def run(
    bundle: Bundle, paths: list[Path], said: Said, runtime: str, repeat: int
) -> tuple[Artefact, NDArray, dict[str, float]]:
    """What ran, the scores of each picture, and what `time_loop` found in so many rounds, none where there are none."""
    preprocessing = said.of(bundle.preprocessing, bundle.image_shape, bundle.dtype == UINT8)
    bundle.check_input(preprocessing.shape)
    size, scores = bundle.batch.maximum, []
    with loaded_first(bundle, lambda reason: print(in_flags(reason), file=sys.stderr), runtime) as (artefact, runner):
        sys.stderr.write(f"{bundle.path / artefact.file} on {artefact.runtime}\n")
        if bundle.unverified:
            sys.stderr.write(in_flags(f"{bundle.path} is UNVERIFIED; it was exported with {bundle.unverified}\n"))
        for start in range(0, len(paths), size):
            pictures = [open_picture(path) for path in paths[start : start + size]]
            outputs = run_images(bundle, runner, preprocessing(pictures))
            scores.append(next(iter(outputs.values())))
        timed = time_loop(bundle, runner, preprocessing, paths, repeat) if repeat else {}
    return artefact, np.concatenate(scores), timed


def time_loop(
    bundle: Bundle, runner: Runner, preprocessing: Preprocessing, paths: list[Path], repeat: int
) -> dict[str, float]:
    """Milliseconds from a picture's pixels [H, W, C] to its classes, one picture at a time, and those of the runtime.

    Raises:
        ExportError: the runtime cannot be timed alone, or the bundle takes no single picture.
    """
    if not isinstance(runner, TimedRunner) or not runner.in_host_memory or bundle.batch.minimum > 1:
        raise ExportError(f"--repeat: expected a bundle of batch 1 in ONNX Runtime or OpenVINO, got {runner}")
    frames = [np.asarray(open_picture(path)) for path in paths]
    whole, alone = [], []
    for frame in [*frames[:1], *frames * repeat]:
        started = time.perf_counter()
        x = preprocessing([Image.fromarray(frame)])
        scores = next(iter(run_images(bundle, runner, x).values()))
        most_probable((scores if bundle.probabilities else softmax(scores))[0])
        whole.append(time.perf_counter() - started)
        runner.load(x)
        started = time.perf_counter()
        runner.step()
        alone.append(time.perf_counter() - started)
    both, single = (1e3 * float(np.median(seconds[1:])) for seconds in (whole, alone))  # the first warms up
    return {"pictures": len(frames) * repeat, "median_ms": both, "runtime_ms": single, "ratio": both / single}


def softmax(scores: NDArray) -> NDArray[np.float64]:
    """Of each row [N, classes], in float64."""
    exponentials = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def most_probable(probabilities: NDArray) -> list[tuple[int, float]]:
    """The first classes, each with its probability."""
    least = np.partition(probabilities, -TOP)[-TOP] if len(probabilities) > TOP else 0.0
    among = np.flatnonzero(probabilities >= least)  # few, so that sorting does not take as long as the preprocessing
    order = among[np.argsort(-probabilities[among], kind="stable")][:TOP]
    return [(int(index), float(probabilities[index])) for index in order]


if __name__ == "__main__":
    leave(main())
