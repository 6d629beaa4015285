"""What an experiment found: a table, sentences whose figures are computed, and a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from resnet.data.labelled import Splits
from resnet.data.preprocessing import Preprocessing
from resnet.models import create_model
from resnet.training import plots
from resnet.training.experiments import (
    Outcome,
    Trial,
    by_setting,
    compare_trials,
    cost,
    depth_trials,
    mean_and_deviation,
    recommend,
    regulariser_trials,
    standard_error,
)
from resnet.training.settings import QUESTIONS, TrainingConfig


@dataclass(frozen=True)
class Report:
    """Attributes:
    title: what was asked.
    headings, rows: the table.
    findings: one sentence each.
    picture: PNG.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    findings: tuple[str, ...]
    picture: bytes

    def markdown(self, picture: str, provenance: Sequence[str]) -> str:
        """The report as a page that shows the file `picture`; `provenance` says how it was made."""
        text = io.StringIO()
        print(f"# {self.title}\n", file=text)
        for finding in self.findings:
            print(f"* {finding}", file=text)
        print(f"\n![{self.title}]({picture})\n", file=text)
        print(f"| {' | '.join(self.headings)} |", file=text)
        print(f"|{'---|' * len(self.headings)}", file=text)
        for row in self.rows:
            print(f"| {' | '.join(row)} |", file=text)
        print(file=text)
        for line in provenance:
            print(f"{line}\n", file=text)
        return text.getvalue().rstrip() + "\n"


@dataclass(frozen=True)
class Experiment:
    """Attributes:
    trials: what to train, from the model and settings that were asked for.
    report: what was found.
    """

    trials: Callable[[str, TrainingConfig], list[Trial]]
    report: Callable[[Sequence[Outcome], Splits, Preprocessing], Report]


def compare_report(outcomes: Sequence[Outcome], splits: Splits, preprocessing: Preprocessing) -> Report:
    """Plain against residual networks."""
    rows, findings = [], []
    for outcome in outcomes:
        rows.append(
            (
                outcome.trial.label,
                f"{outcome.epochs[-1].train_loss:.3f}",
                _percent(outcome.validation_accuracy),
                _percent(outcome.test_accuracy),
                f"{_trunk(outcome.gradients_start)[0]:.1f}",
                f"{_spread(outcome.gradients_start):,.1f}",
                f"{_spread(outcome.gradients_end):,.1f}",
            )
        )
    by_name = {outcome.trial.model: outcome for outcome in outcomes}
    for depth in sorted({outcome.layers for outcome in outcomes}):
        plain, residual = by_name[f"plain{depth}"], by_name[f"resnet{depth}"]
        findings.append(
            f"{depth} layers, in the same budget: test top-1 {_percent(plain.test_accuracy)} % plain,"
            f" {_percent(residual.test_accuracy)} % residual; training loss {plain.epochs[-1].train_loss:.3f} and"
            f" {residual.epochs[-1].train_loss:.3f}."
        )
    for name in ("plain56", "resnet56"):
        gradients = by_name[name].gradients_start
        first, *_, last = _trunk(gradients)
        findings.append(
            f"Before the first step of {name} the norm of the gradient is {first:.3g} in the first convolution and"
            f" {last:.3g} in the last; the largest is {_spread(gradients):,.0f} times the smallest."
        )
    findings.append(
        "One learning rate has to suit all layers. Without BatchNorm the gradients of a deep plain network vanish"
        " towards its input; with it they grow instead, from layer to layer (Yang et al. 2019), and shortcuts damp"
        " that growth."
    )
    return Report(
        f"Plain against residual networks on {splits.train.name}",
        (
            "network",
            "training loss, last epoch",
            "validation top-1 %",
            "test top-1 %",
            "gradient of the first layer at the start",
            "largest / smallest gradient at the start",
            "at the end",
        ),
        tuple(rows),
        tuple(findings),
        plots.comparison(outcomes, f"plain (dashed) against residual, {splits.train.name}"),
    )


