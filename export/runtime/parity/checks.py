"""What was found of single operators and values of a candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.runtime.parity.network import finite

OVERFLOW, UNDERFLOW, SATURATION, WRONG, NAN = "overflow", "underflow", "saturation", "wrong value", "NaN"
OUT_OF_RANGE = (OVERFLOW, UNDERFLOW, SATURATION)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a value.

    Attributes:
        kind: OVERFLOW, UNDERFLOW, SATURATION, WRONG or NAN.
        index: of the worst element.
        got, expected: its value, and what float64 makes of the same input.
    """

    kind: str
    index: tuple[int, ...]
    got: float
    expected: float

    def __str__(self) -> str:
        return f"{self.kind} at {list(self.index)}, {self.got:.5g} where float64 has {self.expected:.5g}"

    def to_json(self) -> dict[str, Any]:
        values = {"got": finite(self.got), "expected": finite(self.expected)}
        return {"kind": self.kind, "index": list(self.index), **values}


@dataclass(frozen=True)
class OperatorCheck:
    """One operator of one candidate; true when it passed.

    Attributes:
        name: the module of the user's model.
        kind: the operator.
        rms_z, max_z: error in units of what rounding explains; 0 or inf for an exact operator.
        rms_limit, max_limit: what they may be.
        reason: why it failed, empty where it passed.
        fault: of a value that was computed and is wrong.
    """

    name: str
    kind: str
    rms_z: float
    max_z: float
    rms_limit: float
    max_limit: float
    reason: str = ""
    fault: Fault | None = None

    def __bool__(self) -> bool:
        return not self.reason

    @property
    def severity(self) -> float:
        """Its error in units of what it may be; infinite where it has no size."""
        return max(self.rms_z / self.rms_limit, self.max_z / self.max_limit)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "rms_z": finite(self.rms_z),
            "max_z": finite(self.max_z),
            "rms_limit": self.rms_limit,
            "max_limit": self.max_limit,
            "reason": self.reason,
            "fault": self.fault and self.fault.to_json(),
        }


@dataclass(frozen=True)
class QuantisedCheck:
    """One quantised value, or one quantised weight, of one candidate; true when it passed.

    Attributes:
        name: of the value or weight, after the module of the user's model that it belongs to.
        kind: `quantize_linear`, `weight`, or the operator that computes a value that is not quantised.
        lsb: the largest difference in units in the last place; in roundoffs of the largest value where none is.
        differing: the share of elements that differ at all.
        reason: why it failed, empty where it passed.
        fault: of a value that was computed and is wrong.
        lsb_limit, differing_limit: what they may be; None where they are not what decides.
    """

    name: str
    kind: str
    lsb: float
    differing: float
    reason: str = ""
    fault: Fault | None = None
    lsb_limit: float | None = None
    differing_limit: float | None = None

    def __bool__(self) -> bool:
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "lsb": finite(self.lsb),
            "lsb_limit": self.lsb_limit,
            "differing": round(self.differing, 6),
            "differing_limit": self.differing_limit,
            "reason": self.reason,
            "fault": self.fault and self.fault.to_json(),
        }


@dataclass(frozen=True)
class OperatorChecks:
    """All operators of one candidate; true when each passed, there was at least one and no layer is unproved.

    Attributes:
        checks: in execution order.
        unchecked: the operators that were not checked.
        unproved: the convolutions and linear layers among them, each with its kind.
    """

    checks: tuple[OperatorCheck | QuantisedCheck, ...]
    unchecked: tuple[str, ...]
    unproved: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.checks) and all(self.checks) and not self.unproved

    @property
    def first_failure(self) -> OperatorCheck | QuantisedCheck | None:
        return next((check for check in self.checks if not check), None)

    @property
    def undecided(self) -> bool:
        """Whether nothing is wrong, and a layer is unproved all the same."""
        return bool(self.unproved) and all(self.checks)

    @property
    def summary(self) -> str:
        """The first operator that failed and why; empty where all passed."""
        first = self.first_failure
        if first is None:
            if self.unproved:
                return f"no verdict: {self.unproved[0]} could not be checked, its values are not shown"
            return "" if self.checks else "no operator could be checked"
        return f"{first.name}: {first.fault.kind if first.fault else first.reason}"

    @property
    def diagnosis(self) -> str:
        """The first operator that failed, what is wrong with it and where, in one line; empty where all passed."""
        first = self.first_failure
        if first is None:
            return self.summary
        fault = f"{first.fault}: " if first.fault else ""
        return f"{first.name} ({first.kind}): {fault}{first.reason}"
