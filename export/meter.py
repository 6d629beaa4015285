"""Measure how many of some labelled pictures each form of a network gets right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Batch, run_in_batches
from export.base.progress import Progress, sparsely
from export.runtime.parity.accuracy import Accuracy, Labelled, class_count, class_indices, lost_accuracy, measure
from export.runtime.runner import Runner


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
    ) -> None:
        """Nothing is measured yet.

        Args:
            labelled: the pictures.
            classes: what the logits stand for; None where nobody said.
            logits: the shape of the output.
            batch: the batch sizes that the forms accept.
            progress: called with what is being done.

        Raises:
            ExportError: the labels do not fit the output.
        """
        self._labelled, self._batch, self._progress = labelled, batch, progress
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
            return run_in_batches(runner.infer, images, self._batch, self._batch.maximum)

        say = sparsely(progress)

        def report(images: int) -> None:
            say(f"measure accuracy: {runner.name}, {images} of {len(self._labelled)} images done")

        progress(f"measure accuracy: {runner.name}")
        with runner:
            sizes = (self._batch.maximum, report)
            return measure(runner.name, runner.runtime, precision, infer, self._labelled, self._indices, *sizes)
