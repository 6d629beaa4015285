"""Accuracy on arrays made by hand: what is counted, how classes are matched, and which loss fails an export."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from export import ExportError
from export.base.batch import Arrays
from export.runtime.parity.accuracy import Accuracy, class_count, class_indices, count_correct, lost_accuracy, measure
from export.runtime.parity.network import NetworkCheck
from export.runtime.parity.rungs import Evidence, ParityReport, Rung
from export.terminal.console import print_accuracy


class Rows:
    """Inputs that are their own logits: row i is highest at its label, except for every fourth."""

    def __init__(self, count: int, said: int | None = None) -> None:
        self.classes = ("a", "b", "c")
        self.labels = np.arange(count) % 3
        self.said = count if said is None else said
        self.sizes: list[int] = []

    def __len__(self) -> int:
        return self.said

    def batches(self, size: int) -> Iterator[tuple[NDArray, NDArray]]:
        for start in range(0, len(self.labels), size):
            labels = self.labels[start : start + size]
            shown = np.where(np.arange(start, start + len(labels)) % 4 == 0, (labels + 1) % 3, labels)
            self.sizes.append(len(labels))
            yield np.eye(3, dtype=np.float32)[shown], labels


def identity(inputs: NDArray) -> Arrays:
    return {"logits": inputs, "other": np.zeros((len(inputs), 9))}


def test_batches_are_streamed_and_the_last_is_smaller() -> None:
    rows, done = Rows(10), list[int]()
    found = measure("onnx", "numpy", "fp32", identity, rows, np.arange(3), 4, done.append)
    assert (found.images, found.correct, found.top1) == (10, 7, 0.7)  # 0, 4 and 8 are wrong
    assert rows.sizes == [4, 4, 2] and done == [4, 8, 10] and found.seconds > 0
    for size in (1, 3, 10, 64):
        assert measure("onnx", "numpy", "fp32", identity, Rows(10), np.arange(3), size).correct == 7


def test_labels_are_found_by_the_names_of_the_classes() -> None:
    assert class_indices(("a", "b", "c"), ["b", "c", "a"], 3).tolist() == [2, 0, 1]
    assert class_indices(["dog", "cat"], ["ant", "bee", "cat", "dog"], 4).tolist() == [3, 2]  # some are enough
    assert class_indices(["x", "y"], None, 2).tolist() == [0, 1]


CLASSES_REFUSED = {
    "unknown": (["dog", "emu", "fox"], ["cat", "dog"], 2, "class 'emu' of the data is none of the model's: cat, dog"),
    "twice": (["crane"], ["crane", "crane"], 2, "class 'crane' of the data stands for several of the model's"),
    "too many": (["a", "b", "c"], None, 2, "the data has 3 classes: expected the model's 2"),
    "too few": (["a", "b"], None, 10, "the data has 2 classes: expected the model's 10, since it does not name them"),
    "too few names": (["a"], ["a"], 2, "expected the names of 2 classes, got 1"),
    "a number": (["a"], 2, 2, "expected the names of 2 classes, got 2"),
    "one word": (["a"], "ab", 2, "expected the names of 2 classes, got 'ab'"),
}


@pytest.mark.parametrize("case", CLASSES_REFUSED)
def test_classes_that_do_not_fit_are_refused(case: str) -> None:
    data, names, count, message = CLASSES_REFUSED[case]
    with pytest.raises(ExportError, match=message):
        class_indices(data, names, count)


@pytest.mark.parametrize("shape", [["batch"], ["batch", 10, 7, 7], ["batch", "classes"], ["batch", 1], []])
def test_outputs_that_tell_no_classes_apart_are_refused(shape: list[int | str]) -> None:
    assert class_count(["batch", 10]) == 10
    with pytest.raises(ExportError, match=r"expected a first output of shape \[N, classes\]"):
        class_count(shape)


def test_a_row_with_nan_is_never_correct_and_other_shapes_are_refused() -> None:
    logits = np.array([[0, 1], [np.nan, 1], [np.nan, np.nan], [0, np.inf]], np.float32)
    assert count_correct({"y": logits}, np.array([1, 1, 0, 1]), np.arange(2)) == 2
    for shape in ((4,), (4, 2, 1), (3, 2)):
        with pytest.raises(ExportError, match=r"expected logits of shape \[4, classes\]"):
            count_correct({"y": np.zeros(shape)}, np.zeros(4, int), np.arange(2))


@pytest.mark.parametrize(("rows", "message"), [(Rows(0), "expected some"), (Rows(9, 10), "expected 10 .* got 9")])
def test_missing_pictures_are_refused(rows: Rows, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        measure("onnx", "numpy", "fp32", identity, rows, np.arange(3), 4)


def accuracy(form: str, correct: int, images: int = 1000) -> Accuracy:
    return Accuracy(form, "numpy", "fp16", images, correct, 0.5)


@pytest.mark.parametrize(
    ("eager", "other", "fails"),
    [(1000, 990, False), (1000, 989, True), (700, 693, False), (700, 692, True), (900, 950, False), (0, 0, False)],
)
def test_a_form_keeps_99_percent_of_the_eager_models_top1(eager: int, other: int, fails: bool) -> None:
    forms = (accuracy("eager", eager), accuracy("fused", eager), accuracy("onnx", other))
    assert bool(lost_accuracy(forms)) is fails
    passed = Rung("onnx", "numpy", "fp16", outputs={"y": NetworkCheck(0.0, 0.0, 0.0, 1.5, 1.0, "equal")})
    report = ParityReport("fp16", 8, Evidence(()), (passed,), forms)
    assert bool(report) is not fails
    if fails:
        assert report.verdict.startswith(f"accuracy lost: onnx (fp16) has {other / 10:.2f} % top-1")
        assert f"the eager model has {eager / 10:.2f} %: expected at least 99 %" in report.verdict


def test_the_table_shows_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    print_accuracy([accuracy("eager", 925), accuracy("fused", 925), accuracy("onnx", 905)])
    title, *lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert title == "accuracy before and after"
    assert lines[-3].split() == ["eager", "numpy", "fp16", "92.50", "%", "1000"]
    assert lines[-2].split() == ["fused", "numpy", "fp16", "92.50", "%", "+0.00", "pp", "1000"]
    assert lines[-1].split() == ["onnx", "numpy", "fp16", "90.50", "%", "-2.00", "pp", "1000"]
