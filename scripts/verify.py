"""Check a bundle again on this machine: every file is the one exported, and it computes what it should."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, Steps, importing, print_columns, run_script
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
    from export.base.errors import ExportError
    from export.runtime.build import DeviceBuild, build_on_device
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
    passed = all(rungs)
    if args.json:
        built = [{"file": str(build.file), "origin": build.origin, "passed": bool(build)} for build in builds]
        record = {"passed": passed, "rungs": [rung.to_json() for rung in rungs], "builds": built}
        print(in_flags(json.dumps(record)))
        return 0 if passed else 1
    sizes = {str(build.file): build.size for build in builds}
    print_columns(RUNG_HEADINGS, [rung.cells(sizes.get(rung.file) or size(args.bundle, rung)) for rung in rungs])
    if args.build:
        say_built(args.bundle, rungs, builds)
    else:
        say_verified(args.bundle, rungs, args.runtime)
    return 0 if passed else 1


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
    sys.exit(main())
