"""Find the fastest launch configuration of every kernel of a model on this machine's GPU, and write the tuned table."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.terminal.command_line import Parser, importing, run_script
from export.terminal.commands import typed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("tune", __doc__)
    parser.add_argument("--model", nargs="+", default=["resnet50"], metavar="NAME", help="default resnet50")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128], metavar="N", help="default 1 8 32 128")
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16", help="default fp16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("tune"):
    import torch
    from rich import box
    from rich.table import Table

    from export import Batch, ExportError, fuse
    from export.base.machine import describe_machine
    from export.base.precision import PRECISIONS
    from export.benchmark.workload import fused_workload
    from export.terminal.console import Progress, print_table
    from kernels.configs.config import Config
    from kernels.configs.heuristic import heuristic_config
    from kernels.configs.selection import tuned_table, write_table
    from kernels.configs.tuning import tune
    from kernels.operators.registry import Arguments
    from kernels.oracle import make_inputs, oracle, p1_failures
    from kernels.problems import Problem
    from resnet.errors import ResNetError
    from resnet.models import MODELS, create_model


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("tune", args, tune_and_show, refusals=(ResNetError,))


def tune_and_show(args: argparse.Namespace) -> int:
    """Tune and show what was won; the exit code."""
    if not torch.cuda.is_available():
        raise ExportError("no NVIDIA GPU here: expected to run on the GPU to tune for")
    with Progress() as progress:
        rows, path = tune_models(args, progress)
    print_rows(rows)
    print(f"{path} written; next: {typed('benchmark')} --device cuda --model {args.model[0]}")
    return 0


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """Every distinct problem of the models at the batch sizes, the two halves of each bottleneck included."""
    found: list[Problem] = []
    for name in args.model:
        size = MODELS[name].image_size if name in MODELS else 224
        batch = Batch(1, 1, max(args.batch))
        program = fuse(create_model(name).eval(), torch.zeros(1, 3, size, size), batch)
        for n in args.batch:
            works = fused_workload(program, PRECISIONS[args.precision], n)
            found += [work.problem for work in works if work.problem is not None]
    return list(dict.fromkeys(found))


def tune_models(args: argparse.Namespace, progress: Progress) -> tuple[list[tuple[str, float, float, int]], Path]:
    """(problem, heuristic's us, tuned us, configurations measured) of each, and the table's path."""
    from kernels.launch import target_of

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        target = target_of(device)
    except ValueError as error:  # an older GPU
        raise ExportError(str(error)) from error
    progress("capture and fuse")
    problems = problems_of(args)
    try:
        configs: dict[str, Config] = dict(tuned_table(target.name))
        start_from = {problem: heuristic_config(problem, target) for problem in problems}
    except ValueError as error:  # a batch that no kernel can number, or a tuned table that is damaged
        raise ExportError(str(error)) from error
    facts = describe_machine(torch.cuda.get_device_name(device))
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
        path = write_table(target.name, header, configs)  # after each: an interrupted run keeps what it found
    return rows, path


class Measurement:
    """Seconds of one launch of a problem under a configuration; None where it does not run or fails P1.

    P1 is checked on at most two images, for which float64 on the CPU is quick: the number of images is a run-time
    argument of the same machine code.
    """

    def __init__(self) -> None:
        self._checks: dict[Problem, tuple[Any, Any]] = {}
        self._inputs: dict[Problem, Any] = {}
        self._seconds: dict[tuple[Problem, Config], float | None] = {}

    def __call__(self, problem: Problem, config: Config) -> float | None:
        key = (problem, config)
        if key not in self._seconds:
            self._seconds[key] = self._measure(problem, config)
        return self._seconds[key]

    def _measure(self, problem: Problem, config: Config) -> float | None:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
        from triton.testing import do_bench_cudagraph

        try:
            if not self._is_right(problem.with_batch(min(problem.batch, 2)), config):
                return None
        except (CompilationError, OutOfResources, PTXASError):
            return None
        inputs = self._inputs.setdefault(problem, make_inputs(problem, "cuda"))
        run = launcher(inputs, config)
        # In a graph: a launch from Python takes longer than the smallest of these kernels.
        return float(do_bench_cudagraph(run, rep=20, return_mode="median")) / 1e3

    def _is_right(self, problem: Problem, config: Config) -> bool:
        if problem not in self._checks:
            inputs = make_inputs(problem, "cuda")
            self._checks[problem] = inputs, oracle(problem, inputs)
        inputs, expected = self._checks[problem]
        return not p1_failures(launcher(inputs, config)(), problem, inputs, expected)


def launcher(inputs: Arguments[torch.Tensor], config: Config) -> Callable[[], torch.Tensor]:
    """One launch of the problem's operator, with a workspace of its own."""
    from kernels import launch

    workspace = launch.Workspace("cuda")

    def run() -> torch.Tensor:
        return launch.run(inputs.operator, *inputs.values(), config=config, workspace=workspace)

    return run


def print_rows(rows: list[tuple[str, float, float, int]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("problem")
    for heading in ("heuristic us", "tuned us", "ratio", "measured"):
        table.add_column(heading, justify="right")
    for key, before, after, count in rows:
        table.add_row(key, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}", str(count))
    print_table(table)


if __name__ == "__main__":
    sys.exit(main())
