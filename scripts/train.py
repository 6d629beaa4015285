"""Train a model of the family, or answer one of the questions of residual learning: compare, depths, regularisers.

Without the name of an experiment it trains --model once. An experiment trains several and writes its results as a
table, a picture and JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

if not __package__:  # a file that is run, not a module of the installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where `export` would be a script

from export.base.errors import ExportError
from export.terminal.command_line import Parser, importing, leave, run_script, show_log
from export.terminal.commands import typed
from resnet.training.settings import AUGMENTATIONS, OPTIMIZERS, QUESTIONS, TrainingConfig

WORK = Path("build/train")
CURVES_FILE = "curves.png"
DEFAULTS = TrainingConfig()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("train", __doc__)
    parser.add_argument("experiment", nargs="?", metavar="|".join(QUESTIONS), help="default: train --model once")
    parser.add_argument("--model", metavar="NAME", help="default resnet20; compare and depths have their own")
    parser.add_argument(
        "--data", default="digits", metavar="digits|PATH", help="CIFAR's archive or a folder of class folders"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="default: the model's; for small pictures twice theirs"
    )
    parser.add_argument("--epochs", type=int, default=DEFAULTS.epochs, metavar="N", help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size, metavar="N", help="default %(default)s")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=DEFAULTS.optimizer, help="default %(default)s")
    for name, what in (
        ("learning-rate", "the highest, after warm-up"),
        ("label-smoothing", "share of the target spread over all classes"),
        ("l2", "weight decay; decoupled from the gradient with --optimizer adamw"),
        ("l1", "factor of the sum of absolute weights"),
        ("dropout", "before the classifier"),
        ("clip", "largest norm of the gradient; 0: none"),
    ):
        default = getattr(DEFAULTS, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=f"{what}; default {default}")
    parser.add_argument(
        "--warmup-epochs", type=int, default=DEFAULTS.warmup_epochs, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--augment",
        nargs="*",
        metavar="KIND",
        help=f"of {', '.join(AUGMENTATIONS)}; default crop, and flip where pictures are known to allow it: CIFAR's",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=DEFAULTS.patience,
        metavar="N",
        help="stop N epochs after the best and keep that one",
    )
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed, metavar="N", help="default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default {WORK}/<model or experiment>-<data>")
    parser.add_argument("--resume", action="store_true", help="go on with what was interrupted")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.experiment not in (None, *QUESTIONS):
        parser.error(f"unknown experiment {args.experiment!r}, expected one of {', '.join(QUESTIONS)}")
    if args.model and args.experiment in ("compare", "depths"):
        parser.error(f"--model {args.model}: {args.experiment} trains models of its own")
    args.model = args.model or "resnet20"
    args.command = shlex.join(sys.argv[1:] if argv is None else argv)
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

with importing("train"):
    import torch
    from rich import box
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table

    from export.base.machine import describe_machine, machine_line
    from export.terminal.console import print_table, stderr_console
    from resnet.data.files import write_atomically
    from resnet.data.labelled import Splits
    from resnet.data.preprocessing import Preprocessing
    from resnet.data.sources import open_splits, suggest_preprocessing, suggest_size
    from resnet.errors import ResNetError
    from resnet.models import MODELS, create_model
    from resnet.training import plots
    from resnet.training.experiments import run_trial
    from resnet.training.loop import LOG_FILE, MODEL_FILE, Epoch, train
    from resnet.training.reports import EXPERIMENTS


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    show_log()
    interrupted = "interrupted; the same command with --resume goes on after the last whole epoch"
    return run_script("train", args, train_or_answer, (ResNetError,), interrupted)


def train_or_answer(args: argparse.Namespace) -> int:
    """Train --model once, or run the experiment that was named; the exit code."""
    plots.require_matplotlib()
    job = prepare(args)
    with Display() as display:
        record = run_experiment(args, job, display) if args.experiment else train_once(args, job, display)
    if args.json:
        print(json.dumps(record))
    return 0


@dataclass(frozen=True)
class Job:
    """What the arguments describe."""

    splits: Splits
    preprocessing: Preprocessing
    config: TrainingConfig
    device: str
    output: Path


def prepare(args: argparse.Namespace) -> Job:
    """Everything is checked before anything is written."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ExportError("--device cuda: expected an NVIDIA GPU, PyTorch finds none")
    settings = {field.name: getattr(args, field.name) for field in fields(TrainingConfig)}
    settings["augment"] = args.augment or ()
    config = TrainingConfig(**settings)
    create_model(args.model)  # an unknown name is known before the data is read
    splits = open_splits(args.data)
    if args.augment is None:
        config = replace(config, augment=("crop", "flip") if splits.train.mirrored else ("crop",))
    designed = MODELS[args.model].image_size
    size = suggest_size(splits.train, designed) if args.image_size is None else args.image_size
    if size < 8:
        raise ExportError(f"--image-size: expected at least 8 pixels, got {size}")
    return Job(
        splits,
        suggest_preprocessing(splits.train, (size, size)),
        config,
        args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        args.output or WORK / f"{args.experiment or args.model}-{splits.train.name}",
    )


