"""Compare ways of running a model on this machine, side by side in one run; one that computes something else fails."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.base.precision import PRECISIONS
from export.terminal.command_line import Parser, importing, run_script
from export.terminal.commands import typed
from export.terminal.flags import in_flags

DEFAULTS = {"cpu": ("fp32", [1, 8]), "cuda": ("fp16", [1, 8, 32, 128])}
CALIBRATION_IMAGES = 16
CALIBRATION_SEED = 1  # other crops than those the providers are checked on
INPUT_SEEDS = (2, 3, 4, 5)  # of the batches in rotation while the clock runs
BUSY = 1.5  # between the 80 % and the 20 % quantile of eager's times; an idle machine shows 1.0 to 1.1
EXPORT_STEP_ROUNDS = 3
LEVEL_NAMES = {
    "a": "eager",
    "i": "vendor's convolutions, each with one pointwise kernel",
    "b": "convolution + bias + residual + ReLU",
    "c1": "b; stem with its pool; head",
    "c2": "c1; projection in the block's last convolution",
    "c3": "c2; 3x3 and 1x1 back to back",
}
Result = dict[str, Any]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("benchmark", __doc__)
    parser.add_argument("--model", nargs="+", default=["resnet50"], metavar="NAME", help="default resnet50")
    parser.add_argument("--device", choices=DEFAULTS, help="default cuda where there is a GPU, else cpu")
    parser.add_argument("--precision", choices=PRECISIONS, help="default fp32 on a CPU, fp16 on a GPU and for --floors")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="default 1 8 on a CPU, 1 8 32 128 on a GPU")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--floors", action="store_true", help="count FLOPs, bytes and kernels per level of fusion instead"
    )
    what.add_argument("--export-step", action="store_true", help="time the writing of the ONNX file instead")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file too")
    args = parser.parse_args(argv)
    args.command = " ".join([typed("benchmark"), *(sys.argv[1:] if argv is None else argv)])
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("benchmark"):
    import torch
    from rich import box
    from rich.table import Table
    from torch import Tensor, nn

    from export import Batch, ExportError, FusedProgram, fuse
    from export.base.batch import DEFAULT_BATCH
    from export.base.machine import describe_machine, machine_line
    from export.benchmark.candidates import Subject, cpu_candidates, cuda_candidates, int8_candidate, plain_onnx
    from export.benchmark.compare import CPU_CLOCK, CUDA_CLOCK, compare_providers, describe
    from export.benchmark.roofline import floor_seconds, measure_ceilings, workloads
    from export.forms import quantised_programs
    from export.fusion.passes import DEFAULT_LEVEL, LEVELS, QUANTISED_LEVEL
    from export.lowering.onnx_file import lower_onnx
    from export.pipeline import PARITY_IMAGES
    from export.quantisation.calibration import WANTED_IMAGES, Calibration, InMemory, calibrate
    from export.quantisation.scheme import CPU
    from export.quantisation.split_addition import split_addition
    from export.sample_inputs import crops, photographs
    from export.terminal.console import Progress, print_table
    from resnet.errors import ResNetError
    from resnet.initialise import initialise
    from resnet.models import MODELS, create_model


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # of absent packages
    return run_script("benchmark", args, benchmark, refusals=(ResNetError,))


def benchmark(args: argparse.Namespace) -> int:
    """Measure, write and show what the arguments ask for; the exit code."""
    measure, show = compare, show_comparison
    if args.floors:
        measure, show = floors, show_floors
    elif args.export_step:
        measure, show = export_step, show_export_step
    check_arguments(args)
    with Progress() as progress:
        results = [result for name in args.model for result in measure(name, args, progress)]
    passed = all(row.get("status") != "failed" for result in results for row in result["rows"])
    record = {
        "date": datetime.date.today().isoformat(),
        "command": args.command,
        "machine": describe_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        "passed": passed,
        "results": results,
    }
    if args.output:
        args.output.write_text(in_flags(json.dumps(record, indent=2)) + "\n")
    if args.json:
        print(in_flags(json.dumps(record)))
    else:
        last_line = show(record)
        if args.output:
            print(f"{args.output} written")
        print(last_line)
    return 0 if passed else 1


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse nonsense before any work is done, and fill in the defaults that follow from the machine."""
    with torch.device("meta"):
        for name in args.model:
            create_model(name)
    instead = "--floors" if args.floors else "--export-step" if args.export_step else ""
    unused = ["device", "batch"] if args.floors else ["device", "batch", "precision"]
    given = [f"--{name}" for name in unused if getattr(args, name) is not None]
    if instead and given:
        raise ExportError(f"{instead} does not take {', '.join(given)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ExportError("--device cuda: no NVIDIA GPU here; expected --device cpu, or --floors, which needs none")
    if args.batch and min(args.batch) < 1:
        raise ExportError(f"--batch: expected whole numbers of at least 1, got {min(args.batch)}")
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise ExportError(f"--output: expected a file in a folder that exists, got {args.output}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision, batches = DEFAULTS[args.device]
    args.precision = args.precision or ("fp16" if args.floors else precision)
    args.batch = list(dict.fromkeys(args.batch or batches))


def seeded_model(name: str) -> nn.Module:
    """UNTRAINED, with calibrated BatchNorm: its outputs depend on the image, so that a wrong provider shows."""
    model = create_model(name)
    return initialise(model, photographs_for(name, CALIBRATION_IMAGES, CALIBRATION_SEED)).eval()


def photographs_for(name: str, count: int, seed: int = 0) -> Tensor:
    size = MODELS[name].image_size
    return crops(photographs(), count, 3, (size, size), seed)


def compare(name: str, args: argparse.Namespace, progress: Progress) -> list[Result]:
    """One result per batch size: every provider checked, and timed if it is right."""
    precision, cuda, largest = PRECISIONS[args.precision], args.device == "cuda", max(args.batch)
    progress(f"initialise {name}")
    model, images = seeded_model(name), photographs_for(name, PARITY_IMAGES)
    programs = fused(
        model,
        images,
        Batch(1, min(8, largest), largest),
        LEVELS if cuda else (DEFAULT_LEVEL, QUANTISED_LEVEL),
        progress,
    )
    progress("run the eager model in float64")
    subject = Subject.of(model, programs, precision, images)
    common: Result = {"model": name, "weights": "UNTRAINED: seed 0", "device": args.device, "precision": precision.name}
    if cuda:
        # For all providers alike: cuDNN looks for its fastest algorithm, and float32 means float32.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
        progress("measure the ceilings of the device")
        ceilings = measure_ceilings(precision)
        common |= {"peak_tflops": ceilings.flops / 1e12, "bandwidth_gb_s": ceilings.bandwidth / 1e9}
        candidates, clock = cuda_candidates(subject), CUDA_CLOCK
    else:
        common["threads"] = torch.get_num_threads()
        progress("calibrate 8 bits")
        quantised = quantised_programs(programs[QUANTISED_LEVEL], calibrated(name, programs, progress), ())[CPU]
        threads = torch.get_num_threads()
        candidates = [*cpu_candidates(subject, threads), int8_candidate(subject, quantised, threads)]
        clock = CPU_CLOCK
    results = []
    for batch in args.batch:
        inputs, levels = [photographs_for(name, batch, seed) for seed in INPUT_SEEDS], {}
        if cuda:
            inputs = [x.to("cuda", precision.dtype, memory_format=torch.channels_last) for x in inputs]
            works = workloads(programs, precision, batch)
            levels = {level: floor_seconds(found, ceilings) for level, found in works.items()}
        rows = compare_providers(candidates, subject, batch, inputs, clock, progress)
        results.append({**common, "batch": batch, "rows": describe(rows, batch, levels)})
    return results


def calibrated(name: str, programs: Mapping[str, FusedProgram], progress: Progress) -> Calibration:
    pictures = InMemory(photographs_for(name, WANTED_IMAGES, CALIBRATION_SEED).numpy())
    program = programs[QUANTISED_LEVEL]
    return calibrate(split_addition(program.master), pictures, batch=program.batch, progress=progress)


def fused(
    model: nn.Module, images: Tensor, batch: Batch, levels: Iterable[str], progress: Progress
) -> dict[str, FusedProgram]:
    programs = {}
    for level in levels:
        progress(f"capture and fuse, level {level}")
        programs[level] = fuse(model, images, batch, level)
    return programs


def show_comparison(record: Result) -> str:
    """Print a table per batch size; returns the line a person can act on."""
    results = record["results"]
    first = results[0]
    print(machine_line(record["machine"]))
    if first["device"] == "cuda":
        print(
            f"measured here: {first['peak_tflops']:.0f} TFLOP/s in {first['precision']}, "
            f"{first['bandwidth_gb_s']:.0f} GB/s; S is the floor of a level's kernels at these rates"
        )
        print("every input is on the device in channels_last and copying it is not timed; cudnn.benchmark on, TF32 off")
    else:
        print(f"{first['threads']} threads for torch and for ONNX Runtime alike")
    print(
        "error ratio: a provider's error against the float64 model over that of unfused operators; too large, not timed"
    )
    for result in results:
        show_rows(result)
    wrong = dict.fromkeys(row["provider"] for result in results for row in result["rows"] if row["status"] == "failed")
    if wrong:
        return f"FAILED, not equal to the eager model or broken: {', '.join(wrong)}; do not deploy that"
    best, spread = [], max(result["rows"][0]["p80_ms"] / result["rows"][0]["p20_ms"] for result in results)
    for result in results:
        row = min((row for row in result["rows"] if "median_ms" in row), key=lambda row: row["median_ms"])
        best.append(f"{result['model']} batch {result['batch']}: {row['provider']}, {row['times_eager']:.2f} x eager")
    print(f"fastest: {'; '.join(best)}")
    if spread > BUSY:
        return (
            f"the machine was busy: eager's times spread by {spread:.1f} times; run this again with nothing beside it"
        )
    return f"next: {typed('export')} --model {first['model']} --precision {first['precision']}"


def show_rows(result: Result) -> None:
    title = f"{result['model']}, {result['precision']}, batch {result['batch']}, {result['device']}"
    columns = {
        "median ms": ("median_ms", ".3f"),
        "20 %": ("p20_ms", ".3f"),
        "80 %": ("p80_ms", ".3f"),
        "img/s": ("images_per_second", ",.0f" if result["device"] == "cuda" else ".1f"),
        "x eager": ("times_eager", ".2f"),
        "x compile": ("times_compiled", ".2f"),
        "S ms": ("floor_ms", ".3f"),
        "time / S": ("over_floor", ".2f"),
        "error ratio": ("error_ratio", ".2f"),
    }
    if result["device"] == "cpu":
        del columns["S ms"], columns["time / S"]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("provider")
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        cells = [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.values()]
        table.add_row(row["provider"], *cells, style="red" if row["status"] == "failed" else "")
    print_table(table)
    for row in result["rows"]:
        if row["reason"]:
            print(f"{row['provider']}: {row['status']}: {in_flags(row['reason'])}")


def floors(name: str, args: argparse.Namespace, progress: Progress) -> list[Result]:
    """What one image costs at each level of fusion, counted from the program."""
    progress(f"create {name}")
    precision, model = PRECISIONS[args.precision], create_model(name).eval()
    programs = fused(model, photographs_for(name, 1), DEFAULT_BATCH, LEVELS, progress)
    rows = []
    for level, works in workloads(programs, precision, 1).items():
        rows.append(
            {
                "level": level,
                "flops": sum(work.flops for work in works),
                "weight_bytes": sum(work.weight_bytes for work in works),
                "activation_bytes": sum(work.activation_bytes for work in works),
                "kernels": len(works),
            }
        )
    return [{"model": name, "precision": precision.name, "rows": rows}]


def show_floors(record: Result) -> str:
    for result in record["results"]:
        title = f"{result['model']}, {result['precision']}, one image: what its kernels must compute, read and write"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("level")
        table.add_column("")
        for heading in ("GFLOP", "weights MB", "activations MB", "kernels"):
            table.add_column(heading, justify="right")
        for row in result["rows"]:
            numbers = (row["flops"] / 1e9, row["weight_bytes"] / 1e6, row["activation_bytes"] / 1e6)
            formatted = [format(number, spec) for number, spec in zip(numbers, (".2f", ".1f", ".1f"), strict=True)]
            table.add_row(row["level"], LEVEL_NAMES[row["level"]], *formatted, str(row["kernels"]))
        print_table(table)
    last = record["results"][-1]
    bytes_of = {row["level"]: row["activation_bytes"] for row in last["rows"]}
    saved = bytes_of["a"] / bytes_of[DEFAULT_LEVEL]
    return (
        f"{last['model']} moves {saved:.1f} times fewer activations at {DEFAULT_LEVEL} than eager; "
        f"next: {typed('benchmark')} --model {last['model']}"
    )


def export_step(name: str, args: argparse.Namespace, progress: Progress) -> list[Result]:
    """Time a bare torch.onnx.export, this project's ONNX step, and fusion with it, in turn."""
    progress(f"initialise {name}")
    model, images = seeded_model(name), photographs_for(name, 4)
    program = fuse(model, images)

    def bare() -> None:
        plain_onnx(model, images, DEFAULT_BATCH)

    def ours(precision: str) -> Callable[[], None]:
        def step() -> None:
            lower_onnx(program, images, PRECISIONS[precision], {}).serialize()

        return step

    def with_fusion() -> None:
        lower_onnx(fuse(model, images), images, PRECISIONS["fp16"], {}).serialize()

    steps = {
        "torch.onnx.export": bare,
        "ONNX step, fp32": ours("fp32"),
        "ONNX step, fp16": ours("fp16"),
        "capture, fuse and ONNX step, fp16": with_fusion,
    }
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for label, step in steps.items():
        progress(f"warm up {label}")
        step()
    for number in range(EXPORT_STEP_ROUNDS):
        for label, step in steps.items():
            progress(f"round {number + 1}: {label}")
            started = time.perf_counter()
            step()
            seconds[label].append(time.perf_counter() - started)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    bare_median = medians["torch.onnx.export"]
    rows = [{"step": label, "median_s": m, "times_torch": m / bare_median} for label, m in medians.items()]
    return [{"model": name, "rounds": EXPORT_STEP_ROUNDS, "rows": rows}]


def show_export_step(record: Result) -> str:
    for result in record["results"]:
        facts = f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}"
        table = Table("step", "median s", "ratio", title=f"{result['model']}, {result['rounds']} rounds; {facts}")
        for row in result["rows"]:
            table.add_row(row["step"], f"{row['median_s']:.2f}", f"{row['times_torch']:.2f}")
        print_table(table)
    return f"next: {typed('export')} --model {record['results'][-1]['model']}"


if __name__ == "__main__":
    sys.exit(main())
