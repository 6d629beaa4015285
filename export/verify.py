"""Check a bundle again, on the machine it is on: first that it is whole, then that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from export.errors import ExportError
from export.golden import GOLDEN_FILE, load_golden
from export.inference import ArtefactRunner, artefacts, open_bundle
from export.parity.ladder import ENGINE_FACTOR, attempt, judge_attempt, reference_rungs
from export.parity.report import Rung


def verify_bundle(bundle: str | Path, progress: Callable[[str], None] = lambda step: None) -> list[Rung]:
    """Check every file of a bundle, then run its golden inputs through each artefact this machine can run.

    Returns:
        Rungs for what rounding alone made of the model when it was exported, and one for each artefact. The bundle
        passes when every executed rung is true.

    Raises:
        ExportError: not a bundle, or a file is missing, changed, unlisted or a link; names the file. No artefact runs
            here; says why.
    """
    progress("check the files")
    opened = open_bundle(bundle)
    precision = opened.precision
    if GOLDEN_FILE not in opened.contents:
        raise ExportError(f"{bundle}: expected {GOLDEN_FILE}, which is not listed in its manifest")
    references = load_golden(opened.contents[GOLDEN_FILE])
    rungs = []
    for artefact in artefacts(opened):
        progress(f"run {artefact.file}")
        runner = ArtefactRunner(opened, artefact)
        outcome = attempt(runner, artefact.obstacle, precision, references.images, opened.batch)
        factor = ENGINE_FACTOR if artefact.engine else precision.network_factor
        rungs.append(judge_attempt(outcome, references, precision, factor))
    if all(rung.not_run for rung in rungs):
        raise ExportError("; ".join(f"{rung.file} does not run here: {rung.not_run}" for rung in rungs))
    return [*reference_rungs(references, precision), *rungs]
