"""Ways of running one network, side by side: held against the float64 model, and timed if they are right."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.base.batch import Batch, run_in_batches
from export.base.errors import ExportError, first_line
from export.base.precision import Precision
from export.base.progress import Progress, silent
from export.benchmark.candidates import COMPILED, Candidate, Subject, cpu_candidates, cuda_candidates, int8_candidates
from export.benchmark.floors import fused_at
from export.benchmark.roofline import floor_seconds, measure_ceilings, workloads
from export.benchmark.timing import CPU_CLOCK, CUDA_CLOCK, Clock, measure
from export.fusion.passes import DEFAULT_LEVEL, LEVELS, QUANTISED_LEVEL
from export.fusion.program import FusedProgram, QuantisedProgram
from export.quantisation.calibration import WANTED_IMAGES, InMemory, calibrate
from export.quantisation.quantise import quantised_programs
from export.quantisation.scheme import Scheme
from export.quantisation.split_addition import split_addition
from export.runtime.parity.network import NetworkCheck, compare, finite
from export.runtime.runner import Runner, TimedRunner

QUANTILES = (0.2, 0.5, 0.8)
CALIBRATION_SEED = 1  # other images than those the candidates are checked on
INPUT_SEEDS = (2, 3, 4, 5)  # of the batches in rotation while the clock runs


def compare_on(
    device: str,
    model: nn.Module,
    images: Tensor,
    draw: Callable[[int, int], Tensor],
    precision: Precision,
    batches: Sequence[int],
    progress: Progress,
    providers: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Check and time every way of running a model that a device has.

    Args:
        device: `cpu` or `cuda`.
        model: in eval mode.
        images: [N, C, H, W], float32, that everything is checked on.
        draw: (how many, seed) -> other images of that shape, to be timed on and to calibrate with.
        precision: what they compute in.
        batches: images per run.
        progress: called with the name of each step as it begins.
        providers: those whose names begin with one of these, beside the eager model; all where there are none.

    Yields:
        A record per batch size, for JSON.
    """
    cuda, largest = device == "cuda", max(batches)
    levels = {"b", QUANTISED_LEVEL, DEFAULT_LEVEL}  # b: what an eager model and a compiler do is counted from it
    if cuda:
        levels |= {level for level in LEVELS if _wanted(f"ours {level}", providers)}
    programs = fused_at(sorted(levels), model, images, Batch(1, min(8, largest), largest), progress)
    progress("run the eager model in float64")
    subject = Subject.of(model, programs, precision, images)
    on_device = _on_cuda if cuda else _on_cpu
    yield from on_device(subject, draw, batches, progress, providers)


def _wanted(name: str, providers: Sequence[str]) -> bool:
    return not providers or name.startswith(tuple(providers))


def _among(candidates: Sequence[Candidate], providers: Sequence[str]) -> list[Candidate]:
    """Those asked for, and the first, which all are compared with."""
    return [candidate for candidate in candidates if candidate is candidates[0] or _wanted(candidate.name, providers)]


def _on_cuda(
    subject: Subject,
    draw: Callable[[int, int], Tensor],
    batches: Sequence[int],
    progress: Progress,
    providers: Sequence[str],
) -> Iterator[dict[str, Any]]:
    # For all alike: cuDNN looks for its fastest algorithm, and float32 means float32.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    progress("measure the ceilings of the device")
    precision, ceilings = subject.precision, measure_ceilings(subject.precision)
    facts = {"peak_tflops": ceilings.flops / 1e12, "bandwidth_gb_s": ceilings.bandwidth / 1e9}
    candidates = _among(cuda_candidates(subject), providers)
    for batch in batches:
        inputs = [
            draw(batch, seed).to("cuda", precision.dtype, memory_format=torch.channels_last) for seed in INPUT_SEEDS
        ]
        works = workloads(subject.programs, precision, batch)
        floors = {level: floor_seconds(found, ceilings) for level, found in works.items()}
        rows = compare_candidates(candidates, subject, batch, inputs, CUDA_CLOCK, progress)
        yield _result("cuda", precision, facts, batch, describe(rows, batch, floors))


def _on_cpu(
    subject: Subject,
    draw: Callable[[int, int], Tensor],
    batches: Sequence[int],
    progress: Progress,
    providers: Sequence[str],
) -> Iterator[dict[str, Any]]:
    progress("calibrate 8 bits")
    quantised, threads = _quantised(subject.programs[QUANTISED_LEVEL], draw, progress), torch.get_num_threads()
    candidates = _among([*cpu_candidates(subject, threads), *int8_candidates(subject, quantised, threads)], providers)
    for batch in batches:
        inputs = [draw(batch, seed) for seed in INPUT_SEEDS]
        rows = compare_candidates(candidates, subject, batch, inputs, CPU_CLOCK, progress)
        yield _result("cpu", subject.precision, {"threads": threads}, batch, describe(rows, batch, {}))


def _quantised(
    program: FusedProgram, draw: Callable[[int, int], Tensor], progress: Progress
) -> dict[Scheme, QuantisedProgram]:
    """The program in 8 bits, as each runtime wants it."""
    pictures = InMemory(draw(WANTED_IMAGES, CALIBRATION_SEED).numpy())
    calibration = calibrate(split_addition(program.master), pictures, batch=program.batch, progress=progress)
    return quantised_programs(program, calibration.ranges, ())


