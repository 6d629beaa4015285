"""The settings of a training, which flags and files name: no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resnet.errors import ResNetError

AUGMENTATIONS = ("crop", "flip", "cutout")
OPTIMIZERS = ("adam", "adamw", "sgd")
QUESTIONS = ("compare", "depths", "regularisers")  # that several trainings answer


class TrainingError(ResNetError):
    """A training that cannot begin or go on. One line: what was given, what was expected."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: passes over the training pictures.
        batch_size: pictures per step; the last, smaller batch of an epoch is left out.
        optimizer: `adam`; `adamw`, with weight decay decoupled from the gradient; `sgd` with momentum 0.9.
        learning_rate: the highest, after warm-up.
        warmup_epochs: in which the learning rate rises linearly; it then falls to 0 along a cosine.
        label_smoothing: share of the target spread evenly over all classes.
        l2: weight decay of convolutions and the classifier; not of biases and BatchNorm.
        l1: factor of the sum of the absolute values of the same weights, added to the loss.
        dropout: share of the classifier's inputs set to 0 in training.
        augment: some of `crop` (shifted by up to an eighth), `flip` (left to right),
            `cutout` (a square of half the side set to the mean).
        clip: largest norm of the gradient of all weights together; 0 does not clip.
        patience: epochs without a better validation accuracy after which training ends with the best weights; with 0
            it goes on to the end and keeps the last.
        seed: of weights, order, augmentation and dropout.
    """

    epochs: int = 60
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    warmup_epochs: int = 3
    label_smoothing: float = 0.1
    l2: float = 0.0
    l1: float = 0.0
    dropout: float = 0.0
    augment: tuple[str, ...] = ("crop",)
    clip: float = 5.0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment", tuple(self.augment))
        expected = {
            "epochs": ("at least 1", self.epochs >= 1),
            "batch_size": ("at least 2", self.batch_size >= 2),
            "optimizer": (f"one of {', '.join(OPTIMIZERS)}", self.optimizer in OPTIMIZERS),
            "learning_rate": ("above 0", 0 < self.learning_rate < math.inf),
            "warmup_epochs": ("from 0 to epochs", 0 <= self.warmup_epochs <= self.epochs),
            "label_smoothing": ("from 0 to below 1", 0 <= self.label_smoothing < 1),
            "l2": ("at least 0", 0 <= self.l2 < math.inf),
            "l1": ("at least 0", 0 <= self.l1 < math.inf),
            "dropout": ("from 0 to below 1", 0 <= self.dropout < 1),
            "augment": (f"some of {', '.join(AUGMENTATIONS)}", set(self.augment) <= {*AUGMENTATIONS}),
            "clip": ("at least 0", 0 <= self.clip < math.inf),
            "patience": ("at least 0", self.patience >= 0),
            "seed": ("at least 0", self.seed >= 0),
        }
        for name, (what, right) in expected.items():
            if not right:
                raise TrainingError(f"TrainingConfig.{name} must be {what}, got {getattr(self, name)!r}")
