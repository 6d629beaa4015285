"""What a comparison found, as values that become a table and parity.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from export.runtime.parity.accuracy import Accuracy, lost_accuracy
from export.runtime.parity.checks import OUT_OF_RANGE, OperatorChecks
from export.runtime.parity.network import NetworkCheck, OutputKind, finite

# What a form, or a whole export, comes to, as parity.json, the tables and the report say it.
EQUAL, WRONG = "equal", "wrong"
EMULATED = "emulated"  # of a kernel engine: some blocks were, and are right; it was not run
NOT_RUN = "not run"  # here: a device or a package that it needs is missing
NO_VERDICT = "no verdict"  # the evidence is too weak for one
NO_REFERENCE = "no reference"  # an unfused network that others are not compared with
RUNG_HEADINGS = ("form", "runtime", "operators", "error", "eager error", "ratio", "top-1", "MB", "ms/image", "verdict")


@dataclass(frozen=True)
class Rung:
    """One form of the network, held against the float64 model. True when equal.

    Attributes:
        name: of the form: eager, fused, triton, onnx, or an engine's flavour.
        runtime: what executed it.
        precision: of its weights and activations.
        file: the artefact in the bundle, empty where there is none.
        outputs: P2 and P3 per output; empty where the form was not run.
        operators: P1; None where the form does not show its intermediate results.
        not_run: why it was built but not executed here, or why an unfused network is no reference; else empty.
        no_verdict: of the export as a whole: why nothing was concluded from it; else empty.
        seconds: per image of one run on this machine, 0 where not run.
        emulated: of a kernel engine that was not run: blocks whose machine code was executed by the emulator, and all
            blocks of those launches; else None.
    """

    name: str
    runtime: str
    precision: str
    file: str = ""
    outputs: Mapping[str, NetworkCheck] = field(default_factory=dict)
    operators: OperatorChecks | None = None
    not_run: str = ""
    no_verdict: str = ""
    seconds: float = 0.0
    emulated: tuple[int, int] | None = None

    @classmethod
    def of_weak_evidence(cls, precision: str, verdict: str) -> Rung:
        """A rung that fails, for a bundle that was written without a verdict."""
        return cls("evidence", "", precision, no_verdict=verdict)

    def __bool__(self) -> bool:
        if self.not_run:
            return True
        if self.no_verdict:
            return False
        operators = self.operators is None or bool(self.operators)
        if self.emulated is not None:
            return self.operators is not None and operators
        return bool(self.outputs) and all(self.outputs.values()) and operators

    @property
    def status(self) -> str:
        """What it comes to, in a word."""
        if self.not_run:
            return NOT_RUN if self.file else NO_REFERENCE
        if self:
            return EQUAL if self.emulated is None else EMULATED
        undecided = self.operators is not None and self.operators.undecided and all(self.outputs.values())
        return NO_VERDICT if self.no_verdict or undecided else WRONG

    @property
    def worst(self) -> NetworkCheck | None:
        """The output with the largest error in units of the eager model's."""
        return max(self.outputs.values(), key=lambda check: check.ratio, default=None)

    @property
    def verdict(self) -> str:
        """`equal`, `not run`, how much of it was emulated, or why it is not equal, in one line."""
        if self.no_verdict:
            return self.no_verdict
        if self.not_run:
            return f"{self.status}: {self.not_run}"
        failed = [f"{name}: {check.reason}" for name, check in self.outputs.items() if not check]
        if self.operators is not None and not self.operators:
            failed.insert(len(failed) if self.operators.undecided else 0, self.operators.summary)
        right = EQUAL if self.emulated is None else EMULATED + " {:,} of {:,} blocks".format(*self.emulated)
        return failed[0] if failed else right

    @property
    def diagnosis(self) -> str:
        """The verdict with all that is known of the first operator that failed, in one line."""
        if self.operators is None or self.operators.undecided:
            return self.verdict
        return self.operators.diagnosis or self.verdict

    @property
    def out_of_range(self) -> bool:
        """Whether an operator failed for want of range: in a type of more bits it need not."""
        checks = () if self.operators is None else self.operators.checks
        return any(check.fault is not None and check.fault.kind in OUT_OF_RANGE for check in checks)

    def cells(self, size: int) -> list[str]:
        """Itself under RUNG_HEADINGS; `size` of its file in bytes, 0 where it has none."""
        worst, operators = self.worst, self.operators
        measured = ["", "", "", ""]
        if worst is not None:
            agreement = "" if worst.top1_agreement is None else f"{100 * worst.top1_agreement:.0f} %"
            measured = [f"{worst.error:.2e}", f"{worst.eager_error:.2e}", f"{worst.ratio:.2f}", agreement]
        passed = "" if operators is None else f"{sum(map(bool, operators.checks))}/{len(operators.checks)}"
        megabytes = f"{size / 1e6:.1f}" if size else ""
        milliseconds = f"{1000 * self.seconds:.0f}" if self.seconds else ""
        verdict = self.verdict
        if verdict == EQUAL and worst is not None and worst.decision == NO_VERDICT:
            verdict = f"{EQUAL}, {NO_VERDICT} on top-1"
        return [self.name, self.runtime, passed, *measured, megabytes, milliseconds, verdict]

    def to_json(self) -> dict[str, Any]:
        worst = self.worst
        record: dict[str, Any] = {
            "name": self.name,
            "runtime": self.runtime,
            "precision": self.precision,
            "file": self.file or None,
            "passed": bool(self) if not self.not_run else None,
            "status": self.status,
            "verdict": self.verdict,
            "diagnosis": self.diagnosis,
            "seconds_per_image": self.seconds,
        }
        if self.emulated is not None:
            record["emulated"] = dict(zip(("blocks", "of"), self.emulated, strict=True))
        if worst is not None:
            record |= _network_facts(worst)
        if len(self.outputs) > 1:
            record["outputs"] = {name: _network_facts(check) for name, check in self.outputs.items()}
        if self.operators is not None:
            record["operators"] = {
                "unchecked": list(self.operators.unchecked),
                "checked": [check.to_json() for check in self.operators.checks],
            }
        return record