def _result(
    device: str, precision: Precision, facts: Mapping[str, Any], batch: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {"device": device, "precision": precision.name, **facts, "batch": batch, "rows": rows}


@dataclass(frozen=True)
class Row:
    """What came of one candidate. True unless it failed; one that cannot run here has not.

    Attributes:
        name: the candidate's.
        level: the candidate's.
        seconds: of each timed run, empty where it was not timed.
        check: of its outputs, the worse of the two made before and after timing; None where it did not run.
        reason: why it was not timed, or why its times do not count.
        failed: whether its outputs were wrong or it broke down.
    """

    name: str
    level: str
    seconds: tuple[float, ...] = ()
    check: NetworkCheck | None = None
    reason: str = ""
    failed: bool = False

    def __bool__(self) -> bool:
        return not self.failed


def compare_candidates(
    candidates: Sequence[Candidate],
    subject: Subject,
    batch: int,
    inputs: Sequence[Tensor],
    clock: Clock,
    progress: Progress = silent,
) -> list[Row]:
    """Check every candidate, time those that are right, and check them again.

    Args:
        candidates: in the order of the rows returned.
        batch: images per run.
        inputs: batches on the device, in rotation.
        progress: called with the name of each step as it begins.
    """
    rows, runners = {}, {}
    with ExitStack() as stack:
        for candidate in candidates:
            progress(f"batch {batch}: prepare and check {candidate.name}")
            with ExitStack() as own:
                row, runner = _prepared(candidate, subject, batch, own)
                if runner is not None:
                    runners[candidate.name] = runner
                    stack.push(own.pop_all())
            rows[candidate.name] = row
        progress(f"batch {batch}: time {len(runners)} providers in {clock.rounds} rounds")
        seconds = measure(runners, inputs, clock)
        progress(f"batch {batch}: check again")
        for candidate in candidates:
            if candidate.name in runners:
                row = replace(rows[candidate.name], seconds=tuple(seconds[candidate.name]))
                again = check(runners[candidate.name], candidate, subject, batch, backwards=True)
                rows[candidate.name] = _checked(row, again)
    return list(rows.values())


def _prepared(candidate: Candidate, subject: Subject, batch: int, stack: ExitStack) -> tuple[Row, TimedRunner | None]:
    """What is known of a candidate before it is timed, and its runner, loaded in `stack`, where it is to be timed."""
    row = Row(candidate.name, candidate.level)
    try:
        runner = stack.enter_context(candidate.make(batch))
    except ExportError as error:  # not for this machine
        return replace(row, reason=first_line(error)), None
    except Exception as error:
        return _broken(row, error), None
    try:
        row = _checked(row, check(runner, candidate, subject, batch))
    except Exception as error:
        return _broken(row, error), None
    return row, runner if row else None


def _broken(row: Row, error: Exception) -> Row:
    """What one of them does must not cost the others their result."""
    kind = "" if isinstance(error, ExportError) else f"{type(error).__name__}: "
    return replace(row, reason=kind + first_line(error), failed=True)


def check(runner: Runner, candidate: Candidate, subject: Subject, batch: int, backwards: bool = False) -> NetworkCheck:
    """The worst of a runner's outputs on the parity images, in batches of the size that is timed.

    `backwards` gives the images in reverse order: an output left over from an earlier run differs.
    """
    r, order = candidate.references or subject.references, slice(None, None, -1 if backwards else 1)
    inputs = {name: values[order].copy() for name, values in r.inputs.items()}
    found = run_in_batches(runner.infer, inputs, Batch(batch, batch, batch), batch)
    outputs = {name: values[order] for name, values in found.items()}
    checks = compare(outputs, list(r.rounded.values()), r.oracle, candidate.factor, subject.precision.network_floor)
    return max(checks.values(), key=_severity)


def _checked(row: Row, found: NetworkCheck) -> Row:
    """A row with one more check; one that was refused has no times."""
    worse = found if row.check is None else max(row.check, found, key=_severity)
    if not found:
        when = "after timing: " if row.seconds else ""
        return replace(row, check=worse, reason=when + found.reason, failed=True, seconds=())
    return replace(row, check=worse)


def _severity(found: NetworkCheck) -> tuple[bool, float]:
    return not found, found.ratio


def describe(rows: Sequence[Row], batch: int, floors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every row in numbers, for JSON: milliseconds, images per second, and how many times as fast as others.

    Args:
        rows: the first is the eager model.
        floors: level -> seconds of the floor S.
    """
    medians = {row.name: statistics.median(row.seconds) for row in rows if row.seconds}
    eager = medians.get(rows[0].name)
    compiled = next((median for name, median in medians.items() if name.startswith(COMPILED)), None)
    records = []
    for row in rows:
        record: dict[str, Any] = {"provider": row.name, "batch": batch}
        record["status"] = "failed" if row.failed else "measured" if row.seconds else "not measured"
        record["reason"] = row.reason
        if row.check is not None:
            record["error"], record["error_ratio"] = finite(row.check.error), finite(row.check.ratio)
            record["error_limit"] = row.check.limit
        if row.seconds:
            low, median, high = (float(q) for q in np.quantile(row.seconds, QUANTILES))
            record |= {"runs": len(row.seconds), "median_ms": 1e3 * median, "p20_ms": 1e3 * low, "p80_ms": 1e3 * high}
            record["images_per_second"] = batch / median
            record["times_eager"] = eager / median if eager else None
            record["times_compiled"] = compiled / median if compiled else None
            if row.level in floors:
                record["floor_ms"] = 1e3 * floors[row.level]
                record["over_floor"] = median / floors[row.level]
        records.append(record)
    return records