def depths_report(outcomes: Sequence[Outcome], splits: Splits, preprocessing: Preprocessing) -> Report:
    """Accuracy and cost by depth, and which to choose."""
    models = {
        outcome.trial.model: create_model(
            outcome.trial.model, num_classes=len(splits.train.classes), in_channels=preprocessing.channels
        )
        for outcome in outcomes
    }
    costs = {name: cost(model, preprocessing) for name, model in models.items()}
    fastest = costs[outcomes[0].trial.model].seconds
    rows = tuple(
        (
            outcome.trial.label,
            f"{costs[outcome.trial.model].parameters:,}",
            f"{costs[outcome.trial.model].macs / 1e6:.1f}",
            f"{costs[outcome.trial.model].seconds / fastest:.2f}",
            _percent(outcome.validation_accuracy),
            _percent(outcome.test_accuracy),
        )
        for outcome in outcomes
    )
    chosen, error = recommend(outcomes, len(splits.validation))
    best = max(outcomes, key=lambda outcome: outcome.validation_accuracy)
    finding = (
        f"Recommended: {chosen.trial.model}, the shallowest within one standard error ({100 * error:.2f} points, of"
        f" {len(splits.validation)} pictures) of the best validation accuracy,"
        f" {_percent(best.validation_accuracy)} % by {best.trial.model}. Its test accuracy is"
        f" {_percent(chosen.test_accuracy)} %."
    )
    chance = (
        f"One picture is {100 / len(splits.validation):.2f} points, and each depth was trained from one seed:"
        " with another, neighbours in the table may change places."
    )
    return Report(
        f"How deep a residual network for {splits.train.name}",
        ("network", "weights", "million multiply-adds", "time, batch 1, ratio", "validation top-1 %", "test top-1 %"),
        rows,
        (finding, chance),
        plots.depths(
            outcomes,
            [costs[outcome.trial.model].macs for outcome in outcomes],
            len(splits.validation),
            f"accuracy and cost by depth, {splits.train.name}",
        ),
    )


def regularisers_report(outcomes: Sequence[Outcome], splits: Splits, preprocessing: Preprocessing) -> Report:
    """What each regulariser does on its own, over seeds."""
    rows, means = [], {}
    for label, group in by_setting(outcomes).items():
        mean, deviation = mean_and_deviation([outcome.test_accuracy for outcome in group])
        means[label] = mean
        train_loss, _ = mean_and_deviation([outcome.epochs[-1].train_loss for outcome in group])
        validation_loss, _ = mean_and_deviation([outcome.epochs[-1].validation_loss for outcome in group])
        rows.append(
            (
                label,
                f"{_percent(mean)} ± {100 * deviation:.2f}",
                f"{train_loss:.4f}",
                f"{validation_loss:.4f}",
                ", ".join(_percent(outcome.test_accuracy) for outcome in group),
            )
        )
    error = standard_error(means["none"], len(splits.test))
    clear = [name for name, mean in means.items() if abs(mean - means["none"]) > 2 * error]
    findings = (
        f"Without any: {_percent(means['none'])} %. The highest mean: {max(means, key=lambda name: means[name])},"
        f" {_percent(max(means.values()))} %. All clip the gradient alike.",
        f"One standard error of an accuracy on {len(splits.test)} pictures is {100 * error:.2f} points;"
        f" more than two of them apart from none: {', '.join(clear) or 'no setting'}.",
    )
    return Report(
        f"Regularisers on and off, {outcomes[0].trial.model} on {splits.train.name}",
        ("regulariser", "test top-1 %, mean ± sd", "training loss", "validation loss", "each seed"),
        tuple(rows),
        findings,
        plots.regularisers(outcomes, f"{outcomes[0].trial.model} on {splits.train.name}"),
    )


_EXPERIMENTS = (
    Experiment(lambda model, config: compare_trials(config), compare_report),
    Experiment(lambda model, config: depth_trials(config), depths_report),
    Experiment(regulariser_trials, regularisers_report),
)
EXPERIMENTS: Mapping[str, Experiment] = dict(zip(QUESTIONS, _EXPERIMENTS, strict=True))


def _trunk(gradients: Mapping[str, float]) -> list[float]:
    """Of the convolutions on the way through the blocks."""
    return [norm for name, norm in gradients.items() if "downsample" not in name and name != "fc"]


def _spread(gradients: Mapping[str, float]) -> float:
    trunk = _trunk(gradients)
    return max(trunk) / min(trunk) if min(trunk) > 0 else float("inf")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
