"""Check a bundle again, on the machine it is on: first that it is whole, then that it computes what it should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from export.base.errors import ExportError
from export.base.progress import Progress, silent
from export.runtime.artefacts import Artefact, artefact_runner, artefacts
from export.runtime.bundle.contents import Bundle, open_bundle
from export.runtime.bundle.golden import GOLDEN_FILE, load_golden
from export.runtime.parity.ladder import ENGINE_FACTOR, References, attempt, judge_attempt, reference_rungs
from export.runtime.parity.rungs import Rung


def verify_bundle(bundle: str | Path, progress: Progress = silent, runtime: str = "") -> list[Rung]:
    """Check every file of a bundle, then run its golden inputs through each artefact this machine can run.

    `runtime` is one of RUNTIMES, which alone is wanted; by default all, but OpenVINO only where it is asked for.

    Returns:
        Rungs for what rounding alone made of the model when it was exported, and one for each artefact; of a bundle
        that was written without a verdict one that says so and fails. It passes when every executed rung is true.

    Raises:
        ExportError: not a bundle, or a file of it or of an engine built here is missing, changed, unlisted or a link;
            names the file. No artefact runs here; says why.
    """
    progress("check the files")
    opened = open_bundle(bundle)
    references = golden_references(opened)
    rungs = [run_artefact(opened, artefact, references, progress) for artefact in artefacts(opened, runtime)]
    if all(rung.not_run for rung in rungs):
        raise ExportError("; ".join(f"{rung.file} does not run here: {rung.not_run}" for rung in rungs))
    return [*exported_rungs(opened, references), *rungs]


def exported_rungs(bundle: Bundle, references: References) -> list[Rung]:
    """What rounding alone made of the model when it was exported, and whether no verdict was reached then."""
    rungs = reference_rungs(references, bundle.precision)
    if bundle.unverified:
        rungs.append(Rung.of_weak_evidence(bundle.precision.name, bundle.unverified))
    return rungs


def golden_references(bundle: Bundle) -> References:
    """What every artefact of a bundle is compared with; raises ExportError where it has none."""
    if GOLDEN_FILE not in bundle.contents:
        raise ExportError(f"{bundle.path}: expected {GOLDEN_FILE}, which is not listed in its manifest")
    references = load_golden(bundle.contents[GOLDEN_FILE])
    inputs = references.inputs
    if len(bundle.inputs) == len(inputs) == 1:  # which the file calls as it likes
        inputs = dict(zip(bundle.inputs, inputs.values(), strict=True))
    if inputs.keys() != bundle.inputs.keys():
        raise ExportError(
            f"{bundle.path}: {GOLDEN_FILE} has inputs {', '.join(inputs)}: expected {', '.join(bundle.inputs)}"
        )
    return replace(references, inputs={name: inputs[name] for name in bundle.inputs}, kinds=bundle.kinds)


def run_artefact(bundle: Bundle, artefact: Artefact, references: References, progress: Progress) -> Rung:
    """Run the golden inputs through an artefact, if this machine can, and compare."""
    progress(f"run {artefact.file}")
    precision = bundle.precision
    if artefact.obstacle:
        return Rung(artefact.form, artefact.runtime, precision.name, artefact.file, not_run=artefact.obstacle)
    outcome = attempt(artefact_runner(bundle, artefact), "", precision, references.inputs, bundle.batch)
    factor = ENGINE_FACTOR if artefact.engine else precision.network_factor
    return judge_attempt(outcome, references, precision, factor)
