"""The questions of the texts behind this family, as trainings side by side.

Plain against residual networks (He et al. 2015): what depth does to each, and the gradients that show why. Which depth
is enough. What each regulariser does on its own.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from resnet.data.labelled import Splits
from resnet.data.preprocessing import Preprocessing
from resnet.training.loop import STATE_FILE, Epoch, seeded_model, train
from resnet.training.settings import TrainingConfig

COMPARED_DEPTHS = (20, 32, 56)
DEPTHS = (8, 14, 20, 32, 44, 56)
REGULARISER_SEEDS = 3
_GRADIENT_PICTURES = 256


@dataclass(frozen=True)
class Trial:
    """One training of an experiment; `label` names it in tables and pictures, and its folder."""

    label: str
    model: str
    config: TrainingConfig


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        epochs: each pass over the data.
        validation_accuracy, test_accuracy: of the weights that were kept, between 0 and 1.
        gradients_start, gradients_end: see `gradient_norms`; before the first step and with those weights.
    """

    trial: Trial
    epochs: tuple[Epoch, ...]
    validation_accuracy: float
    test_accuracy: float
    gradients_start: Mapping[str, float]
    gradients_end: Mapping[str, float]

    @property
    def layers(self) -> int:
        """Weighted layers on the longest way through the model."""
        return int(re.sub(r"\D", "", self.trial.model))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_trials(config: TrainingConfig) -> list[Trial]:
    """Plain and residual networks of equal depth, in the same budget."""
    names = [f"{family}{depth}" for depth in COMPARED_DEPTHS for family in ("plain", "resnet")]
    return [Trial(name, name, config) for name in names]


def depth_trials(config: TrainingConfig) -> list[Trial]:
    """Residual networks from shallow to deep."""
    return [Trial(f"resnet{depth}", f"resnet{depth}", config) for depth in DEPTHS]


def regulariser_trials(model: str, config: TrainingConfig) -> list[Trial]:
    """None, each on its own, and those `config` itself has; each from several seeds."""
    off = replace(config, optimizer="adam", label_smoothing=0.0, l1=0.0, l2=0.0, dropout=0.0, augment=())
    settings = {
        "none": off,
        "L1": replace(off, l1=1e-5),
        "L2 in the gradient": replace(off, l2=1e-4),
        "L2 decoupled": replace(off, optimizer="adamw", l2=5e-2),
        "dropout": replace(off, dropout=0.3),
        "label smoothing": replace(off, label_smoothing=0.1),
        "crop": replace(off, augment=("crop",)),
        "cutout": replace(off, augment=("cutout",)),
        "default": config,
    }
    return [
        Trial(f"{label}, seed {seed}", model, replace(setting, seed=config.seed + seed))
        for label, setting in settings.items()
        for seed in range(REGULARISER_SEEDS)
    ]


def run_trial(
    trial: Trial,
    splits: Splits,
    preprocessing: Preprocessing,
    folder: Path,
    *,
    device: str,
    resume: bool,
    on_step: Callable[[int, int, int], None],
    on_epoch: Callable[[Epoch], None],
) -> Outcome:
    """One training in `folder`; with `resume`, on from where an earlier run of the experiment stopped.

    Raises:
        TrainingError, DataError: as `train` does.
    """
    count = min(_GRADIENT_PICTURES, len(splits.train))
    images = torch.from_numpy(splits.train.inputs(range(count), preprocessing)).to(device)
    labels = torch.from_numpy(splits.train.labels[:count]).to(device)
    fresh = seeded_model(trial.model, splits, preprocessing, trial.config)
    start = gradient_norms(fresh.to(device), images, labels)
    result = train(
        trial.model, splits, preprocessing, trial.config, folder, device=device,
        resume=resume and (folder / STATE_FILE).exists(), on_step=on_step, on_epoch=on_epoch,
    )  # fmt: skip
    end = gradient_norms(result.model, images, labels)
    return Outcome(trial, result.epochs, result.kept.validation_accuracy, result.test_accuracy, start, end)


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """L2 norm of the gradient of the cross-entropy by each convolution's and the classifier's weight, input first.

    BatchNorm uses the statistics of these images, as in training, and nothing is dropped. The model stays as it is.

    Args:
        images: [N, C, H, W], on the model's device.
        labels: [N].
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    weights = {
        name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(weights.values()))
    return {name: float(gradient.norm()) for name, gradient in zip(weights, gradients, strict=True)}


@dataclass(frozen=True)
class Cost:
    """What one picture costs: multiplications, weights, and time as a ratio within one run on this machine."""

    parameters: int
    macs: int
    seconds: float


def cost(model: nn.Module, preprocessing: Preprocessing) -> Cost:
    """Of the model in eval mode, at batch 1, on the CPU; seconds is the median of about a second of runs."""
    model.eval()
    image = torch.zeros(1, preprocessing.channels, *preprocessing.size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    with torch.no_grad():
        seconds = Timer("model(image)", globals={"model": model, "image": image}).blocked_autorange(min_run_time=1.0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, seconds.median)


def standard_error(share: float, pictures: int) -> float:
    """Of a share of so many pictures; with two hits and two misses added, so that it is not 0 where all were hits.

    Source: Agresti and Coull 1998.
    """
    count = pictures + 4
    moved = (share * pictures + 2) / count
    return (moved * (1 - moved) / count) ** 0.5


def recommend(outcomes: Sequence[Outcome], validation_pictures: int) -> tuple[Outcome, float]:
    """The first outcome, shallowest first, that is within one standard error of the best; with that error.

    On the validation pictures, so that the test accuracy of what is chosen is not chosen with it. Source: Breiman et
    al. 1984, the rule of one standard error.
    """
    best = max(outcome.validation_accuracy for outcome in outcomes)
    error = standard_error(best, validation_pictures)
    return next(outcome for outcome in outcomes if outcome.validation_accuracy >= best - error), error


def by_setting(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes that differ by their seed alone, together."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.label.rpartition(", seed ")[0], []).append(outcome)
    return groups


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
