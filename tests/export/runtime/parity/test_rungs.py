"""What a form and an export come to, in a word that tells what was not run from what nothing could be told of."""

from __future__ import annotations

import numpy as np
import pytest

from export.runtime.parity.checks import OperatorCheck, OperatorChecks
from export.runtime.parity.network import NetworkCheck, compare
from export.runtime.parity.rungs import Evidence, ParityReport, Rung

LOGITS = {"output": np.eye(4)}
RIGHT = compare(LOGITS, [{"output": np.eye(4) * (1 + 1e-6)}], LOGITS, 2.0, 0.0, {})
FAILED = {"output": NetworkCheck.refused(2.0, "it is NaN")}
CONV = OperatorCheck("conv1", "conv2d", 1.0, 4.0, 1.6, 9.0)
HIDDEN = OperatorChecks((CONV,), ("conv2",), ("conv2 (conv2d)",))


def form(name: str = "onnx", **facts: object) -> Rung:
    return Rung(name, "", "fp16", **{"file": "model.onnx", "outputs": RIGHT, **facts})  # type: ignore[arg-type]


ENGINE = form("tensorrt", outputs={}, not_run="no NVIDIA GPU here")
UNSEEN = form(operators=HIDDEN)
RUNGS = {
    "equal": form(),
    "wrong": form(outputs=FAILED),
    "emulated": form("kernels sm_87", outputs={}, operators=OperatorChecks((CONV,), ()), emulated=(3, 40)),
    "not run": ENGINE,
    "no reference": form("eager", file="", outputs={}, not_run="it overflows"),
    "no verdict": UNSEEN,
}
WEAK = Evidence(("conv1 is dead",), remedy="give other pictures")
REPORTS: dict[str, tuple[tuple[Rung, ...], Evidence, str]] = {
    "an engine that waits for its device": ((form(), ENGINE), Evidence(()), "equal"),
    "weak evidence": ((form(), ENGINE), WEAK, "no verdict"),
    "a layer that a form hides": ((form(), UNSEEN), Evidence(()), "no verdict"),
    "the same, and a wrong form": ((UNSEEN, form("fused", outputs=FAILED)), Evidence(()), "wrong"),
    "wrong on weak evidence": ((form(outputs=FAILED),), WEAK, "wrong"),
    "hidden, and wrong outputs": ((form(operators=HIDDEN, outputs=FAILED),), Evidence(()), "wrong"),
}


@pytest.mark.parametrize("status", RUNGS)
def test_a_form_comes_to(status: str) -> None:
    rung = RUNGS[status]
    record = rung.to_json()
    assert record["status"] == rung.status == status
    assert record["passed"] is {"equal": True, "emulated": True, "wrong": False, "no verdict": False}.get(status)
    assert rung.verdict.startswith("output: it is NaN" if status == "wrong" else status)
    assert Rung.of_weak_evidence("fp16", "no verdict, dead").status == "no verdict"


@pytest.mark.parametrize("case", REPORTS)
def test_an_export_comes_to(case: str) -> None:
    rungs, evidence, status = REPORTS[case]
    report = ParityReport("fp16", 4, evidence, rungs)
    assert report.to_json()["status"] == status and bool(report) is (status == "equal")
    assert report.verdict.startswith({"wrong": "not equal to the eager model"}.get(status, status))
    assert report.written is (status == "equal") and report.verdict.count("no verdict") == (status == "no verdict")
