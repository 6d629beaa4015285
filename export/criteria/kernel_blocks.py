"""P1 of a kernel engine without its GPU: some blocks of each launch, executed by the emulator on real activations."""

from __future__ import annotations

from export.base.batch import Batch, Inputs, resized
from export.criteria.beyond_weights import rms_limit
from export.lowering.kernel_emulation import LaunchCheck, check_launches
from export.lowering.kernel_engine import KernelEngine
from export.runtime.parity.checks import WRONG, Fault, OperatorCheck, OperatorChecks
from export.runtime.parity.rungs import Rung
from kernels.rounding import MAX_RMS_Z, MAX_Z


def emulated_rung(engine: KernelEngine, inputs: Inputs, batch: Batch) -> Rung:
    """What the emulator finds of the smallest batch, and of the kernels that only the optimal one launches.

    Other batch sizes have tables of their own, of the same kernels. A launch with an instruction that the emulator does
    not know counts as not executed, and is listed among what was not checked.
    """
    name, runtime = f"kernels {engine.target.name}", f"triton {engine.plan['compilers']['triton']}"
    found: list[LaunchCheck] = []
    for size in sorted({batch.minimum, batch.optimum}):
        seen = {check.step.code for check in found}
        new = frozenset({step.code for step in engine.schedules[size].steps} - seen)
        if new:
            found += check_launches(engine, size, resized(inputs, size), new if seen else None)
    unknown = {check.step.call.layer: check.unknown.partition(".")[0] for check in found if check.unknown}
    checks = tuple(_checked(check) for check in found if not check.unknown)
    if not checks:
        why = f"the emulator does not know {', '.join(dict.fromkeys(unknown.values()))}"
        return Rung(name, runtime, engine.precision.name, engine.name, not_run=why)
    left = tuple(f"{layer} ({family})" for layer, family in unknown.items())
    blocks = sum(check.blocks for check in found), sum(check.grid for check in found)
    return Rung(
        name, runtime, engine.precision.name, engine.name, operators=OperatorChecks(checks, left), emulated=blocks
    )


def _checked(check: LaunchCheck) -> OperatorCheck:
    deviation, dtype = check.deviation, check.step.tensors["y_ptr"].dtype
    failures, limit, fault = [*check.failures], MAX_RMS_Z, None
    if deviation is not None:
        limit = rms_limit(deviation.active)
        failures += deviation.failures(dtype, limit)
        if failures:
            fault = Fault(WRONG, deviation.where, deviation.got, deviation.expected)
    return OperatorCheck(
        name=check.step.call.layer,
        kind=check.step.launch.problem.operator,
        rms_z=float("inf") if deviation is None else deviation.rms_z,
        max_z=float("inf") if deviation is None else deviation.max_z,
        rms_limit=limit,
        max_limit=MAX_Z[dtype],
        reason=failures[0] if failures else "",
        fault=fault,
    )
