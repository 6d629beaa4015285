"""Pictures of trainings, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from resnet.training.experiments import Outcome, by_setting, mean_and_deviation, standard_error
from resnet.training.loop import Epoch

_DPI = 130


def require_matplotlib() -> None:
    """Known before hours of training, not after.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "matplotlib is not installed; install it with: pip install matplotlib", name="matplotlib"
        ) from error


def curves(epochs: Sequence[Epoch], title: str) -> bytes:
    """Loss and accuracy by epoch."""
    figure, (left, right) = _figure(1, 2, (9, 3.4), title)
    numbers = [epoch.number for epoch in epochs]
    left.plot(numbers, [epoch.train_loss for epoch in epochs], label="training, as augmented")
    left.plot(numbers, [epoch.validation_loss for epoch in epochs], label="validation")
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    right.plot(numbers, [100 * epoch.train_accuracy for epoch in epochs], label="training, as augmented")
    right.plot(numbers, [100 * epoch.validation_accuracy for epoch in epochs], label="validation")
    right.set(xlabel="epoch", ylabel="top-1 %")
    for axes in (left, right):
        axes.legend()
    return _png(figure)


def comparison(outcomes: Sequence[Outcome], title: str) -> bytes:
    """Plain against residual networks: loss and accuracy by epoch, gradients by layer."""
    figure, ((loss, accuracy), (start, end)) = _figure(2, 2, (11, 7.5), title)
    depths = sorted({outcome.layers for outcome in outcomes})
    for outcome in outcomes:
        plain = outcome.trial.model.startswith("plain")
        style = {
            "label": outcome.trial.label,
            "linestyle": "--" if plain else "-",
            "color": ("C0", "C1", "C3")[depths.index(outcome.layers)],
        }
        numbers = [epoch.number for epoch in outcome.epochs]
        loss.plot(numbers, [epoch.train_loss for epoch in outcome.epochs], **style)
        accuracy.plot(numbers, [100 * epoch.validation_accuracy for epoch in outcome.epochs], **style)
        for axes, norms in ((start, outcome.gradients_start), (end, outcome.gradients_end)):
            trunk = [norm for name, norm in norms.items() if "downsample" not in name]
            axes.plot(range(1, len(trunk) + 1), trunk, **style)
    loss.set(xlabel="epoch", ylabel="training cross-entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="validation top-1 %")
    start.set(xlabel="layer", ylabel="norm of the gradient", yscale="log", title="before the first step")
    end.set(xlabel="layer", ylabel="norm of the gradient", yscale="log", title="after training")
    loss.legend(fontsize="small")
    return _png(figure)


def depths(outcomes: Sequence[Outcome], macs: Sequence[int], pictures: int, title: str) -> bytes:
    """Accuracy by cost; bars are one standard error of the share of `pictures`."""
    figure, axes = _figure(1, 1, (6.5, 4), title)
    values = [outcome.validation_accuracy for outcome in outcomes]
    errors = [100 * standard_error(value, pictures) for value in values]
    axes.errorbar([count / 1e6 for count in macs], [100 * v for v in values], yerr=errors, marker="o", capsize=3)
    for outcome, count, value in zip(outcomes, macs, values, strict=True):
        axes.annotate(outcome.trial.label, (count / 1e6, 100 * value), textcoords="offset points", xytext=(4, -12))
    axes.set(xlabel="million multiply-adds per picture", ylabel="validation top-1 %", xmargin=0.12)
    return _png(figure)


def regularisers(outcomes: Sequence[Outcome], title: str) -> bytes:
    """Test accuracy with each regulariser: a dot per seed, a bar at their mean."""
    figure, axes = _figure(1, 1, (7.5, 4), title)
    groups = by_setting(outcomes)
    for place, group in enumerate(groups.values()):
        values = [100 * outcome.test_accuracy for outcome in group]
        axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
        axes.plot([mean_and_deviation(values)[0]], [place], "|", color="C3", markersize=18, markeredgewidth=2)
    axes.set(xlabel="test top-1 %", yticks=range(len(groups)), yticklabels=list(groups))
    axes.invert_yaxis()
    return _png(figure)


def _figure(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, columns)
    for one in axes.flat if rows * columns > 1 else [axes]:
        one.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
