"""Train a model of the family, from its first step to a file with its weights; resumable to the bit."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnet.data.files import write_atomically
from resnet.data.labelled import LabelledImages, Splits
from resnet.data.preprocessing import Preprocessing
from resnet.errors import ResNetError
from resnet.model_card import ModelCard
from resnet.models import CifarResNet, ResNet, create_model
from resnet.training.recipe import augment, learning_rate, make_optimizer, training_step
from resnet.training.settings import TrainingConfig, TrainingError
from resnet.weights import save_weights

MODEL_FILE = "model.safetensors"
STATE_FILE = "resume.safetensors"
LOG_FILE = "log.csv"

_FILE_WORKERS = 4  # processes that decode pictures from files


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data came to. Losses are cross-entropies, accuracies lie between 0 and 1.

    Attributes:
        train_loss: mean over the pictures as augmented, with label smoothing.
        gradient_norm: mean over the steps, of all weights together, before clipping.
    """

    number: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    gradient_norm: float


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        model: in eval mode, with the weights of the epoch `kept`.
        epochs: all that ran.
        kept: the last epoch, where the schedule ends; with patience the best one on the validation pictures.
        test_accuracy: of these weights.
        seconds: what this run took, without what ran before it was resumed.
    """

    model: ResNet | CifarResNet
    epochs: tuple[Epoch, ...]
    kept: Epoch
    test_accuracy: float
    seconds: float


def train(
    name: str,
    splits: Splits,
    preprocessing: Preprocessing,
    config: TrainingConfig,
    folder: str | Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> TrainingResult:
    """Train a model and write it with its card, its log and what a later run needs to go on.

    After each epoch `folder` holds LOG_FILE and STATE_FILE, each replaced in one step; at the end also MODEL_FILE.
    On one machine's CPU, with the same versions and number of threads, a training that was interrupted at any moment
    and resumed ends with the same weights, to the bit, as one that was not.

    Args:
        name: a key of MODELS.
        splits: fitted on `train`, watched on `validation`; `test` is used once, at the end.
        preprocessing: what every picture goes through.
        config: how.
        folder: made if it is not there.
        device: `cpu`, or a CUDA device, where convolutions compute in bfloat16.
        resume: go on with what `folder` holds; without it a folder that holds a training is refused.
        on_step: called after each step with the epoch, the step and the number of steps in an epoch.
        on_epoch: called after each epoch.

    Raises:
        TrainingError: a folder that is in use, holds another training or nothing to resume; a loss that is not finite;
            a log that cannot be written.
        WeightsError: weights, or what a later run needs, cannot be written; what was there is there.
        DataError: a picture that cannot be read.
    """
    folder, started = Path(folder), time.perf_counter()
    facts = {
        "model": name,
        "data": splits.train.name,
        "classes": list(splits.train.classes),
        "pictures": [len(splits.train), len(splits.validation), len(splits.test)],
        "preprocessing": preprocessing.to_json(),
        "config": {**asdict(config), "augment": list(config.augment)},
    }
    if resume and not (folder / STATE_FILE).is_file():
        raise TrainingError(f"{folder / STATE_FILE}: no such file: there is nothing to resume")
    with _locked(folder):
        training = _Training(name, splits, preprocessing, config, device)
        if resume:
            state = _read_state(folder / STATE_FILE, facts)
            try:
                training.restore(state)
            except (RuntimeError, ValueError, KeyError) as error:  # of torch, which finds tensors of another model
                reason = str(error).partition("\n")[0]
                raise TrainingError(f"{folder / STATE_FILE}: expected the state of a training ({reason})") from error
        elif any((folder / name).exists() for name in (STATE_FILE, MODEL_FILE)):
            raise TrainingError(f"{folder} holds a training: go on with it by train(resume=True), or remove it first")
        while not training.finished:
            training.run_epoch(on_step)
            _write_log(folder / LOG_FILE, training.epochs)
            save_weights(folder / STATE_FILE, *training.state(facts))
            on_epoch(training.epochs[-1])
        training.model.load_state_dict(training.kept_weights)
        training.model.eval()
        _, accuracy = training.evaluate(splits.test)
        card = ModelCard(name, preprocessing, splits.train.classes, splits.train.name, accuracy, len(splits.test))
        save_weights(folder / MODEL_FILE, training.kept_weights, card.to_metadata())
    epochs, seconds = tuple(training.epochs), time.perf_counter() - started
    return TrainingResult(training.model, epochs, training.kept, accuracy, seconds)


class _Training:
    """A model and its optimizer between two epochs; everything a checkpoint holds."""

    def __init__(
        self, name: str, splits: Splits, preprocessing: Preprocessing, config: TrainingConfig, device: str
    ) -> None:
        self._splits, self._preprocessing, self._config, self._device = splits, preprocessing, config, device
        self.model = seeded_model(name, splits, preprocessing, config).to(device)
        self.optimizer = make_optimizer(self.model, config)
        self.epochs: list[Epoch] = []
        self.kept_weights: dict[str, Tensor] = {}

    @property
    def kept(self) -> Epoch:
        """Without patience the last epoch: the schedule ends there, and a choice among epochs on few validation
        pictures would be chance. With it the last of those with the highest validation accuracy."""
        if not self._config.patience:
            return self.epochs[-1]
        return max(self.epochs, key=lambda epoch: (epoch.validation_accuracy, epoch.number))

    @property
    def finished(self) -> bool:
        done, patience = len(self.epochs), self._config.patience
        if not patience or not done:
            return done >= self._config.epochs
        reached = next(e.number for e in self.epochs if e.validation_accuracy == self.kept.validation_accuracy)
        return done >= self._config.epochs or done - reached >= patience

    def run_epoch(self, on_step: Callable[[int, int, int], None]) -> None:
        number, config = len(self.epochs) + 1, self._config
        train = self._splits.train
        steps = max(1, len(train) // config.batch_size)
        losses, hits, norms, seen, rate = 0.0, 0, 0.0, 0, 0.0
        self.model.train()
        with _seeded(config.seed, number) as generator:
            order = torch.randperm(len(train), generator=generator)[: steps * config.batch_size]
            for step, (images, labels) in enumerate(self._batches(train, order.split(config.batch_size)), start=1):
                rate = learning_rate((number - 1) * steps + step, steps, config)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                images, labels = augment(images, config.augment, generator).to(self._device), labels.to(self._device)
                loss, logits, norm = training_step(self.model, self.optimizer, images, labels, config)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the loss became {loss} in epoch {number}, step {step}: expected a finite one;"
                        f" lower TrainingConfig.learning_rate (it was {rate:.2g})"
                    )
                losses += loss * len(labels)
                hits += int((logits.argmax(1) == labels).sum())
                norms += norm
                seen += len(labels)
                on_step(number, step, steps)
        validation_loss, validation_accuracy = self.evaluate(self._splits.validation)
        record = Epoch(number, rate, losses / seen, hits / seen, validation_loss, validation_accuracy, norms / steps)
        self.epochs.append(record)
        if self.kept is record:
            self.kept_weights = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}

    def evaluate(self, data: LabelledImages) -> tuple[float, float]:
        """Mean cross-entropy and accuracy of the model as it is, in eval mode."""
        self.model.eval()
        loss, hits = 0.0, 0
        with torch.no_grad():
            for images, labels in self._batches(data, torch.arange(len(data)).split(self._config.batch_size)):
                logits = self.model(images.to(self._device)).cpu()
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                hits += int((logits.argmax(1) == labels).sum())
        return loss / len(data), hits / len(data)

    def state(self, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Everything `restore` needs, as the tensors and the metadata of one file."""
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"kept.{key}": value for key, value in self.kept_weights.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        record = {**facts, "epochs": [asdict(epoch) for epoch in self.epochs]}
        return tensors, {"training": json.dumps(record)}

    def restore(self, state: tuple[dict[str, Tensor], list[Epoch]]) -> None:
        tensors, self.epochs = state
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _without_prefix(tensors, "optimizer.").items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        self.kept_weights = _without_prefix(tensors, "kept.")
        self.model.load_state_dict(self.kept_weights)  # which must fit as well
        self.model.load_state_dict(_without_prefix(tensors, "model."))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def _batches(self, data: LabelledImages, indices: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        workers = 0 if isinstance(data.pictures, np.ndarray) else min(_FILE_WORKERS, os.cpu_count() or 1)
        lists = [chunk.tolist() for chunk in indices]
        loader = DataLoader(_Inputs(data, self._preprocessing), sampler=lists, batch_size=None, num_workers=workers)
        for batch in loader:
            if isinstance(batch, ResNetError):
                raise batch
            yield batch


class _Inputs(Dataset):
    """Batches by their lists of indices. An unreadable picture is returned, not raised: a worker process would bury
    the message in a traceback."""

    def __init__(self, data: LabelledImages, preprocessing: Preprocessing) -> None:
        self._data, self._preprocessing = data, preprocessing

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | ResNetError:
        try:
            images = self._data.inputs(indices, self._preprocessing)
        except ResNetError as error:
            return error
        return torch.from_numpy(images), torch.from_numpy(self._data.labels[indices])


def seeded_model(
    name: str, splits: Splits, preprocessing: Preprocessing, config: TrainingConfig
) -> ResNet | CifarResNet:
    """The model as it is before the first step."""
    with _seeded(config.seed, 0):
        return create_model(
            name, num_classes=len(splits.train.classes), in_channels=preprocessing.channels, dropout=config.dropout
        )


@contextmanager
def _seeded(seed: int, epoch: int) -> Iterator[torch.Generator]:
    """A generator for one epoch, and PyTorch's own seeded alike; both depend on nothing that ran before."""
    value = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    with torch.random.fork_rng():
        torch.manual_seed(value)
        yield torch.Generator().manual_seed(value)


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _read_state(path: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Epoch]]:
    """The tensors and the epochs of a training with the same facts."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["training"])
            tensors = {key: file.get_tensor(key) for key in [*file.keys()]}  # no mapping: it only has keys()
        epochs = [Epoch(**epoch) for epoch in record.pop("epochs")]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: expected the state of a training ({error})") from error
    config, wanted = record.get("config") or {}, facts["config"]
    changed = [f"{key} {config.get(key)!r} -> {wanted[key]!r}" for key in wanted if config.get(key) != wanted[key]]
    changed += [key for key in facts if key != "config" and record.get(key) != facts[key]]
    if changed:
        raise TrainingError(f"{path} is of another training, expected the same settings: {', '.join(changed)}"[:400])
    return tensors, epochs


def _write_log(path: Path, epochs: list[Epoch]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *(field.name for field in fields(Epoch)[1:])])
    for epoch in epochs:
        number, *values = asdict(epoch).values()
        writer.writerow([number, *(f"{value:.6g}" for value in values)])
    try:
        write_atomically(path, text.getvalue().encode())
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the right to write `folder`, which is made; the kernel gives it back should this process die."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise TrainingError(f"{folder}: another training is writing there") from error
    try:
        for name in (MODEL_FILE, STATE_FILE, LOG_FILE):
            for stale in folder.glob(f".{name}.????????.partial"):  # of a run that was killed while it wrote
                stale.unlink()
        yield
    finally:
        os.close(descriptor)