def _network_facts(check: NetworkCheck) -> dict[str, Any]:
    return {
        "error": finite(check.error),
        "eager_error": finite(check.eager_error),
        "ratio": finite(check.ratio),
        "limit": check.limit,
        "top1_agreement": check.top1_agreement,
        "decision": check.decision,
    }


def _order(rung: Rung) -> tuple[bool, bool]:
    """Of rungs that failed, to say first what is wrong and where."""
    return rung.status == NO_VERDICT, rung.operators is None


@dataclass(frozen=True)
class OutputEvidence:
    """What the inputs make of one output.

    Attributes:
        kind: what it is, and how that was found out.
        signal: ||y - mean over images|| in units of the precision's own error of y; None where it holds whole
            numbers or does not follow from the input.
        classes: how many different top-1 classes the inputs have; None where it is not class scores.
    """

    kind: OutputKind
    signal: float | None
    classes: int | None

    def to_json(self) -> dict[str, Any]:
        return {**self.kind.to_json(), "signal": self.signal and finite(self.signal), "classes": self.classes}


@dataclass(frozen=True)
class Evidence:
    """What was found; true when nothing weakens it.

    Attributes:
        weaknesses: one line each, naming the layer or output; empty where the evidence is good.
        active_share: smallest and largest share of positive values after a ReLU.
        summand_signal: the smallest rms of a summand in units of the rounding error of its sum.
        outputs: by name.
        unexercised: what no input shows, though that is no reason to distrust the rest; one line each.
        remedy: what the user can give so that the first weakness goes.
    """

    weaknesses: tuple[str, ...]
    active_share: tuple[float, float] | None = None
    summand_signal: float | None = None
    outputs: Mapping[str, OutputEvidence] = field(default_factory=dict)
    unexercised: tuple[str, ...] = ()
    remedy: str = ""

    def __bool__(self) -> bool:
        return not self.weaknesses

    @property
    def lines(self) -> list[str]:
        """What each output is, how that is known, and how far it varies; then what no input shows."""
        found = []
        for name, output in self.outputs.items():
            why = f" ({output.kind.why})" if output.kind.why else ""
            signal = "" if output.signal is None else f", varies by {_times(output.signal)} times its rounding error"
            classes = "" if output.classes is None else f", {output.classes} top-1 classes among the images"
            found.append(f"{name}: {output.kind.kind}{why}{signal}{classes}")
        return [*found, *(f"not seen: {what}" for what in self.unexercised)]

    def to_json(self) -> dict[str, Any]:
        return {
            "weaknesses": list(self.weaknesses),
            "active_share": self.active_share,
            "summand_signal": self.summand_signal,
            "outputs": {name: output.to_json() for name, output in self.outputs.items()},
            "unexercised": list(self.unexercised),
        }


def _times(signal: float) -> str:
    return f"{signal:,.0f}" if signal >= 10 else f"{round(signal, 2):.2g}"


@dataclass(frozen=True)
class LayerCost:
    """What quantising one layer alone costs.

    Attributes:
        name: of the layer.
        error: relative L2 of the first output against that of the network in float32.
    """

    name: str
    error: float


