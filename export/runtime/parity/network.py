"""P2 and P3: the outputs of a whole network against the float64 oracle. Needs numpy alone.

P2: e <= k * e_rounded, relative L2 errors against the oracle; also on logits centred per image. e_rounded
is the larger of two unfused networks in the candidate's precision: the eager model, and the same operators
with BatchNorm folded into the weights. The second rounds the very weights that the candidate rounds: what
rounding the weights costs is one draw, alike for all images, and two networks that round different weights
may differ by any factor in their errors with nothing wrong in either. That the fold is right is seen in float64.
P3: a changed top-1 fails where the oracle's margin exceeds tau = 2 * k * max|rounded - oracle|; a verdict
needs 95 % of the inputs above tau, and more than one class among them. Asked of class scores alone. Of [N, values] of
which nobody knows what they are, only the first half is: no rounding changes a clear top-1, whatever it means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.base.errors import ExportError

_DECIDED_SHARE = 0.95
_LARGEST_ERROR = 0.5  # beyond it an output of zeros would be as good: the precision does not represent the network
_INTEGER_FLOOR = 1e-3  # share of integer values, such as an argmax per pixel, that a near tie may change
SCORES, VALUES, EITHER = "scores", "values", "scores or values"
PROBABILITIES = "probabilities"  # scores that are behind a softmax


@dataclass(frozen=True)
class OutputKind:
    """What an output is.

    Attributes:
        kind: SCORES, of which the highest decides; VALUES; or EITHER, where that is not known.
        why: how that was found out, in a few words; empty where nobody asked.
        softmax: whether it is what a softmax returns: scores are probabilities.
    """

    kind: str = SCORES
    why: str = ""
    softmax: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "why": self.why, **({"softmax": True} if self.softmax else {})}


@dataclass(frozen=True)
class NetworkCheck:
    """One output of one candidate. True when nothing speaks against it.

    Attributes:
        error: relative L2 error of the candidate against the oracle.
        eager_error: the same of the unfused networks in the candidate's precision, the larger one.
        ratio: the larger of error / eager_error on the logits and on the logits centred per image, with
            the floor in place of a smaller eager_error.
        limit: k, what the ratio may not exceed.
        top1_agreement: share of inputs with the oracle's top-1 class; None where the output has no classes, or may
            have none and no clear margins.
        decision: `equal`, `flipped`, `no verdict` (too few inputs with a clear margin, or one class) or
            `not a decision`.
        reason: why it failed, empty where it passed.
    """

    error: float
    eager_error: float
    ratio: float
    limit: float
    top1_agreement: float | None
    decision: str
    reason: str = ""

    @classmethod
    def refused(cls, limit: float, reason: str) -> NetworkCheck:
        """A failure that has no error to measure."""
        return cls(float("inf"), 0.0, float("inf"), limit, None, "not a decision", reason)

    def __bool__(self) -> bool:
        return not self.reason


def compare(
    candidate: Mapping[str, NDArray],
    rounded: Sequence[Mapping[str, NDArray]],
    oracle: Mapping[str, NDArray],
    factor: float,
    floor: float,
    kinds: Mapping[str, OutputKind] | None = None,
) -> dict[str, NetworkCheck]:
    """Compare every output of a candidate with the oracle's.

    Args:
        candidate: output name -> array [N, ...].
        rounded: the same outputs of unfused networks in the candidate's precision; the larger error counts.
        oracle: the same outputs in float64; says which outputs there must be.
        factor: k.
        floor: a relative error no candidate is blamed for, however small the eager model's is.
        kinds: output name -> what it is; without one, [N, classes] are class scores.

    Returns:
        A check for every name in the oracle, and a failed one for every output the oracle does not have.

    Raises:
        ExportError: the oracle has no output, or holds a NaN or Inf.
    """
    if not oracle:
        raise ExportError("expected an oracle with at least one output")
    for name, reference in oracle.items():
        if not np.isfinite(reference).all():
            raise ExportError(f"the float64 model returns NaN or Inf in {name}: nothing can be compared with it")
    checks = {}
    for name, reference in oracle.items():
        if name not in candidate:
            checks[name] = NetworkCheck.refused(factor, "the output is missing")
        else:
            kind = (kinds or {}).get(name, OutputKind()).kind
            checks[name] = _compare_output(candidate[name], [r[name] for r in rounded], reference, factor, floor, kind)
    for name in candidate.keys() - oracle.keys():
        checks[name] = NetworkCheck.refused(factor, "an output the model does not have")
    return checks


def relative_error(candidate: NDArray, oracle: NDArray) -> float:
    """||candidate - oracle|| / ||oracle||; 0 for two zeros, inf where the candidate is not finite."""
    if not np.isfinite(candidate).all():
        return float("inf")
    difference = float(np.linalg.norm((candidate.astype(np.float64) - oracle).ravel()))
    if difference == 0:
        return 0.0
    norm = float(np.linalg.norm(oracle.ravel()))
    return difference / norm if norm else float("inf")


def finite(value: float) -> float | None:
    """For JSON, which has no infinity: None stands for an error that has no size."""
    return value if np.isfinite(value) else None


def _compare_output(
    candidate: NDArray, rounded: Sequence[NDArray], oracle: NDArray, factor: float, floor: float, kind: str
) -> NetworkCheck:
    if candidate.shape != oracle.shape:
        return NetworkCheck.refused(factor, f"shape {list(candidate.shape)}, expected {list(oracle.shape)}")
    if not np.issubdtype(oracle.dtype, np.floating):
        return _compare_integers(candidate, rounded, oracle, factor)
    if not np.isfinite(candidate).all():
        return NetworkCheck.refused(factor, f"{int((~np.isfinite(candidate)).sum())} values are NaN or Inf")
    error, eager_error = relative_error(candidate, oracle), max(relative_error(y, oracle) for y in rounded)
    ratio = error / max(eager_error, floor)
    row = oracle.ndim == 2 and oracle.shape[1] > 1
    if row:
        centred, reference, *centred_rounded = (
            y - y.mean(axis=1, keepdims=True) for y in (candidate, oracle, *rounded)
        )
        centred_error = max(relative_error(y, reference) for y in centred_rounded)
        ratio = max(ratio, relative_error(centred, reference) / max(centred_error, floor))
    if not error < _LARGEST_ERROR:
        reason = f"relative error {error:.2f}: this precision does not represent the network"
        return NetworkCheck(error, eager_error, ratio, factor, None, "not a decision", reason)
    reason = "" if ratio <= factor else f"error is {ratio:.2f} times that of unfused operators, the limit is {factor:g}"
    agreement, decision = None, "not a decision"
    if row and kind != VALUES:
        agreement, decision = _decide(candidate, rounded, oracle, factor)
        if kind == EITHER and decision == "no verdict":
            agreement, decision = None, "not a decision"
        if decision == "flipped":
            reason = reason or "a top-1 class changed where the oracle's margin is clear"
    return NetworkCheck(error, eager_error, ratio, factor, agreement, decision, reason)


def _compare_integers(candidate: NDArray, rounded: Sequence[NDArray], oracle: NDArray, factor: float) -> NetworkCheck:
    error, eager_error = float((candidate != oracle).mean()), max(float((y != oracle).mean()) for y in rounded)
    ratio = error / max(eager_error, _INTEGER_FLOOR)
    reason = "" if ratio <= factor else f"{error:.1%} of the values differ"
    return NetworkCheck(error, eager_error, ratio, factor, None, "not a decision", reason)


def _decide(candidate: NDArray, rounded: Sequence[NDArray], oracle: NDArray, factor: float) -> tuple[float, str]:
    ordered = np.sort(oracle, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    threshold = 2 * factor * max(float(np.abs(y - oracle).max()) for y in rounded)
    agrees = candidate.argmax(axis=1) == oracle.argmax(axis=1)
    clear = margin > threshold
    if bool((clear & ~agrees).any()):
        decision = "flipped"
    elif clear.mean() < _DECIDED_SHARE or len(np.unique(oracle.argmax(axis=1))) == 1:
        decision = "no verdict"
    else:
        decision = "equal"
    return float(agrees.mean()), decision
