"""Find the fastest launch configuration of every kernel of a model on this machine's GPU, and write the tuned table."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, importing, leave, run_script
from export.terminal.commands import typed

DEVICE = "cuda"
# How often a kernel is timed, and how many launches at least are timed at once.
REPLAYS, LAUNCHES = 20, 30


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("tune", __doc__)
    parser.add_argument("--model", nargs="+", default=["resnet50"], metavar="NAME", help="default resnet50")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128], metavar="N", help="default 1 8 32 128")
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16", help="default fp16")
    parser.add_argument("--as-is", action="store_true", help="search nothing and write no table: time what runs now")
    beside = "with --as-is: a file of compile_kernels.py --output, for its predicted floors"
    parser.add_argument("--floors", type=Path, metavar="FILE", help=beside)
    parser.add_argument("--output", type=Path, metavar="FILE", help="with --as-is: write the times as JSON")
    args = parser.parse_args(argv)
    if not args.as_is and (args.floors or args.output):
        parser.error("--floors and --output: expected --as-is, which takes them")
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("tune"):
    import numpy as np
    import torch
    from rich import box
    from rich.table import Table

    from export import Batch, ExportError, fuse
    from export.base.errors import first_line
    from export.base.machine import describe_machine
    from export.base.precision import PRECISIONS
    from export.benchmark.compare import QUANTILES
    from export.benchmark.timing import graph_seconds
    from export.benchmark.workload import fused_workload
    from export.terminal.console import Progress, print_table
    from kernels.configs.config import Config
    from kernels.configs.heuristic import heuristic_config
    from kernels.configs.selection import select_config, tuned_table, write_table
    from kernels.configs.targets import Target
    from kernels.configs.tuning import tune
    from kernels.operators.registry import OPERATORS, Arguments
    from kernels.oracle import make_inputs, oracle, p1_failures
    from kernels.problems import Problem
    from resnet.data.files import write_atomically
    from resnet.errors import ResNetError
    from resnet.models import MODELS, create_model


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("tune", args, tune_and_show, refusals=(ResNetError,))


def tune_and_show(args: argparse.Namespace) -> int:
    """Tune and show what was won, or time what there is; the exit code."""
    if not torch.cuda.is_available():
        raise ExportError("no NVIDIA GPU here: expected to run on the GPU to tune for")
    if args.as_is:
        return time_as_is(args)
    with Progress() as progress:
        rows, path = tune_models(args, progress)
    print_rows(rows)
    print(f"{path} written; next: {typed('benchmark')} --device cuda --model {args.model[0]}")
    return 0


Uses = dict[tuple[str, int], list[Problem]]


def problems_of(args: argparse.Namespace) -> Uses:
    """The problems of each model's operators at each batch size, the two halves of each bottleneck included."""
    found: Uses = {}
    for name in args.model:
        size = MODELS[name].image_size if name in MODELS else 224
        batch = Batch(1, 1, max(args.batch))
        program = fuse(create_model(name).eval(), torch.zeros(1, 3, size, size), batch)
        for n in args.batch:
            works = fused_workload(program, PRECISIONS[args.precision], n)
            found[name, n] = [work.problem for work in works if work.problem is not None]
    return found


def distinct(uses: Uses) -> list[Problem]:
    return list(dict.fromkeys(problem for problems in uses.values() for problem in problems))


def target_here() -> Target:
    """The target that this machine's GPU is.

    Raises:
        ExportError: it is an older one.
    """
    from kernels.launch import target_of

    try:
        return target_of(torch.device("cuda", torch.cuda.current_device()))
    except ValueError as error:
        raise ExportError(str(error)) from error


def tune_models(args: argparse.Namespace, progress: Progress) -> tuple[list[tuple[str, float, float, int]], Path]:
    """(problem, heuristic's us, tuned us, configurations measured) of each, and the table's path."""
    target = target_here()
    progress("capture and fuse")
    problems = distinct(problems_of(args))
    try:
        configs: dict[str, Config] = dict(tuned_table(target.name))
        start_from = {problem: heuristic_config(problem, target) for problem in problems}
    except ValueError as error:  # a batch that no kernel can number, or a tuned table that is damaged
        raise ExportError(str(error)) from error
    facts = describe_machine(torch.cuda.get_device_name())
    header: dict[str, str] = {name: facts[name] for name in ("gpu", "torch", "triton") if name in facts}
    header["date"] = datetime.date.today().isoformat()
    rows, path = [], Path()
    for index, problem in enumerate(problems):
        progress(f"{index + 1} of {len(problems)}: {problem.key}")
        measure = Measurement()
        config, seconds, count = tune(problem, target, measure)
        start = measure(problem, start_from[problem])
        rows.append((problem.key, 1e6 * (start or 0), 1e6 * seconds, count))
        configs[problem.key] = config
        # After each: an interrupted run keeps what it found.
        path = write_table(target.name, header, configs, write_atomically)
    return rows, path


