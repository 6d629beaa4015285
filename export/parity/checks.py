"""What was found of single operators and values of a candidate. No PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.parity.network import finite


@dataclass(frozen=True)
class OperatorCheck:
    """One operator of one candidate; true when it passed.

    Attributes:
        name: the module of the user's model.
        kind: the operator.
        rms_z, max_z: error in units of what rounding explains; 0 or inf for an exact operator.
        reason: why it failed, empty where it passed.
        worst: index of the worst element.
        got, expected: its value and the float64 value.
    """

    name: str
    kind: str
    rms_z: float
    max_z: float
    reason: str = ""
    worst: tuple[int, ...] = ()
    got: float = 0.0
    expected: float = 0.0

    def __bool__(self) -> bool:
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        z = {"rms_z": finite(self.rms_z), "max_z": finite(self.max_z)}
        return {"name": self.name, "kind": self.kind, **z, "reason": self.reason}


@dataclass(frozen=True)
class QuantisedCheck:
    """One quantised value, or one quantised weight, of one candidate; true when it passed.

    Attributes:
        name: of the value or weight, after the module of the user's model that it belongs to.
        kind: `quantize_linear`, `weight`, or the operator that computes a value that is not quantised.
        lsb: the largest difference in units in the last place; in roundoffs of the largest value where none is.
        differing: the share of elements that differ at all.
        reason: why it failed, empty where it passed.
    """

    name: str
    kind: str
    lsb: float
    differing: float
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        differing = round(self.differing, 6)
        return {"name": self.name, "kind": self.kind, "lsb": self.lsb, "differing": differing, "reason": self.reason}


@dataclass(frozen=True)
class OperatorChecks:
    """All operators of one candidate; true when each passed and there was at least one."""

    checks: tuple[OperatorCheck | QuantisedCheck, ...]
    unchecked: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.checks) and all(self.checks)

    @property
    def first_failure(self) -> OperatorCheck | QuantisedCheck | None:
        return next((check for check in self.checks if not check), None)
