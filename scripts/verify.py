"""Check a bundle again on this machine: every file is the one exported, and it computes what it should."""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, Steps, importing, leave, print_columns, run_script
from export.terminal.commands import typed
from export.terminal.flags import in_flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("verify", __doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder written by export.py")
    parser.add_argument(
        "--build",
        action="store_true",
        help="build this machine's own TensorRT engine from the bundle, verify it, and keep it in the user's cache",
    )
    parser.add_runtime()
    parser.add_argument(
        "--workspace", type=int, metavar="MIB", help="with --build: the most memory a kernel may use for itself"
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        metavar="N",
        help="with --build: 0 to 5, how long to look for faster kernels",
    )
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="KEY.pem",
        help="first check the signature BUNDLE.sig by this key, in the OpenSSF Model Signing format",
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("verify"):
    import numpy as np

    from export.base.batch import UINT8
    from export.base.errors import ExportError, first_line
    from export.runtime.build import DeviceBuild, build_on_device
    from export.runtime.bundle.contents import open_bundle
    from export.runtime.bundle.golden import PICTURE_FILE, PICTURE_INPUT_FILE
    from export.runtime.bundle.signature import check_signature
    from export.runtime.engines.options import EngineConfig
    from export.runtime.parity.rungs import RUNG_HEADINGS, Rung
    from export.runtime.verify import verify_bundle


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("verify", args, verify)


def verify(args: argparse.Namespace) -> int:
    """Check the bundle, build its engines if asked, and say what was found; the exit code, 1 for what is not equal."""
    config = EngineConfig(args.workspace, args.optimization_level)
    if config.given and not args.build:
        raise ExportError(f"{', '.join(config.given)}: expected --build, which is what takes it")
    if args.build and args.runtime:
        raise ExportError("--build builds and verifies engines of TensorRT: expected no --runtime with it")
    builds: list[DeviceBuild] = []
    with Steps() as progress:
        if args.public_key is not None:
            progress("check the signature")
            check_signature(args.bundle, args.public_key)
        if args.build:
            rungs, builds = build_on_device(args.bundle, config, progress)
            rungs += [build.rung for build in builds]
        else:
            rungs = verify_bundle(args.bundle, progress, args.runtime)
        pictures = check_picture(args.bundle)
    passed = all(rungs) and (pictures is None or pictures.equal is not False)
    if args.json:
        built = [{"file": str(build.file), "origin": build.origin, "passed": bool(build)} for build in builds]
        said = pictures and {"equal": pictures.equal, "found": pictures.found}
        record = {"passed": passed, "rungs": [rung.to_json() for rung in rungs], "builds": built, "pictures": said}
        print(in_flags(json.dumps(record)))
        return 0 if passed else 1
    sizes = {str(build.file): build.size for build in builds}
    print_columns(RUNG_HEADINGS, [rung.cells(sizes.get(rung.file) or size(args.bundle, rung)) for rung in rungs])
    if pictures is not None:
        print(f"pictures: {pictures.found}")
    if args.build:
        say_built(args.bundle, rungs, builds)
    else:
        say_verified(args.bundle, rungs, args.runtime)
    if pictures is not None and pictures.equal is False:
        print(f"{args.bundle}: pictures are prepared in another way here; do not evaluate or classify with it")
    return 0 if passed else 1


@dataclass(frozen=True)
class Prepared:
    """Whether the golden picture becomes its input here too, None where that cannot be tried; and what was found."""

    equal: bool | None
    found: str


def check_picture(path: Path) -> Prepared | None:
    """What this machine's Pillow and this project make of the golden picture; None where the bundle has none."""
    if not (path / PICTURE_FILE).is_file():
        return None
    try:
        import PIL
        from PIL import Image

        from resnet.data.preprocessing import Preprocessing
    except ModuleNotFoundError as error:
        return Prepared(None, f"not checked, {error.name} is not installed here: evaluate and classify need it")
    bundle = open_bundle(path)
    try:
        preprocessing = replace(Preprocessing.from_json(bundle.preprocessing), as_bytes=bundle.dtype == UINT8)
        expected = np.load(io.BytesIO(bundle.contents[PICTURE_INPUT_FILE]), allow_pickle=False)
        with Image.open(io.BytesIO(bundle.contents[PICTURE_FILE])) as picture:
            made = preprocessing([picture])
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, Image.DecompressionBombError) as error:
        raise ExportError(
            f"{path}: expected a golden picture and the input that it becomes ({first_line(error)})"
        ) from error
    if made.dtype == expected.dtype and np.array_equal(made, expected):
        return Prepared(True, f"the golden picture becomes its input, bit for bit (Pillow {PIL.__version__})")
    if (made.shape, made.dtype) != (expected.shape, expected.dtype):
        found = f"{list(made.shape)} {made.dtype} and not {list(expected.shape)} {expected.dtype}"
    else:
        scale = np.ones(1) if bundle.dtype == UINT8 else 255 * np.array(preprocessing.std)[:, None, None]
        found = f"up to {np.abs((made - expected.astype(np.float64)) * scale).max():.3g} of 255 levels off"
    return Prepared(False, f"the golden picture becomes another input, {found} (Pillow {PIL.__version__})")


def size(bundle: Path, rung: Rung) -> int:
    """Of a rung's file, in the bundle or by its whole path, in bytes; 0 where it has none."""
    return (bundle / rung.file).stat().st_size if rung.file else 0


def say_verified(bundle: Path, rungs: list[Rung], runtime: str) -> None:
    """What was found of a bundle, with one runtime where not with all, and what to do next."""
    waiting = [rung.file for rung in rungs if rung.not_run]
    outdated = [file for file in waiting if Path(file).is_absolute()]
    open_questions = [rung.no_verdict for rung in rungs if rung.no_verdict]
    if open_questions and all(rung or rung.no_verdict for rung in rungs):
        print(f"{bundle}: UNVERIFIED; what ran here computes what was exported, which is all that is known of it")
        print(in_flags(f"it was exported with {open_questions[0]}"))
    elif not all(rungs):
        print(f"{bundle}: WRONG; do not deploy, export again")
    elif outdated:
        print(f"{bundle}: whole, and what ran here computes what was exported")
        print(f"next: the same command with --build, for {', '.join(outdated)}")
    elif waiting:
        print(f"{bundle}: whole, and what ran here computes what was exported")
        print(f"next: the same command on the device, for {', '.join(waiting)}")
    else:
        what = f"{runtime} computes what was exported; ready to deploy with that" if runtime else EVERYTHING
        print(f"{bundle}: whole, and {what}")


EVERYTHING = "every artefact computes what was exported; ready to deploy"


def say_built(bundle: Path, rungs: list[Rung], builds: list[DeviceBuild]) -> None:
    """Where the engines are, and what to do next."""
    open_questions = [rung.no_verdict for rung in rungs if rung.no_verdict]
    done = {"built": "built here", "kept": "built here before", "restored": "back again, built here before"}
    for build in builds:
        if build:
            print(f"{build.file}: {done[build.origin]}, computes what was exported")
        elif build.origin == "built":
            print(f"{bundle}: {build.file.name} as built here is WRONG and was not put in place; do not deploy")
        else:
            print(f"{build.file}: WRONG; do not deploy, remove {build.file.parent} and build again")
    if open_questions:
        print(in_flags(f"{bundle}: UNVERIFIED; it was exported with {open_questions[0]}"))
    elif all(builds):
        print(f"next: {typed('evaluate')} {bundle} DATA, for its accuracy on labelled pictures")


if __name__ == "__main__":
    leave(main())
