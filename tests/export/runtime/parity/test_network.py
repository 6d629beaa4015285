"""The comparator on arrays made by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from export.runtime.parity.network import (
    EITHER,
    SCORES,
    VALUES,
    NetworkCheck,
    OutputKind,
    compare,
    relative_error,
)

U = 2.0**-11
FLOOR = 0.41 * U
K = 1.5


@pytest.fixture
def oracle() -> NDArray[np.float64]:
    """Eight images, ten classes, every margin large."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(8, 10))
    logits[np.arange(8), np.arange(8)] += 8
    return logits


@pytest.fixture
def eager(oracle: NDArray[np.float64]) -> NDArray[np.float64]:
    return oracle + np.random.default_rng(1).normal(size=oracle.shape) * 1e-3


def check(candidate: NDArray, eager: NDArray, oracle: NDArray) -> NetworkCheck:
    return compare({"y": candidate}, [{"y": eager}], {"y": oracle}, K, FLOOR)["y"]


def test_the_same_error_as_eager_and_none_are_equal(oracle: NDArray[np.float64], eager: NDArray[np.float64]) -> None:
    result = check(oracle - (eager - oracle), eager, oracle)
    assert result and result.ratio == pytest.approx(1.0, rel=1e-3)
    assert result.decision == "equal" and result.top1_agreement == 1.0
    assert check(oracle.copy(), eager, oracle)


def _with(value: float, index: tuple[int, int] = (5, 5)) -> Callable[[NDArray], NDArray]:
    def change(y: NDArray) -> NDArray:
        y = y.copy()
        y[index] = value
        return y

    return change


BROKEN: dict[str, Callable[[NDArray], NDArray]] = {
    "zeros": np.zeros_like,
    "constant": lambda y: np.repeat(y[:1], len(y), axis=0),
    "NaN": _with(float("nan")),
    "Inf": _with(float("inf")),
    "swapped channels": lambda y: y[:, [1, 0, *range(2, y.shape[1])]],
    "one wrong value": lambda y: _with(y[3, 4] + 0.1, (3, 4))(y),
    "shifted by a constant": lambda y: y + 0.01,
    "scaled": lambda y: y * 1.01,
    "rolled along the batch": lambda y: np.roll(y, 1, axis=0),
    "a class too few": lambda y: y[:, :-1],
    "an image too few": lambda y: y[:-1],
    "wrong rank": lambda y: y[..., None],
}


@pytest.mark.mutant
@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_output_is_refused(defect: str, oracle: NDArray[np.float64], eager: NDArray[np.float64]) -> None:
    result = check(BROKEN[defect](eager), eager, oracle)
    assert not result and result.reason


def test_error_in_a_large_common_offset_is_found(oracle: NDArray[np.float64], eager: NDArray[np.float64]) -> None:
    """Relative to a large mean the error is small; centred per image it is not."""
    offset = 1e4
    result = check(eager + offset + 0.02 * oracle, eager + offset, oracle + offset)
    assert not result


def test_a_missing_and_an_extra_output_are_refused(oracle: NDArray[np.float64], eager: NDArray[np.float64]) -> None:
    checks = compare({"z": eager}, [{"y": eager}], {"y": oracle}, K, FLOOR)
    assert not checks["y"] and checks["y"].reason == "the output is missing"
    assert not checks["z"] and checks["z"].reason == "an output the model does not have"


def test_a_flip_with_a_clear_margin_is_refused(oracle: NDArray[np.float64], eager: NDArray[np.float64]) -> None:
    candidate = eager.copy()
    candidate[2] = np.roll(candidate[2], 1)
    result = compare({"y": candidate}, [{"y": eager}], {"y": oracle}, 1e9, FLOOR)["y"]
    assert result.decision == "no verdict"  # with such a factor no margin is clear
    result = check(candidate, eager, oracle)
    assert result.decision == "flipped" and result.top1_agreement == 7 / 8


def test_close_margins_give_no_verdict(oracle: NDArray[np.float64]) -> None:
    oracle = oracle.copy()
    top = oracle.max(axis=1)
    oracle[:2, 9] = top[:2] - 1e-4
    eager = oracle + np.random.default_rng(1).normal(size=oracle.shape) * 1e-3
    result = check(eager, eager, oracle)
    assert result and result.decision == "no verdict"


def test_integer_outputs_may_differ_where_the_eager_model_differs_too() -> None:
    classes = np.arange(100) % 7
    near_tie = classes.copy()
    near_tie[5] += 1
    assert compare({"y": classes}, [{"y": classes}], {"y": classes}, K, FLOOR)["y"]
    assert not compare({"y": near_tie}, [{"y": classes}], {"y": classes}, K, FLOOR)["y"]
    assert compare({"y": near_tie}, [{"y": near_tie}], {"y": classes}, K, FLOOR)["y"]


def test_zeros_are_refused_however_badly_the_eager_model_rounds(oracle: NDArray[np.float64]) -> None:
    eager = oracle + np.random.default_rng(1).normal(size=oracle.shape) * oracle.std()
    assert "does not represent the network" in check(np.zeros_like(oracle), eager, oracle).reason


def test_an_output_that_eager_computes_exactly_may_still_be_rounded() -> None:
    oracle = np.random.default_rng(0).normal(size=(4, 3, 5))
    rounded = oracle * (1 + 0.4 * U)
    assert check(rounded, oracle, oracle)
    assert not check(oracle * (1 + 2 * U), oracle, oracle)


def test_nothing_is_compared_with_a_broken_oracle_or_none(oracle: NDArray[np.float64]) -> None:
    for value in (float("nan"), float("inf")):
        broken = _with(value)(oracle)
        with pytest.raises(ValueError, match="NaN or Inf in y"):
            check(broken, broken, broken)
    with pytest.raises(ValueError, match="at least one output"):
        compare({}, [{}], {}, K, FLOOR)


def test_relative_error() -> None:
    assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0
    assert relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(np.array([0.0]), np.array([0.0])) == 0
    assert relative_error(np.array([float("nan")]), np.array([0.0])) == float("inf")


KINDS = {  # of an output -> the decision of clear margins, of close ones, of one class, and of a flip
    SCORES: ("equal", "no verdict", "no verdict", "flipped"),
    EITHER: ("equal", "not a decision", "not a decision", "flipped"),
    VALUES: ("not a decision",) * 4,
}


@pytest.mark.parametrize("kind", KINDS)
def test_top1_is_asked_of_what_may_be_scores(kind: str, oracle: NDArray[np.float64]) -> None:
    close, alike = oracle.copy(), oracle.copy()
    close[:2, 9] = close[:2].max(axis=1) - 1e-4
    alike[:, 0] += 20
    flipped = oracle.copy()
    flipped[2] = np.roll(flipped[2], 1)
    found = []
    for exact, candidate in ((oracle, None), (close, None), (alike, None), (oracle, flipped)):
        eager = exact + np.random.default_rng(1).normal(size=exact.shape) * 1e-3
        shown = eager if candidate is None else candidate
        result = compare({"y": shown}, [{"y": eager}], {"y": exact}, K, FLOOR, {"y": OutputKind(kind, "as told")})["y"]
        assert bool(result) is (candidate is None)  # with its top-1 or without it, the error shows
        found.append(result.decision)
    assert tuple(found) == KINDS[kind]
