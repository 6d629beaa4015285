"""Compile every kernel of a model ahead of time, for GPUs that need not be here, and judge the machine code.

The predicted floor of a kernel is a time that it cannot fall below on the target's usual board; nothing is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.base.precision import PRECISIONS
from export.terminal.command_line import Parser, importing, leave, run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("compile", __doc__)
    parser.add_argument("--targets", nargs="+", metavar="SM", help="default all")
    parser.add_argument("--model", nargs="+", default=["resnet50"], metavar="NAME", help="default resnet50")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128], metavar="N", help="default 1 8 32 128")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="default fp16")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--list-targets", action="store_true", help="which of them the installed Triton serves, tried out"
    )
    parser.add_argument("--alternatives", action="store_true", help="predict the configurations next to each one too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file too")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="an --output of another build, beside this one's floors"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("compile"):
    import torch
    from rich import box
    from rich.table import Table

    from export import ExportError, fuse
    from export.benchmark.workload import fused_workload
    from export.terminal.console import Progress, print_table
    from kernels.configs.targets import REFUSED, TARGETS
    from kernels.problems import Problem
    from resnet.errors import ResNetError
    from resnet.models import MODELS, create_model


# Of the launches of a forward pass: the floor, and what the loops that multiply issue and compute.
SUMMED = ("floor_us", "loop_instructions", "loop_flops")
WIDTH = 160  # of the tables where there is no terminal


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("compile", args, compile_kernels, refusals=(ResNetError,))


def compile_kernels(args: argparse.Namespace) -> int:
    """Compile and show what was found; the exit code, which is 1 where a kernel is at fault."""
    targets = targets_of(args)
    if args.list_targets:
        return list_targets(targets, args.json)
    before = read_build(args.compare) if args.compare else None
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise ExportError(f"--output: expected a file in a folder that exists, got {args.output}")
    with Progress() as progress:
        problems = [problem for name in args.model for problem in problems_of(name, args, progress)]
        kernels, launches = compile_for(targets, problems, progress)
    faulty = [kernel for kernel in kernels if kernel["faults"]]
    found = {"passed": not faulty, "predictor": predictor(), "kernels": kernels, "launches": launches}
    if args.output:
        args.output.write_text(json.dumps(found) + "\n")
    if args.json:
        print(json.dumps(found))
        return 1 if faulty else 0
    for target in targets:
        print_kernels(target, [kernel for kernel in kernels if kernel["target"] == target])
    print_launches(targets, launches)
    if args.alternatives:
        print_alternatives(targets, [problem for _, _, problem in problems])
    if before is not None:
        print_comparison(before, found)
    for kernel in faulty:
        print(f"{kernel['target']} {kernel['problem']}: {'; '.join(kernel['faults'])}")
    print(f"{len(kernels)} kernels for {len(targets)} targets: {len(faulty) or 'none'} at fault")
    return 1 if faulty else 0


def targets_of(args: argparse.Namespace) -> list[str]:
    """Those asked for; by default all that the installed Triton serves."""
    for target in args.targets or ():
        if target in REFUSED:
            raise ExportError(f"--targets: {target} is not served: {REFUSED[target]}")
        if target not in TARGETS:
            raise ExportError(f"--targets: expected some of {', '.join(TARGETS)}, got {target!r}")
    try:
        from kernels.compile import version_reason
    except ModuleNotFoundError as error:
        raise ExportError(f"no package {error.name}, expected triton: Linux only") from error

    reasons = {target: version_reason(TARGETS[target]) for target in args.targets or TARGETS}
    if args.list_targets:
        return [*reasons]
    if args.targets and any(reasons.values()):
        raise ExportError("--targets: " + "; ".join(reason for reason in reasons.values() if reason))
    return [target for target, reason in reasons.items() if reason is None]


def list_targets(targets: list[str], as_json: bool) -> int:
    """Which targets the installed Triton serves, each tried in a process of its own; the exit code."""
    import triton

    from kernels.compile import unserved_reason

    with Progress() as progress:
        reasons = {}
        for target in targets:
            progress(f"try {target}")
            reasons[target] = unserved_reason(TARGETS[target])
    if as_json:
        print(json.dumps({"triton": triton.__version__, "unserved": reasons}))
        return 0
    table = Table("target", "board", f"Triton {triton.__version__}", box=box.SIMPLE_HEAD)
    for target, reason in reasons.items():
        table.add_row(target, TARGETS[target].board, reason or "yes")
    print_table(table, WIDTH)
    return 0


Problems = list[tuple[str, int, Problem]]


def problems_of(name: str, args: argparse.Namespace, progress: Progress) -> Problems:
    """(model, batch, problem) of every fused operator of a model at every batch size."""
    if min(args.batch) < 1:
        raise ExportError(f"--batch: expected numbers of at least 1, got {min(args.batch)}")
    progress(f"capture and fuse {name}")
    model = create_model(name).eval()
    size = MODELS[name].image_size
    program = fuse(model, torch.zeros(1, 3, size, size))
    works = [(batch, fused_workload(program, PRECISIONS[args.precision], batch)) for batch in args.batch]
    return [(name, batch, work.problem) for batch, found in works for work in found if work.problem is not None]


def compile_for(
    targets: list[str], problems: Problems, progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was found in each kernel, and the launches of one forward pass per target, model and batch."""
    try:
        from kernels.compile import compile_problems
        from kernels.configs.selection import select_config
        from kernels.plan import plan
    except ModuleNotFoundError as error:
        raise ExportError(f"no package {error.name}, expected triton: Linux only") from error

    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        raise ExportError("TRITON_INTERPRET is set, expected it unset to compile the kernels")
    distinct = [problem for _, _, problem in problems]
    try:
        for name in targets:
            for problem in distinct:
                select_config(problem, TARGETS[name])
    except ValueError as error:  # a batch that no kernel can number, or a tuned table that is damaged
        raise ExportError(str(error)) from error
    kernels = compile_problems({TARGETS[name]: distinct for name in targets}, progress, floors=True)
    floors = {
        (kernel["target"], problem, json.dumps(kernel["config"])): floor
        for kernel in kernels
        for problem, floor in zip(kernel["problems"], kernel["floors"], strict=True)
    }
    counts: Counter[tuple[str, str, int]] = Counter()
    sums: dict[tuple[str, str, int], Counter[str]] = {}
    for name in targets:
        for model, batch, problem in problems:
            for launch in plan(problem, select_config(problem, TARGETS[name]), TARGETS[name]):
                counts[name, model, batch] += 1
                config = json.dumps(launch.config.to_json())
                floor = floors[name, launch.problem.key, config]
                sums.setdefault((name, model, batch), Counter()).update({key: floor[key] for key in SUMMED})
    keys = ("target", "model", "batch")
    return kernels, [
        {**dict(zip(keys, key, strict=True)), "launches": n, **{name: round(sums[key][name], 3) for name in SUMMED}}
        for key, n in counts.items()
    ]


