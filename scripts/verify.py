"""Check a bundle again on this machine: every file is the one exported, and it computes what it should."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.command_line import Parser, Steps, print_columns, run_script
from export.parity.report import RUNG_HEADINGS
from export.verify import verify_bundle


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="verify.py", description=__doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder written by export.py")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("verify.py", lambda: verify(args))


def verify(args: argparse.Namespace) -> int:
    """Check the bundle and say what was found; the exit code, which is 1 for what is not equal."""
    with Steps() as progress:
        rungs = verify_bundle(args.bundle, progress)
    passed = all(rungs)
    if args.json:
        print(json.dumps({"passed": passed, "rungs": [rung.to_json() for rung in rungs]}))
        return 0 if passed else 1
    sizes = {path.name: path.stat().st_size for path in args.bundle.iterdir()}
    print_columns(RUNG_HEADINGS, [rung.cells(sizes.get(rung.file, 0)) for rung in rungs])
    waiting = [rung.file for rung in rungs if rung.not_run]
    if not passed:
        print(f"{args.bundle}: WRONG; do not deploy, export again")
    elif waiting:
        print(f"{args.bundle}: whole, and what ran here computes what was exported")
        print(f"next: the same command on the device, for {', '.join(waiting)}")
    else:
        print(f"{args.bundle}: whole, and every artefact computes what was exported; ready to deploy")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
