"""What each step of a training does with its settings.

Sources: Kingma and Ba 2015 (Adam); Loshchilov and Hutter 2017, 2019 (cosine schedule; AdamW, whose weight decay is
decoupled from the gradient); Goyal et al. 2017 (warm-up); Szegedy et al. 2016 (label smoothing); Srivastava et al. 2014
(dropout); DeVries and Taylor 2017 (cutout); He et al. 2015 (shifted crops and flips).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet.training.settings import TrainingConfig

_MOMENTUM = 0.9


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, with weight decay on what has more than one dimension and on nothing else."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.l2},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=_MOMENTUM, nesterov=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, config.learning_rate)


def learning_rate(step: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """Of the step with this number, from 1: a linear rise over the warm-up, then half a cosine that ends near 0."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step <= warmup:
        return config.learning_rate * step / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, total - warmup)))


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, config: TrainingConfig
) -> tuple[float, Tensor, float]:
    """One update of the model; the loss without the L1 term, the logits, and the gradient's norm before clipping.

    loss = cross_entropy(model(images), labels, label_smoothing) + l1 * sum |w|

    Args:
        images: [N, C, H, W], on the model's device; there, on CUDA, convolutions compute in bfloat16.
        labels: [N], int64.
    """
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        logits = model(images)
    loss = F.cross_entropy(logits.float() if images.is_cuda else logits, labels, label_smoothing=config.label_smoothing)
    total = loss
    if config.l1:
        total = loss + config.l1 * sum(p.abs().sum() for p in model.parameters() if p.ndim > 1)
    total.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    optimizer.step()
    return float(loss.detach()), logits.detach(), float(norm)


def augment(images: Tensor, kinds: Collection[str], generator: torch.Generator) -> Tensor:
    """Each picture changed on its own, by chance from `generator`.

    Args:
        images: [N, C, H, W], normalised.
        kinds: some of AUGMENTATIONS, see TrainingConfig.
    """
    n, _, height, width = images.shape

    def randint(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n, 1, 1, 1), generator=generator)

    if "crop" in kinds:
        reach_h, reach_w = max(1, height // 8), max(1, width // 8)
        padded = F.pad(images, (reach_w, reach_w, reach_h, reach_h), mode="replicate")
        rows = randint(0, 2 * reach_h + 1) + torch.arange(height).view(1, 1, -1, 1)
        columns = randint(0, 2 * reach_w + 1) + torch.arange(width).view(1, 1, 1, -1)
        channels = torch.arange(images.shape[1]).view(1, -1, 1, 1)
        images = padded[torch.arange(n).view(-1, 1, 1, 1), channels, rows, columns]
    if "flip" in kinds:
        images = torch.where(randint(0, 2).bool(), images.flip(3), images)
    if "cutout" in kinds:
        rows = (torch.arange(height).view(1, 1, -1, 1) - randint(0, height)).abs() * 4 <= height
        columns = (torch.arange(width).view(1, 1, 1, -1) - randint(0, width)).abs() * 4 <= width
        images = images.masked_fill(rows & columns, 0.0)
    return images
