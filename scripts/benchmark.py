"""Compare ways of running a model on this machine, side by side in one run; one that computes something else fails."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.base.precision import FORMATS, INT8, PRECISIONS
from export.terminal.command_line import Parser, importing, leave, run_script
from export.terminal.commands import typed
from export.terminal.flags import in_flags

DEFAULTS = {"cpu": ("fp32", [1, 8]), "cuda": ("fp16", [1, 8, 32, 128])}
INITIALISING_IMAGES = 16
TOOL_PICTURES = 120  # to calibrate on, of a size that has to be scaled and cut
TOOL_PICTURE_SIZE = (288, 360)
BARE = """
import sys
import torch
from resnet.models import MODELS, create_model

_, name, *_, output = sys.argv
size = MODELS[name].image_size
batch = torch.export.Dim("batch", min=1, max=32)
images = torch.zeros(8, 3, size, size)
torch.onnx.export(create_model(name).eval(), (images,), output, dynamo=True, dynamic_shapes=({0: batch},))
"""
Result = dict[str, Any]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("benchmark", __doc__)
    parser.add_argument("--model", nargs="+", default=["resnet50"], metavar="NAME", help="default resnet50")
    parser.add_argument("--device", choices=DEFAULTS, help="default cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--precision",
        choices=FORMATS,
        help="default fp32 on a CPU; fp16 on a GPU, for --floors and --tool; int8 for --tool alone",
    )
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="default 1 8 on a CPU, 1 8 32 128 on a GPU")
    parser.add_argument(
        "--providers", nargs="+", default=[], metavar="NAME", help="those whose names begin so, and eager; default all"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--floors", action="store_true", help="count FLOPs, bytes and kernels per level of fusion instead"
    )
    what.add_argument("--export-step", action="store_true", help="time the writing of the ONNX file instead")
    what.add_argument(
        "--tool",
        nargs=2,
        type=Path,
        metavar="CHECKOUT",
        help="compare what an export takes of CPU time, wall time and memory in two checkouts of this project instead",
    )
    what.add_argument(
        "--quick",
        action="store_true",
        help="compare what an export --quick --fp16 takes with a script that only calls torch.onnx.export instead",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file too")
    args = parser.parse_args(argv)
    args.command = " ".join([typed("benchmark"), *(sys.argv[1:] if argv is None else argv)])
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("benchmark"):
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from export import ExportError
    from export.base.machine import describe_machine
    from export.benchmark.candidates import PROVIDERS
    from export.benchmark.compare import CALIBRATION_SEED, compare_on
    from export.benchmark.export_step import time_export_step
    from export.benchmark.floors import count_floors
    from export.benchmark.tool import SCRIPT, compare_checkouts, compare_programs
    from export.job import PARITY_IMAGES
    from export.sample_inputs import byte_crops, crops, photographs
    from export.terminal.benchmark_tables import (
        print_comparison,
        print_export_step,
        print_floors,
        print_quick,
        print_tool,
    )
    from export.terminal.console import Progress
    from resnet.data.files import write_atomically
    from resnet.errors import ResNetError
    from resnet.initialise import initialise
    from resnet.models import MODELS, create_model


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # of absent packages
    return run_script("benchmark", args, benchmark, refusals=(ResNetError,))


def benchmark(args: argparse.Namespace) -> int:
    """Measure, write and show what the arguments ask for; the exit code."""
    measure: Callable[..., Iterable[Result]] = compare
    show = print_comparison
    if args.floors:
        measure, show = floors, print_floors
    elif args.export_step:
        measure, show = export_step, print_export_step
    elif args.tool:
        measure, show = tool, print_tool
    elif args.quick:
        measure, show = quick, print_quick
    check_arguments(args)
    results: list[Result] = []
    with Progress() as progress:
        for name in args.model:
            for result in measure(name, args, progress):
                results.append(result)
                record = record_of(args, results)
                if args.output:  # after each: who is interrupted keeps what was found
                    write_atomically(args.output, f"{in_flags(json.dumps(record, indent=2))}\n".encode())
    if args.json:
        print(in_flags(json.dumps(record)))
    else:
        last_line = show(record)
        if args.output:
            print(f"{args.output} written")
        print(last_line)
    return 0 if record["passed"] else 1


def record_of(args: argparse.Namespace, results: list[Result]) -> dict[str, Any]:
    """What was measured, and where, for JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": args.command,
        "machine": describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        "passed": all(row.get("status") != "failed" for result in results for row in result["rows"]),
        "results": results,
    }


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse nonsense before any work is done, and fill in the defaults that follow from the machine."""
    with torch.device("meta"):
        for name in args.model:
            create_model(name)
    modes = {"--floors": args.floors, "--export-step": args.export_step, "--tool": args.tool, "--quick": args.quick}
    instead = next((mode for mode, chosen in modes.items() if chosen), "")
    unused = ["device", "batch", "providers", *(["precision"] if args.export_step or args.quick else [])]
    given = [f"--{name}" for name in unused if getattr(args, name)]
    if instead and given:
        raise ExportError(f"{instead} does not take {', '.join(given)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ExportError("--device cuda: no NVIDIA GPU here; expected --device cpu, or --floors, which needs none")
    if args.precision == INT8.name and not args.tool:
        raise ExportError("--precision int8: for --tool; elsewhere the file in 8 bits is compared beside the others")
    for checkout in args.tool or ():
        if not (checkout / SCRIPT).is_file():
            raise ExportError(f"--tool: expected a checkout with {SCRIPT} in it, got {checkout}")
    if unknown := [name for name in args.providers if name not in PROVIDERS]:
        raise ExportError(f"--providers: expected some of {', '.join(PROVIDERS)}, got {unknown[0]!r}")
    if args.batch and min(args.batch) < 1:
        raise ExportError(f"--batch: expected whole numbers of at least 1, got {min(args.batch)}")
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise ExportError(f"--output: expected a file in a folder that exists, got {args.output}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision, batches = DEFAULTS[args.device]
    args.precision = args.precision or ("fp16" if args.floors or args.tool else precision)
    args.batch = list(dict.fromkeys(args.batch or batches))


def seeded_model(name: str) -> nn.Module:
    """UNTRAINED, with calibrated BatchNorm: its outputs depend on the image, so that a wrong provider shows."""
    model = create_model(name)
    return initialise(model, photographs_for(name, INITIALISING_IMAGES, CALIBRATION_SEED)).eval()


def photographs_for(name: str, count: int, seed: int = 0) -> Tensor:
    size = MODELS[name].image_size
    return crops(photographs(), count, 3, (size, size), seed)


def compare(name: str, args: argparse.Namespace, progress: Progress) -> Iterator[Result]:
    """One result per batch size: every provider checked, and timed if it is right."""
    progress(f"initialise {name}")
    model, images = seeded_model(name), photographs_for(name, PARITY_IMAGES)
    draw, precision = partial(photographs_for, name), PRECISIONS[args.precision]
    for result in compare_on(args.device, model, images, draw, precision, args.batch, progress, args.providers):
        yield {"model": name, "weights": "UNTRAINED: seed 0", **result}


def floors(name: str, args: argparse.Namespace, progress: Progress) -> list[Result]:
    """What one image costs at each level of fusion, counted from the program."""
    progress(f"create {name}")
    model, precision = create_model(name).eval(), PRECISIONS[args.precision]
    return [{"model": name, **count_floors(model, photographs_for(name, 1), precision, progress)}]


def export_step(name: str, args: argparse.Namespace, progress: Progress) -> list[Result]:
    """How long writing the ONNX file takes."""
    progress(f"initialise {name}")
    return [{"model": name, **time_export_step(seeded_model(name), photographs_for(name, 4), progress)}]


def tool(name: str, args: argparse.Namespace, progress: Progress) -> list[Result]:
    """What an export takes in two checkouts, of the weights shipped with the second where it has some of that model.

    In int8 others are calibrated on crops of photographs in a temporary folder, which both read.
    """
    arguments = ["--model", name, f"--{args.precision}", "--engine", "none"]
    weights = sorted((args.tool[1] / "resnet/checkpoints").glob(f"{name}-*.safetensors"))[:1]
    for path in weights:
        arguments += ["--weights", str(path.resolve())]
    if weights or args.precision != INT8.name:
        return [{"model": name, **compare_checkouts(args.tool, arguments, progress)}]
    with tempfile.TemporaryDirectory() as folder:
        save_pictures(Path(folder), TOOL_PICTURES)
        found = compare_checkouts(args.tool, [*arguments, "--calibration", folder], progress)
    return [{"model": name, **found, "arguments": [*arguments, "--calibration", f"{TOOL_PICTURES} pictures"]}]


def save_pictures(folder: Path, count: int) -> None:
    """Crops of the photographs that parity is checked on, others than those, as JPEG."""
    for index, pixels in enumerate(byte_crops(photographs(), count, 3, TOOL_PICTURE_SIZE, CALIBRATION_SEED).numpy()):
        Image.fromarray(pixels).save(folder / f"{index:03d}.jpg", quality=95)


def quick(name: str, args: argparse.Namespace, progress: Progress) -> list[Result]:
    """What `export --quick` takes beside PyTorch's own export of the same network, each with all that it imports."""
    here, engine = Path(__file__).resolve().parent.parent, ("--engine", "none")
    programs = {
        "torch.onnx.export": (here, ("-c", BARE, name)),
        "export --quick --fp16": (here, (str(SCRIPT), "--quick", "--fp16", "--model", name, *engine)),
    }
    return [{"model": name, **compare_programs(programs, progress, "program")}]


if __name__ == "__main__":
    leave(main())