class Measurement:
    """Seconds of one launch of a problem under a configuration; None where it does not run or fails P1.

    P1 is checked on at most two images, for which float64 on the CPU is quick: the number of images is a run-time
    argument of the same machine code.
    """

    def __init__(self) -> None:
        self._checks: dict[Problem, tuple[Any, Any]] = {}
        self._inputs: tuple[Problem, list[Arguments[torch.Tensor]]] | None = None
        self._seconds: dict[tuple[Problem, Config], float | None] = {}

    def __call__(self, problem: Problem, config: Config) -> float | None:
        key = (problem, config)
        if key not in self._seconds:
            seconds, _ = self.times(problem, config)
            self._seconds[key] = statistics.median(seconds) if seconds else None
        return self._seconds[key]

    def times(self, problem: Problem, config: Config) -> tuple[list[float], str]:
        """Seconds of one launch, measured several times; none of one that does not run or fails P1, and why."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        from kernels.launch import Workspace

        workspace = Workspace(DEVICE)  # the launches follow each other on one stream
        try:
            if failures := self._failures(problem.with_batch(min(problem.batch, 2)), config, workspace):
                return [], "; ".join(failures)
        except (CompilationError, OutOfResources, PTXASError) as error:
            return [], f"{type(error).__name__}: {first_line(error)}"
        if self._inputs is None or self._inputs[0] != problem:  # those of one problem at a time: they fill L2 twice
            self._inputs = problem, rotated(problem)
        sets = self._inputs[1]
        launches = [launcher(sets[i % len(sets)], config, workspace) for i in range(max(len(sets), LAUNCHES))]
        return graph_seconds(launches, REPLAYS), ""

    def _failures(self, problem: Problem, config: Config, workspace: Any) -> list[str]:
        if problem not in self._checks:
            inputs = make_inputs(problem, DEVICE)
            self._checks[problem] = inputs, oracle(problem, inputs)
        inputs, expected = self._checks[problem]
        return p1_failures(launcher(inputs, config, workspace)(), problem, inputs, expected)


def rotated(problem: Problem) -> list[Arguments[torch.Tensor]]:
    """Inputs in so many places that none is still in L2 when its turn comes again, as in a network no weight is.

    Their numbers are those of at most two images, since drawing them takes longer than all else.
    """
    few = make_inputs(problem.with_batch(min(problem.batch, 2)), DEVICE)

    def all_images(name: str, tensor: torch.Tensor) -> torch.Tensor:
        shape = problem.shapes[name]
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        times = (-(-shape[0] // len(tensor)), *[1] * (len(shape) - 1))
        return tensor.repeat(times)[: shape[0]].contiguous(memory_format=layout)

    tensors: dict[str, Any] = {name: all_images(name, tensor) for name, tensor in few.tensors().items()}
    inputs = OPERATORS[problem.operator](**tensors, **problem.settings)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return [inputs, *(inputs.map(torch.clone) for _ in range(2 * l2_bytes // size))]


def launcher(inputs: Arguments[torch.Tensor], config: Config, workspace: Any) -> Callable[[], torch.Tensor]:
    """One launch of the problem's operator."""
    from kernels.launch import run

    return functools.partial(run, inputs.operator, *inputs.values(), config=config, workspace=workspace)


def time_as_is(args: argparse.Namespace) -> int:
    """Time what runs now, write and show it; the exit code, 1 where a kernel is wrong."""
    target, measure = target_here(), Measurement()
    predicted = read_floors(args.floors, target) if args.floors else {}
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {"machine": describe_machine(torch.cuda.get_device_name()), "target": target.name}
    record |= {"floors_of": target.board if predicted else "", "rows": rows}
    with Progress() as progress:
        progress("capture and fuse")
        uses = problems_of(args)
        problems = distinct(uses)
        try:
            configs = {problem: select_config(problem, target) for problem in problems}
        except ValueError as error:  # a batch that no kernel can number, or a tuned table that is damaged
            raise ExportError(str(error)) from error
        for index, problem in enumerate(problems):
            progress(f"{index + 1} of {len(problems)}: {problem.key}")
            seconds, reason = measure.times(problem, configs[problem])
            rows.append(describe_times(problem.key, seconds, reason, predicted.get(problem.key, ())))
            record["networks"] = network_sums(uses, rows)
            if args.output:  # after each: who is interrupted keeps what was found
                write_atomically(args.output, f"{json.dumps(record, indent=1)}\n".encode())
    return print_times(record)


