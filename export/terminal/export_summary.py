"""What an export found, on stdout: the table of rungs, a line for each fact, and what to do next.

`result` is an export's `ExportResult`, which lies above this room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from export.base.usage import StepUsage
from export.terminal.commands import typed
from export.terminal.console import print_accuracy, print_quantisation, print_rungs, print_usage
from export.terminal.flags import in_flags

_SHOWN = 8  # names of operators, or of classes, in one line


def some(names: Sequence[str]) -> str:
    """The first few; all are in parity.json, classes in manifest.json."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def summary_record(result: Any, usage: Sequence[StepUsage]) -> dict[str, Any]:
    """The same for JSON."""
    coverage = result.coverage
    return {
        "precision": result.report.precision,
        "output": str(result.output) if result.written else None,
        "fused": len(coverage.fused),
        "left": [operator.name for operator in coverage.left],
        "notes": list(coverage.notes),
        "strides": {name: list(stride) for name, stride in result.strides.items()},
        "files": dict(result.files),
        "skipped": dict(result.skipped),
        "seconds": round(result.seconds, 1),
        "profile": [step.to_json() for step in usage],
        **result.report.to_json(),
    }


def print_summary(
    result: Any, facts: Sequence[str], unmeasured: str, usage: Sequence[StepUsage], *, trained: bool
) -> None:
    """Print it.

    Args:
        result: of the export.
        facts: lines that only the caller knows, such as how pictures are prepared.
        unmeasured: why accuracy is not measured, where it is not and that is worth a line.
        usage: of each step, where it was measured.
        trained: whether the weights were.
    """
    coverage, report = result.coverage, result.report
    print_rungs(report.rungs, result.files)
    print(f"{len(coverage.fused)} fused operators; left: {', '.join(op.name for op in coverage.left) or 'none'}")
    for note in coverage.notes:
        print(note)
    for name, (height, width) in result.strides.items():
        print(f"{name}: one cell for {height} x {width} pixels of the input")
    for line in (*facts, *_found(result)):
        print(line)
    if report.quantisation is not None:
        print_quantisation(report.quantisation)
    if report.accuracy:
        print_accuracy(report.accuracy)
    elif unmeasured:
        print(f"accuracy not measured: {unmeasured}")
    for line in report.evidence.lines:
        print(in_flags(line))
    for weakness in report.evidence.weaknesses:
        print(in_flags(f"weak evidence: {weakness}"))
    for left_out in report.quick:
        print(f"--quick: {left_out}")
    if usage:
        print_usage(usage)
    if not trained:
        print("UNTRAINED weights: this checks the export, not the network; give --weights to deploy")
    print(f"{in_flags(report.verdict)} ({report.images} images, {result.seconds:.0f} s)")
    if result:
        print(f"{result.output} written; next: {typed('verify')} {result.output}")
    elif result.written:
        print(f"{result.output} written, UNVERIFIED: not for deployment")
    else:
        print(f"nothing written to {result.output}")


def _found(result: Any) -> Iterator[str]:
    """What is left, lacking or to be known, a line each."""
    report = result.report
    if report.kept:
        yield f"kept in float32: {', '.join(report.kept)}"
    for rung in report.rungs:
        if rung.operators is not None and rung.operators.unchecked:
            lacking = (
                "no operator criterion for" if rung.emulated is None else "instructions not known to the emulator in"
            )
            yield f"{rung.name}: {lacking} {some(rung.operators.unchecked)}"
    for name, reason in result.skipped.items():
        yield f"{name} engine not built: {in_flags(reason)}"
    if report.precision == "fp16" and not any(name.endswith((".engine", ".kernels")) for name in result.files):
        yield "fp16 is for GPUs: on a CPU this file takes half the disk of fp32, and neither less memory nor less time"