class Display:
    """Epochs as lines on stderr; on a terminal also a bar over all steps of a training."""

    def __init__(self) -> None:
        console = stderr_console()
        columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
        )
        self._console, self._task = console, self._bar.add_task("", total=None)
        self._label, self._epochs = "", 0

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:  # elsewhere rich before 15 ends with an empty line, also where it is disabled
            self._bar.stop()

    def begin(self, label: str, epochs: int) -> None:
        self._label, self._epochs = label, epochs
        self._bar.reset(self._task, description=label, total=None)

    def step(self, epoch: int, step: int, steps: int) -> None:
        self._bar.update(self._task, completed=(epoch - 1) * steps + step, total=self._epochs * steps)

    def epoch(self, epoch: Epoch) -> None:
        lines = [
            f"{epoch.number:>5}/{self._epochs} {epoch.train_loss:8.4f} {epoch.train_accuracy:8.2%}"
            f" {epoch.validation_loss:9.4f} {epoch.validation_accuracy:9.2%}"
        ]
        if self._label:
            lines = [self._label, f"{'epoch':>8} {'loss':>8} {'top-1':>8} {'val loss':>9} {'val top-1':>9}", *lines]
            self._label = ""
        self._console.print("\n".join(lines), markup=False)


def train_once(args: argparse.Namespace, job: Job, display: Display) -> dict[str, Any]:
    """Train --model and say how well it does; the result as JSON has it."""
    splits, output = job.splits, job.output
    display.begin(args.model, job.config.epochs)
    result = train(
        args.model, splits, job.preprocessing, job.config, output, device=job.device, resume=args.resume,
        on_step=display.step, on_epoch=display.epoch,
    )  # fmt: skip
    title = f"{args.model} on {splits.train.name}: test top-1 {result.test_accuracy:.2%}"
    write_atomically(output / CURVES_FILE, plots.curves(result.epochs, title))
    weights = output / MODEL_FILE
    if not args.json:
        print(
            f"test top-1 {result.test_accuracy:.2%} ({len(splits.test)} pictures), validation"
            f" {result.kept.validation_accuracy:.2%} ({len(splits.validation)}), epoch {result.kept.number} of"
            f" {len(result.epochs)}, {result.seconds:.0f} s"
        )
        print(f"{output} holds {MODEL_FILE}, {LOG_FILE}, {CURVES_FILE}")
        print(f"next: {typed('export')} {shlex.join(['--weights', str(weights), '--data', args.data])}")
    return {
        "model": args.model,
        "data": splits.train.name,
        "test_accuracy": result.test_accuracy,
        "test_pictures": len(splits.test),
        "validation_accuracy": result.kept.validation_accuracy,
        "epoch": result.kept.number,
        "epochs": len(result.epochs),
        "seconds": round(result.seconds, 1),
        "weights": str(weights),
    }


def run_experiment(args: argparse.Namespace, job: Job, display: Display) -> dict[str, Any]:
    """Train everything an experiment asks for, then write its report; the result as JSON has it."""
    splits, output = job.splits, job.output
    experiment, name = EXPERIMENTS[args.experiment], f"{args.experiment}-{splits.train.name}"
    outcomes = []
    trials = experiment.trials(args.model, job.config)
    for number, trial in enumerate(trials, start=1):
        display.begin(f"{trial.label} ({number} of {len(trials)})", trial.config.epochs)
        folder = WORK / name / re.sub(r"[^a-z0-9]+", "-", trial.label.lower())
        outcome = run_trial(
            trial, splits, job.preprocessing, folder, device=job.device, resume=args.resume,
            on_step=display.step, on_epoch=display.epoch,
        )  # fmt: skip
        outcomes.append(outcome)
    report = experiment.report(outcomes, splits, job.preprocessing)
    provenance = (f"`{typed('train')} {args.command.removesuffix(' --resume')}`", conditions(job.device))
    record = {
        "title": report.title,
        "findings": report.findings,
        "provenance": provenance,
        "preprocessing": job.preprocessing.to_json(),
        "pictures": {part: len(getattr(splits, part)) for part in ("train", "validation", "test")},
        "outcomes": [outcome.to_json() for outcome in outcomes],
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / f"{name}.json", (json.dumps(record) + "\n").encode())
    write_atomically(output / f"{name}.png", report.picture)
    write_atomically(output / f"{name}.md", report.markdown(f"{name}.png", provenance).encode())
    if not args.json:
        table = Table(*report.headings, header_style="bold", box=box.SIMPLE_HEAD)
        for row in report.rows:
            table.add_row(*row)
        print_table(table)
        for finding in report.findings:
            print(finding)
        print(f"{output} holds {name}.md, {name}.png, {name}.json")
    return record


def conditions(device: str) -> str:
    """Where and with what the figures were made."""
    facts = describe_machine(torch.cuda.get_device_name() if device == "cuda" else None)
    return f"{machine_line(facts)}; Python {facts['python']}, threads: {torch.get_num_threads()}"


if __name__ == "__main__":
    leave(main())