def predictor() -> str:
    """Names what predicts: floors of two builds can be compared where it is the same."""
    from kernels.configs import targets
    from kernels.prediction import block, floor, sass, words

    text = "".join(inspect.getsource(module) for module in (targets, sass, words, block, floor))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_build(path: Path) -> dict[str, Any]:
    """What another build's --output holds.

    Raises:
        ExportError: it is no such file, or its floors are another predictor's.
    """
    if not path.is_file():  # opening a pipe would wait for whoever writes to it
        raise ExportError(f"--compare: expected a file written by --output, got {path}, which is no file")
    try:
        build: dict[str, Any] = json.loads(path.read_text())
        theirs = build["predictor"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"--compare: expected a file written by --output, {path}: {error!r}") from error
    if theirs != predictor():
        raise ExportError(
            f"--compare: {path} was predicted by {theirs}, expected {predictor()}: "
            "write it again with kernels/prediction and kernels/configs/targets.py of this build"
        )
    return build


def print_comparison(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Predicted floors of two builds: of each problem, where either is above the other, and of whole networks."""
    ours, theirs = problem_floors(now), problem_floors(before)
    table = Table("target", "problem", title="predicted floors, us", box=box.SIMPLE_HEAD)
    for heading in ("before", "now", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("bound by")
    for (target, problem), floors in ours.items():
        old_floors = theirs.get((target, problem))
        if old_floors is None:
            continue
        before_us, now_us = (sum(floor["floor_us"] for floor in build) for build in (old_floors, floors))
        bound = " + ".join(floor["bound_by"] for floor in floors)
        row = (f"{before_us:.2f}", f"{now_us:.2f}", f"{now_us / before_us:.2f}")
        table.add_row(target, problem, *row, bound, style="red" if now_us > 1.001 * before_us else "")
    print_table(table, WIDTH)
    table = Table("target", "network", title="predicted floors of a forward pass, us", box=box.SIMPLE_HEAD)
    for heading in ("before", "now", "ratio"):
        table.add_column(heading, justify="right")
    for heading in ("before", "now", "ratio"):
        table.add_column(f"loops: {heading}", justify="right")
    totals = {(e["target"], e["model"], e["batch"]): e for e in before["launches"]}
    for entry in now["launches"]:
        old = totals.get((entry["target"], entry["model"], entry["batch"]))
        if old is not None:
            times = [f"{e['floor_us']:.1f}" for e in (old, entry)] + [f"{entry['floor_us'] / old['floor_us']:.2f}"]
            lean = [1e3 * e["loop_instructions"] / e["loop_flops"] if e["loop_flops"] else 0.0 for e in (old, entry)]
            loops = [f"{value:.3f}" for value in lean] + [f"{lean[1] / lean[0]:.2f}" if lean[0] else ""]
            table.add_row(entry["target"], f"{entry['model']} batch {entry['batch']}", *times, *loops)
    print_table(table, WIDTH)
    print("loops: instructions of a warp per 1000 operations of tensor cores, in the loops that multiply")


def print_alternatives(targets: list[str], problems: list[Problem]) -> None:
    """The predicted floor of each problem's configuration beside the best of those one decision away."""
    from kernels.compile import alternatives

    table = Table("target", "problem", "best beside it", title="predicted floors, us", box=box.SIMPLE_HEAD)
    for heading in ("chosen", "best", "ratio"):
        table.add_column(heading, justify="right")
    for target in targets:
        for problem in dict.fromkeys(problems):
            tried = alternatives(problem, TARGETS[target])
            chosen, (config, best) = tried[0][1], min(tried, key=lambda entry: entry[1])
            words = "" if best == chosen else describe_config(config.to_json())
            row = (f"{1e6 * chosen:.2f}", f"{1e6 * best:.2f}", f"{chosen / best:.2f}")
            table.add_row(target, problem.key, words, *row)
    print_table(table, WIDTH)


def problem_floors(build: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The floors of the kernels that run a problem, one after the other, by target and problem."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in build["kernels"]:
        for whole, floor in zip(kernel["wholes"], kernel["floors"], strict=True):
            found.setdefault((kernel["target"], whole), []).append(floor)
    return found


def print_kernels(target: str, kernels: list[dict[str, Any]]) -> None:
    table = Table(title=f"{target}, {TARGETS[target].shared_memory} bytes of shared memory", box=box.SIMPLE_HEAD)
    table.add_column("kernel")
    table.add_column("config")
    for heading in ("registers", "stack", "shared", "tensor-core ops", "loads", "floor us"):
        table.add_column(heading, justify="right")
    table.add_column("bound by")
    table.add_column("")
    for kernel in kernels:
        operations = " ".join(f"{count} {name}" for name, count in kernel["tensor_core_ops"].items())
        more = f" +{len(kernel['problems']) - 1}" if len(kernel["problems"]) > 1 else ""
        table.add_row(
            kernel["problem"] + more,
            describe_config(kernel["config"]),
            str(kernel["registers"]),
            str(kernel["stack_bytes"]),
            str(kernel["shared_bytes"]),
            operations,
            describe_loads(kernel),
            f"{kernel['floors'][0]['floor_us']:.2f}",
            kernel["floors"][0]["bound_by"],
            "FAULT" if kernel["faults"] else "ok",
            style="red" if kernel["faults"] else "",
        )
    print_table(table, WIDTH)


def print_launches(targets: list[str], launches: list[dict[str, Any]]) -> None:
    """Kernels per forward pass; a pair of convolutions counts as one or two, as the configuration decides."""
    cases = list(dict.fromkeys((entry["model"], entry["batch"]) for entry in launches))
    table = Table("launches", *(f"{model} batch {batch}" for model, batch in cases), box=box.SIMPLE_HEAD)
    counts = {(entry["target"], entry["model"], entry["batch"]): entry["launches"] for entry in launches}
    for target in targets:
        table.add_row(target, *(str(counts[target, model, batch]) for model, batch in cases))
    print_table(table, WIDTH)


def describe_config(config: dict[str, Any]) -> str:
    """Tile, warps and stages, and what is not the default, in a few words."""
    if "first" in config:
        return " and ".join(describe_config(config[half]) for half in ("first", "second"))
    sides = [config[name] for name in ("block_m", "block_q", "block_n", "block_k") if name in config]
    words = ["x".join(map(str, sides)), f"{config['num_warps']} warps"]
    if "num_stages" in config:
        words.append(f"{config['num_stages']} stages")
    if config.get("split_k", 1) > 1:
        words.append(f"split {config['split_k']}")
    if config.get("box"):
        words.append("box " + "x".join(map(str, config["box"])))
    if "pool_rows" in config:
        words.append(f"{config['pool_rows']} pooled rows")
    return ", ".join(words)


def describe_loads(kernel: dict[str, Any]) -> str:
    """How the tiles come in: TMA, or the width in bytes of the widest copy."""
    if kernel["box_loads"]:
        return "TMA"
    return f"{max(map(int, [*kernel['global_loads'], *kernel['async_copies']]), default=0)} bytes"


if __name__ == "__main__":
    leave(main())