def read_floors(path: Path, target: Target) -> dict[str, list[dict[str, Any]]]:
    """Problem -> the predicted floors of its launches.

    Raises:
        ExportError: the file holds none for this target.
    """
    floors: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():  # opening a pipe would wait for whoever writes to it
        raise ExportError(f"--floors: expected a file that compile_kernels.py wrote, got {path}, which is no file")
    try:
        for kernel in json.loads(path.read_text())["kernels"]:
            for whole, floor in zip(kernel["wholes"], kernel["floors"], strict=True):
                if kernel["target"] == target.name:
                    floors.setdefault(whole, []).append({"floor_us": floor["floor_us"], "bound_by": floor["bound_by"]})
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"--floors: expected a file that compile_kernels.py wrote, {path}: {error!r}") from error
    if not floors:
        raise ExportError(f"--floors: expected a file of {typed('compile')} --targets {target.name}, got {path}")
    return floors


def describe_times(
    key: str, seconds: Sequence[float], reason: str, floors: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What was measured of a problem, in microseconds, beside what was predicted."""
    row: dict[str, Any] = {"problem": key, "status": "measured" if seconds else "failed", "reason": reason}
    if seconds:
        low, median, high = (1e6 * float(q) for q in np.quantile(seconds, QUANTILES))
        row |= {"median_us": median, "p20_us": low, "p80_us": high}
    if floors:
        row["floor_us"] = sum(floor["floor_us"] for floor in floors)
        row["bound_by"] = " + ".join(floor["bound_by"] for floor in floors)
    if seconds and floors:
        row["over_floor"] = row["median_us"] / row["floor_us"]
    return row


def network_sums(uses: Uses, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every network and batch size whose kernels are all measured: the sum of their times, and of their floors."""
    measured = {row["problem"]: row for row in rows if row["status"] == "measured"}
    sums: list[dict[str, Any]] = []
    for (model, batch), problems in uses.items():
        if all(problem.key in measured for problem in problems):
            found = [measured[problem.key] for problem in problems]
            sums.append({"model": model, "batch": batch, "kernels_us": sum(row["median_us"] for row in found)})
            if all("floor_us" in row for row in found):
                sums[-1]["floor_us"] = sum(row["floor_us"] for row in found)
    return sums


def print_times(record: Mapping[str, Any]) -> int:
    """Show what was measured, what is furthest above its floor last; the exit code."""
    rows, keys = record["rows"], ("median_us", "p20_us", "p80_us", "floor_us", "over_floor")
    table = Table("problem", box=box.SIMPLE_HEAD)
    for heading in ("us", "20 %", "80 %", "predicted floor", "us / floor"):
        table.add_column(heading, justify="right")
    table.add_column("bound by")
    for row in sorted(rows, key=lambda row: float(row.get("over_floor", 0))):
        numbers = (f"{row[key]:.2f}" if key in row else "" for key in keys)
        table.add_row(row["problem"], *numbers, row.get("bound_by", ""), style="red" if row["reason"] else "")
    print_table(table)
    for entry in record["networks"]:
        floors = f", their floors on {record['floors_of']} {entry['floor_us']:.1f} us" if "floor_us" in entry else ""
        print(f"{entry['model']} batch {entry['batch']}: its kernels take {entry['kernels_us']:.1f} us{floors}")
    wrong = [row for row in rows if row["status"] == "failed"]
    for row in wrong:
        print(f"{row['problem']}: {row['reason']}")
    print(f"{len(rows)} problems: {len(wrong) or 'none'} wrong or not to be run")
    return 1 if wrong else 0


def print_rows(rows: list[tuple[str, float, float, int]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("problem")
    for heading in ("heuristic us", "tuned us", "ratio", "measured"):
        table.add_column(heading, justify="right")
    for key, before, after, count in rows:
        table.add_row(key, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}", str(count))
    print_table(table)


if __name__ == "__main__":
    leave(main())
