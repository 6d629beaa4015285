"""Training: each step against a re-statement, each regulariser, and interrupted runs against uninterrupted ones."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet.data.sources import open_splits, suggest_preprocessing
from resnet.model_card import read_model_card
from resnet.models import create_model
from resnet.training.loop import LOG_FILE, MODEL_FILE, STATE_FILE, seeded_model, train
from resnet.training.recipe import augment, learning_rate, make_optimizer, training_step
from resnet.training.settings import TrainingConfig, TrainingError
from resnet.weights import load_weights
from tests.resnet.checks import assert_equal_in_float64, bits, refusal
from tests.resnet.restatement import restated
from tests.resnet.training.conftest import Data

QUICK = TrainingConfig(epochs=3, batch_size=32, warmup_epochs=1, dropout=0.2, augment=("crop", "flip", "cutout"))


def test_one_step_equals_a_restatement_of_network_loss_and_adam_in_float64() -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", in_channels=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    images, labels = torch.randn(6, 2, 9, 11, dtype=torch.float64), torch.tensor([0, 3, 9, 3, 1, 7])
    config = TrainingConfig(label_smoothing=0.1, l1=1e-3, clip=0.5, learning_rate=1e-3)
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    logits = restated({**model.state_dict(), **p}, images, statistics={})
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    penalty = sum((v.abs().sum() for v in p.values() if v.ndim > 1), torch.zeros(()))
    gradients = dict(zip(p, torch.autograd.grad(loss + 1e-3 * penalty, list(p.values())), strict=True))
    length = torch.stack([(g**2).sum() for g in gradients.values()]).sum().sqrt()
    assert length > 0.5, "the gradient must be long enough to be clipped"
    expected = {"loss": loss.detach(), "logits": logits.detach(), "length": length}
    expected |= {f"gradient of {name}": g * 0.5 / (length + 1e-6) for name, g in gradients.items()}

    def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss, logits, norm = training_step(model, make_optimizer(model, config), images, labels, config)
        loss, norm = torch.tensor([loss, norm], dtype=torch.float64)
        steps = {f"step of {name}": p.detach() - before[name] for name, p in model.named_parameters()}
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        return {"loss": loss, "logits": logits, "length": norm, **gradients, **steps}

    single, found = step(copy.deepcopy(model).float(), images.float()), step(model, images)
    # Adam's first step: both moments are the gradient's own after correcting their bias.
    taken = {name: found[f"gradient of {name}"] for name in p}
    expected |= {f"step of {name}": -config.learning_rate * g / (g.abs() + 1e-8) for name, g in taken.items()}
    assert_equal_in_float64(found, expected, single)


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD")])
def test_l2_reaches_weights_and_neither_biases_nor_batchnorm(name: str, kind: str) -> None:
    model = create_model("resnet8")
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name, l2=0.1))
    decayed, spared = optimizer.param_groups
    assert type(optimizer).__name__ == kind and decayed.get("momentum", 0.9) == 0.9
    assert decayed["weight_decay"] == 0.1 and {p.ndim for p in decayed["params"]} == {2, 4}
    assert spared["weight_decay"] == 0.0 and {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len([*model.parameters()])


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    config = TrainingConfig(epochs=10, warmup_epochs=2, learning_rate=1.0)
    rates = [learning_rate(step, 5, config) for step in range(1, 51)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0 and rates[30] == pytest.approx(0.5) and 0 < rates[-1] < 0.002
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_crop_shifts_by_an_eighth_at_most_and_repeats_the_edge() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    shifted = augment(x, ["crop"], torch.Generator().manual_seed(0))
    padded = F.pad(x[:1], (1, 1, 1, 1), mode="replicate")
    windows = {tuple(padded[0, 0, r : r + 8, c : c + 8].flatten().tolist()) for r in range(3) for c in range(3)}
    assert {tuple(image.flatten().tolist()) for image in shifted} == windows


def test_flip_mirrors_about_half_of_the_pictures() -> None:
    x = torch.randn(200, 3, 4, 5)
    y = augment(x, ["flip"], torch.Generator().manual_seed(0))
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(y == x).flatten(1).all(1)) and 70 < int(mirrored.sum()) < 130


def test_cutout_sets_one_square_of_up_to_half_the_side_to_the_mean() -> None:
    y = augment(torch.ones(200, 3, 16, 16), ["cutout"], torch.Generator().manual_seed(0))
    for image in y:
        holes = image[0] == 0
        rows, columns = holes.any(1).sum(), holes.any(0).sum()
        assert torch.equal(image[0], image[2]) and holes.sum() == rows * columns
        assert 4 <= rows <= 9 and 4 <= columns <= 9


def test_it_learns_and_the_file_holds_what_it_learned(tmp_path: Path) -> None:
    splits = open_splits("digits")
    preprocessing = suggest_preprocessing(splits.train, (8, 8))
    result = train("resnet8", splits, preprocessing, TrainingConfig(epochs=6, warmup_epochs=1), tmp_path)
    assert result.test_accuracy > 0.85  # far from the edge: it reaches 0.94 and more from any seed tried
    assert result.kept is result.epochs[-1]
    model = create_model("resnet8", in_channels=1).eval()
    load_weights(model, tmp_path / MODEL_FILE)
    images = torch.from_numpy(splits.test.inputs(range(len(splits.test)), preprocessing))
    with torch.no_grad():  # in the batches that training counts in: the same numbers, whatever the machine
        found = torch.cat([model(batch).argmax(1) for batch in images.split(TrainingConfig().batch_size)]).numpy()
    card = read_model_card(tmp_path / MODEL_FILE)
    assert card is not None and card.accuracy == result.test_accuracy == (found == splits.test.labels).mean()
    assert (card.model, card.data, card.classes) == ("resnet8", "digits", tuple("0123456789"))
    rows = [*csv.DictReader((tmp_path / LOG_FILE).open())]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


# the epoch and the step after which it stops: in the first, as a later one begins, at the very end
@pytest.mark.parametrize("where", [(1, 2), (2, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_interrupted_training_resumes_to_the_same_bits(
    digits: Data, tmp_path: Path, optimizer: str, where: tuple[int, int]
) -> None:
    config = replace(QUICK, optimizer=optimizer, l2=1e-3)
    train("resnet8", *digits, config, tmp_path / "whole")

    def stop(epoch: int, step: int, steps: int) -> None:
        if (epoch, step) == where:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train("resnet8", *digits, config, tmp_path / "cut", on_step=stop)
    assert not (tmp_path / "cut" / MODEL_FILE).exists()
    torch.rand(7)  # the process that resumes has another history
    begun = (tmp_path / "cut" / STATE_FILE).exists()
    assert begun == (where[0] > 1)
    train("resnet8", *digits, config, tmp_path / "cut", resume=begun)
    for name in (MODEL_FILE, STATE_FILE, LOG_FILE):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_seeds_differ(digits: Data) -> None:
    first, second = (bits(seeded_model("resnet8", *digits, replace(QUICK, seed=seed))) for seed in (0, 1))
    assert first["conv1.weight"] != second["conv1.weight"]


@pytest.mark.parametrize("pictures", [64, 1], ids=["fewer-right", "always-as-many-right"])
def test_patience_ends_it_early_with_the_last_of_the_best(digits: Data, tmp_path: Path, pictures: int) -> None:
    splits, preprocessing = digits
    few = replace(splits, validation=splits.validation.subset(np.arange(pictures)))
    config = replace(QUICK, epochs=20, patience=2, learning_rate=1e-12)
    result = train("resnet8", few, preprocessing, config, tmp_path)
    accuracies = [epoch.validation_accuracy for epoch in result.epochs]
    best = [epoch.number for epoch in result.epochs if epoch.validation_accuracy == max(accuracies)]
    assert len(accuracies) == best[0] + 2 and result.kept.number == best[-1]


def test_a_loss_that_is_not_finite_ends_it_in_one_line(digits: Data, tmp_path: Path) -> None:
    config = replace(QUICK, learning_rate=1e30, warmup_epochs=0, clip=0.0)
    message = refusal(TrainingError, train, "resnet8", *digits, config, tmp_path)
    assert re.match(r"the loss became \S+ in epoch 1, step \d+: expected a finite one.*rate", message)


def test_a_folder_with_a_training_is_not_overwritten(digits: Data, tmp_path: Path) -> None:
    train("resnet8", *digits, replace(QUICK, epochs=1), tmp_path)
    before = (tmp_path / MODEL_FILE).read_bytes()
    with pytest.raises(TrainingError, match="holds a training: go on with it by train"):
        train("resnet8", *digits, replace(QUICK, epochs=1, seed=1), tmp_path)
    with pytest.raises(TrainingError, match=r"another training.*seed 0 -> 1"):
        train("resnet8", *digits, replace(QUICK, epochs=1, seed=1), tmp_path, resume=True)
    assert (tmp_path / MODEL_FILE).read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", b"\x02\0\0\0\0\0\0\0{}"], ids=repr)
def test_what_is_no_state_of_a_training_is_not_resumed(digits: Data, tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "new"
    if content is not None:
        folder.mkdir()
        (folder / STATE_FILE).write_bytes(content)
    expected = "nothing to resume" if content is None else "expected the state of a training"
    with pytest.raises(TrainingError, match=expected):
        train("resnet8", *digits, QUICK, folder, resume=True)
    assert folder.exists() == (content is not None)


OUT_OF_RANGE = [
    *[("epochs", 0), ("batch_size", 1), ("optimizer", "lion"), ("learning_rate", 0.0), ("learning_rate", math.nan)],
    *[("warmup_epochs", 61), ("label_smoothing", 1.0), ("l2", -1.0), ("l1", math.inf), ("dropout", 1.0)],
    *[("augment", ("mixup",)), ("clip", -1.0), ("patience", -1), ("seed", -1)],
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=[f"{name}-{value}" for name, value in OUT_OF_RANGE])
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=rf"^TrainingConfig\.{name} must be .*, got "):
        TrainingConfig(**{name: value})