@dataclass(frozen=True)
class Quantisation:
    """How a network came to compute in 8 bits.

    Attributes:
        method: of the calibration.
        images: how many it saw.
        sha256: of them, as the network took them.
        layers: how many convolutions and linear layers are quantised.
        kept: the layers that stayed in floating point.
        costs: of each layer on its own, the highest first; empty where they were not measured.
        purposes: file in the bundle -> what it is for.
        float_convolutions: how many convolutions ONNX Runtime runs in floating point, of the file made for it.
    """

    method: str
    images: int
    sha256: str
    layers: int
    kept: tuple[str, ...]
    costs: tuple[LayerCost, ...]
    purposes: Mapping[str, str]
    float_convolutions: int

    def to_json(self) -> dict[str, Any]:
        return {
            "calibration": {"method": self.method, "images": self.images, "sha256": self.sha256},
            "layers": self.layers,
            "kept": list(self.kept),
            "costs": {cost.name: cost.error for cost in self.costs},
            "purposes": dict(self.purposes),
            "float_convolutions": self.float_convolutions,
        }


@dataclass(frozen=True)
class ParityReport:
    """Every rung and the evidence under them. True when the network may be shipped.

    Attributes:
        quantisation: how it was quantised; None for floating-point precisions.
        accuracy: of the eager model in float32, then of each form; empty where it was not measured.
        kept: the operators of a network of 16 bits that compute in float32.
        unverified: a bundle is wanted even without a verdict.
        quick: what a quick export left out, a line each; empty for one that was not.
    """

    precision: str
    images: int
    evidence: Evidence
    rungs: tuple[Rung, ...]
    accuracy: tuple[Accuracy, ...] = ()
    quantisation: Quantisation | None = None
    kept: tuple[str, ...] = ()
    unverified: bool = False
    quick: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.evidence) and self._nothing_against_it

    @property
    def written(self) -> bool:
        """Whether there is to be a bundle: it may be shipped, or is wanted although the evidence is too weak."""
        return self._nothing_against_it and (self.unverified or bool(self.evidence))

    @property
    def _nothing_against_it(self) -> bool:
        executed = [rung for rung in self.rungs if not rung.not_run]
        return bool(executed) and all(executed) and not lost_accuracy(self.accuracy)

    @property
    def status(self) -> str:
        """What it comes to, in a word: as of a rung, but it is never not run."""
        if self:
            return EQUAL
        failed = {rung.status for rung in self.rungs if not rung}
        return WRONG if failed - {NO_VERDICT} or lost_accuracy(self.accuracy) else NO_VERDICT

    @property
    def verdict(self) -> str:
        """One line: equal, not equal and where, accuracy lost and how much, or no verdict and why.

        A network of 8 bits is not equal to the eager model; it is right where every value is what its scales say.
        """
        unequal_rungs = sorted((rung for rung in self.rungs if not rung), key=_order)
        failed = [f"{rung.name}: {rung.diagnosis}" for rung in unequal_rungs]  # first those that say where
        lost = lost_accuracy(self.accuracy)
        if self.quantisation is not None:
            equal, unequal = "every value of 8 bits is what its scales say", "wrong in 8 bits"
            if lost and not self.quantisation.kept:
                lost += "; ExportConfig.keep_fp16='auto' finds the layers to leave in fp16"
        else:
            equal, unequal = "equal to the eager model", "not equal to the eager model"
            narrow = self.precision in ("fp16", "bf16") and not self.kept
            if narrow and any(rung.out_of_range for rung in unequal_rungs):
                failed[0] += "; ExportConfig.keep_fp32='auto' finds the layers to leave in fp32"
        if failed and self.status == NO_VERDICT:
            rung = unequal_rungs[0]
            return f"{NO_VERDICT}: {rung.name}: {rung.diagnosis.removeprefix(f'{NO_VERDICT}: ')}"
        if failed and self.quantisation is None:
            return f"{unequal}: {failed[0]}{lost and f'; {lost}'}"
        if lost:
            return f"accuracy lost: {lost}"
        if failed:
            return f"{unequal}: {failed[0]}"
        if not self.evidence:
            lift = "" if self.unverified else "; ExportConfig.unverified=True writes a bundle that says so"
            return (
                f"{NO_VERDICT}, the evidence is too weak: {self.evidence.weaknesses[0]}; {self.evidence.remedy}{lift}"
            )
        undecided = any(check.decision == NO_VERDICT for r in self.rungs for check in r.outputs.values())
        alike = any(output.classes == 1 for output in self.evidence.outputs.values())
        why = "one class among the images" if alike else "margins too small"
        return f"{equal}{f', {NO_VERDICT} on top-1: {why}' if undecided else ''}"

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": bool(self),
            "status": self.status,
            "verdict": self.verdict,
            "images": self.images,
            "quick": list(self.quick),
            "kept": list(self.kept),
            "evidence": self.evidence.to_json(),
            "rungs": [rung.to_json() for rung in self.rungs],
            "accuracy": [measured.to_json() for measured in self.accuracy],
            "quantisation": self.quantisation and self.quantisation.to_json(),
        }
