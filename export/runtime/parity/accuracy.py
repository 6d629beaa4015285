"""Real accuracy: how many labelled pictures each form of a network gets right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Batch, named, run_in_batches
from export.base.errors import ExportError
from export.base.normalisation import Normalisation
from export.base.progress import Progress, sparsely
from export.runtime.runner import Runner

# Percent of the eager float32 model's top-1 that a form keeps: what MLPerf Inference demands of quantised networks.
RETAINED_PERCENT = 99


class Labelled(Protocol):
    """Inputs of a network with their classes."""

    @property
    def classes(self) -> Sequence[str]:
        """What each label means."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[tuple[NDArray, NDArray]]:
        """All inputs and labels [n] in order, n at most `size`; the same in every call.

        Inputs are [n, C, H, W] float32, of a bundle that takes bytes [n, H, W, C].
        """


@dataclass(frozen=True)
class Accuracy:
    """What one form of a network got right.

    Attributes:
        form: `eager`, `fused`, `triton`, `onnx`, or an engine's flavour.
        runtime: what executed it.
        precision: of its weights and activations.
        images: how many were shown.
        correct: how many of them got their class as the highest logit.
        seconds: what the network took for all of them, reading the pictures apart.
    """

    form: str
    runtime: str
    precision: str
    images: int
    correct: int
    seconds: float

    @property
    def top1(self) -> float:
        return self.correct / self.images

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "runtime": self.runtime,
            "precision": self.precision,
            "images": self.images,
            "correct": self.correct,
            "top1": self.top1,
            "seconds": round(self.seconds, 3),
        }


def class_count(shape: Sequence[int | str]) -> int:
    """How many classes logits of this shape tell apart.

    Raises:
        ExportError: not [N, classes].
    """
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        raise ExportError(f"expected a first output of shape [N, classes], got {list(shape)}")
    return shape[1]


def class_indices(data: Sequence[str], names: object, count: int) -> NDArray[np.int64]:
    """The logit of each class of a data set.

    Args:
        data: the names of its classes.
        names: what the network's logits mean, in order: its classes are found by name. None: not known; there must
            be as many classes as logits, and label i is logit i.
        count: how many logits there are.

    Raises:
        ExportError: a class that is not one of the network's, or names that do not fit the logits.
    """
    if names is None:
        if len(data) != count:
            raise ExportError(
                f"the data has {len(data)} classes: expected the model's {count}, since it does not name them"
            )
        return np.arange(len(data))
    known = class_names(names, count)
    for name in data:
        if known.count(name) != 1:
            found = "is none of" if name not in known else "stands for several of"
            raise ExportError(f"class {name!r} of the data {found} the model's: {', '.join(known[:5])}, ...")
    return np.array([known.index(name) for name in data], np.int64)


def class_names(names: object, count: int) -> list[str]:
    """Checked names of `count` classes.

    Raises:
        ExportError: not a list of so many names.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ExportError(f"expected the names of {count} classes, got {names!r:.80}")
    if len(names) != count:
        raise ExportError(f"expected the names of {count} classes, got {len(names)}")
    return list(names)


def count_correct(outputs: Mapping[str, NDArray], labels: NDArray, indices: NDArray) -> int:
    """How many rows of the first output are highest at the logit of their label; a row with NaN never is."""
    logits = next(iter(outputs.values()))
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ExportError(f"expected logits of shape [{len(labels)}, classes], got {list(logits.shape)}")
    right = (logits.argmax(axis=1) == indices[labels]) & ~np.isnan(logits).any(axis=1)
    return int(right.sum())


def measure(
    form: str,
    runtime: str,
    precision: str,
    infer: Callable[[NDArray], Arrays],
    labelled: Labelled,
    indices: NDArray,
    size: int,
    progress: Callable[[int], None] = lambda images: None,
) -> Accuracy:
    """Show a form all labelled inputs, `size` at a time.

    Args:
        form: see `Accuracy`, as are `runtime` and `precision`.
        infer: inputs of `labelled` -> outputs by name, the logits first.
        labelled: what to show it.
        indices: from `class_indices`.
        size: how many inputs are held at a time.
        progress: called with how many images are done.

    Raises:
        ExportError: no inputs, or not as many as there were said to be.
    """
    images = correct = 0
    seconds = 0.0
    for inputs, labels in labelled.batches(size):
        started = time.perf_counter()
        outputs = infer(inputs)
        seconds += time.perf_counter() - started
        correct += count_correct(outputs, labels, indices)
        images += len(labels)
        progress(images)
    if not images or images != len(labelled):
        raise ExportError(f"expected {len(labelled) or 'some'} labelled pictures, got {images}")
    return Accuracy(form=form, runtime=runtime, precision=precision, images=images, correct=correct, seconds=seconds)


def lost_accuracy(accuracy: Sequence[Accuracy]) -> str:
    """Which form keeps less than `RETAINED_PERCENT` of the first, the eager model, and how much; empty where none."""
    for form in accuracy[1:]:
        eager = accuracy[0]
        if 100 * form.correct * eager.images < RETAINED_PERCENT * eager.correct * form.images:
            return (
                f"{form.form} ({form.precision}) has {100 * form.top1:.2f} % top-1 where the eager model has "
                f"{100 * eager.top1:.2f} %: expected at least {RETAINED_PERCENT} % of that"
            )
    return ""


class Meter:
    """Forms measured on the same pictures.

    Attributes:
        measured: what was measured so far, the first of them what the others are held to.
    """

    def __init__(
        self,
        labelled: Labelled,
        classes: Sequence[str] | None,
        logits: Sequence[int | str],
        batch: Batch,
        progress: Progress,
        normalisation: Normalisation | None,
    ) -> None:
        """Nothing is measured yet.

        Args:
            labelled: the pictures.
            classes: what the logits stand for; None where nobody said.
            logits: the shape of the output.
            batch: the batch sizes that the forms accept.
            progress: called with what is being done.
            normalisation: as in `Interface.fed`, of forms that do not take what `labelled` gives.

        Raises:
            ExportError: the labels do not fit the output.
        """
        self._labelled, self._batch, self._progress, self._normalisation = labelled, batch, progress, normalisation
        self._indices: NDArray[np.int64] = class_indices(labelled.classes, classes, class_count(logits))
        self.measured: list[Accuracy] = []

    def measure(self, runner: Runner, precision: str) -> None:
        """Measure a form."""
        self.measured.append(self._run(runner, precision, self._progress))

    def retained(self, runner: Runner, precision: str) -> bool:
        """Whether a form that is only tried keeps the accuracy of the first that was measured."""
        return not lost_accuracy((self.measured[0], self._run(runner, precision, sparsely(self._progress))))

    def _run(self, runner: Runner, precision: str, progress: Progress) -> Accuracy:
        def infer(images: NDArray) -> Arrays:
            given = named(images, runner.interface.inputs)
            inputs = runner.interface.fed(given, self._normalisation)
            return run_in_batches(runner.infer, inputs, self._batch, self._batch.maximum)

        say = sparsely(progress)

        def report(images: int) -> None:
            say(f"measure accuracy: {runner.name}, {images} of {len(self._labelled)} images done")

        progress(f"measure accuracy: {runner.name}")
        with runner:
            size, labelled, indices = self._batch.maximum, self._labelled, self._indices
            return measure(runner.name, runner.runtime, precision, infer, labelled, indices, size, report)
