"""What a GPU can do at most, and how long a network would take at that."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from export.base.precision import Precision
from export.benchmark.workload import Work, eager_workload, fused_workload, pointwise_workload
from export.fusion.program import FusedProgram

_MATMUL_SIDE = 8192
_COPY_BYTES = 2**30


def workloads(programs: Mapping[str, FusedProgram], precision: Precision, batch: int) -> dict[str, list[Work]]:
    """The kernels of one forward pass at every level.

    a: eager; i: a vendor's convolutions, each followed by one pointwise kernel; then the levels of fusion.
    """
    return {
        "a": eager_workload(programs["b"], precision, batch),
        "i": pointwise_workload(programs["b"], precision, batch),
        **{level: fused_workload(program, precision, batch) for level, program in programs.items()},
    }


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: multiplications and additions per second, and bytes per second read and written."""

    flops: float
    bandwidth: float


def measure_ceilings(precision: Precision) -> Ceilings:
    """A large matrix product of random numbers in `precision`, and a large copy, on the current CUDA device."""
    side, (a, b) = _MATMUL_SIDE, torch.randn(2, _MATMUL_SIDE, _MATMUL_SIDE, device="cuda").to(precision.dtype)
    product = torch.empty_like(a)
    source = torch.randn(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    flops = 2 * side**3 / _device_seconds(lambda: torch.mm(a, b, out=product))
    return Ceilings(flops, 2 * _COPY_BYTES / _device_seconds(lambda: target.copy_(source)))


def _device_seconds(run: Callable[[], object]) -> float:
    """Median of 20 runs by CUDA events, after 5 that do not count."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(26)]
    for event in events:
        event.record()
        run()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events[5:]))


def floor_seconds(works: Sequence[Work], ceilings: Ceilings) -> float:
    """S: no sequence of these kernels is faster. The sum over kernels of max(flops / peak, bytes / bandwidth)."""
    return sum(
        max(work.flops / ceilings.flops, (work.activation_bytes + work.weight_bytes) / ceilings.bandwidth)
        for work in works
    )
