"""Ways of running one network, side by side: each is held against the float64 model, then they take turns on the clock.

What is timed is one forward pass whose input is already where the provider reads it.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from export.batch import Arrays, Batch, run_in_batches
from export.capture import eager_copy
from export.cuda_graph import CudaGraphProgram
from export.errors import ExportError, first_line
from export.lowering.onnx_file import lower_onnx, output_names
from export.lowering.tensorrt_engine import FLAVOURS, Flavour, build_engine, import_flavour, why_not_buildable
from export.onnx_session import import_onnxruntime
from export.parity.ladder import References, run_references
from export.parity.network import NetworkCheck, compare, finite
from export.passes import DEFAULT_LEVEL
from export.pipeline import ENGINE_FACTOR
from export.precision import Precision
from export.program import FusedProgram
from export.runners import Runner
from export.workload import Work, eager_workload, fused_workload, pointwise_workload

QUANTILES = (0.2, 0.5, 0.8)
_COMPILED = "torch.compile"
_WARM_UP = 3  # runs; the compiler's CUDA graph is recorded in the second
_IDLE_SECONDS = 0.05  # after a run the threads of a CPU runtime spin for a while, which would slow the next one
_MATMUL_SIDE = 8192
_COPY_BYTES = 2**30


@dataclass(frozen=True)
class Subject:
    """The network under comparison.

    Attributes:
        model: in eval mode.
        programs: level of fusion -> the fused program.
        precision: what every provider computes in.
        references: the float64 model's outputs on the parity images, and those of the unfused operators.
    """

    model: nn.Module
    programs: Mapping[str, FusedProgram]
    precision: Precision
    references: References

    @classmethod
    def of(
        cls, model: nn.Module, programs: Mapping[str, FusedProgram], precision: Precision, images: Tensor
    ) -> Subject:
        """Run the references on `images`, float32 [N, C, H, W]."""
        program = programs[DEFAULT_LEVEL]
        names = output_names(program.graph_module)
        return cls(model, programs, precision, run_references(model, program, names, images.numpy(), precision))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs, in order."""
        return tuple(self.references.oracle)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.programs[DEFAULT_LEVEL].image_shape


class Provider(Runner):
    """One runtime holding the network at one batch size, its input in a place of its own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    @abstractmethod
    def load(self, x: Tensor) -> None:
        """Put a batch where `step` reads it."""

    @abstractmethod
    def step(self) -> Any:
        """One forward pass, returning its outputs; on a GPU it may return before the device is done."""

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        self.load(torch.from_numpy(inputs["input"]))
        return _named(self._names, self.step())


class ModuleProvider(Provider):
    """A module called on a tensor that stays where it is."""

    def __init__(self, module: Callable[[Tensor], Any], x: Tensor, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self._module, self._x = module, x

    def load(self, x: Tensor) -> None:
        self._x.copy_(x)

    def step(self) -> Any:
        with torch.inference_mode():
            return self._module(self._x)


class OnnxProvider(Provider):
    """An ONNX file in ONNX Runtime on the CPU, with its default optimisations."""

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, names: tuple[str, ...]) -> None:
        """Raises ExportError where ONNX Runtime is missing or does not take the file."""
        super().__init__(names)
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        try:
            self._session = runtime.InferenceSession(model, options, ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise ExportError(f"onnxruntime cannot load the file: {first_line(error)}") from error
        entry = self._session.get_inputs()[0]
        half = entry.type == "tensor(float16)"
        self._inputs = {entry.name: np.zeros(shape, np.float16 if half else np.float32)}

    def load(self, x: Tensor) -> None:
        for values in self._inputs.values():
            np.copyto(values, x.numpy(), casting="same_kind")

    def step(self) -> Any:
        return self._session.run(None, self._inputs)


class GraphProvider(Provider):
    """Work on the current CUDA stream, recorded as one CUDA graph."""

    def __init__(self, run: Callable[[], Any], x: Tensor, names: tuple[str, ...]) -> None:
        """Record `run`, which reads `x` and returns its outputs."""
        super().__init__(names)
        self._x = x
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # cuDNN looks for its algorithms before anything is recorded
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._outputs = run()

    def load(self, x: Tensor) -> None:
        self._x.copy_(x)

    def step(self) -> Any:
        self._graph.replay()
        return self._outputs


class FusedProvider(Provider):
    """This project's Triton kernels in their CUDA graph."""

    def __init__(self, program: FusedProgram, precision: Precision, batch: int, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self._program = CudaGraphProgram(program, precision)
        self._graph = self._program.capture(batch)

    def load(self, x: Tensor) -> None:
        """A call fills the graph's input, which nobody else can reach, and runs it once."""
        self._program(x)

    def step(self) -> None:
        self._graph.replay()

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        return _named(self._names, self._program(torch.from_numpy(inputs["input"]).cuda()))


def _named(names: tuple[str, ...], outputs: Any) -> Arrays:
    leaves = [torch.as_tensor(y) for y in pytree.tree_leaves(outputs)]
    arrays = [(y.float() if y.is_floating_point() else y).cpu().numpy() for y in leaves]
    return dict(zip(names, arrays, strict=True))


@dataclass(frozen=True)
class Candidate:
    """A way of running the network, which this machine may not have.

    Attributes:
        name: what the table calls it.
        make: batch size -> provider; raises ExportError where it cannot run here.
        factor: k of the network criterion.
        level: of `workloads`, whose floor its time is compared with; empty for none.
    """

    name: str
    make: Callable[[int], Provider]
    factor: float
    level: str = ""


def cpu_candidates(subject: Subject, threads: int) -> list[Candidate]:
    """The model as a user runs it comes first: what the others are compared with."""
    dtype, shape, names, factor = subject.precision.dtype, *_common(subject)
    model = eager_copy(subject.model, dtype)
    channels_last = eager_copy(subject.model, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def x(batch: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype).contiguous(memory_format=layout)

    @functools.cache
    def our_file() -> bytes:
        program = subject.programs[DEFAULT_LEVEL]
        return lower_onnx(program, torch.zeros(1, *shape), subject.precision, {}).serialize()

    @functools.cache
    def plain_file() -> bytes:
        batch = subject.programs[DEFAULT_LEVEL].batch
        return plain_onnx(model, x(min(2, batch.maximum)), batch)  # 2: torch.export takes a 1 for a fixed size

    def onnx(file: Callable[[], bytes]) -> Callable[[int], Provider]:
        return lambda batch: OnnxProvider(file(), (batch, *shape), threads, names)

    return [
        Candidate("eager", lambda n: ModuleProvider(model, x(n), names), factor),
        Candidate(
            "eager channels_last",
            lambda n: ModuleProvider(channels_last, x(n, torch.channels_last), names),
            factor,
        ),
        Candidate(_COMPILED, lambda n: _compiled(model, x(n), names), factor),
        Candidate("onnxruntime, plain export", onnx(plain_file), factor),
        Candidate("onnxruntime, our file", onnx(our_file), factor),
    ]


def cuda_candidates(subject: Subject) -> list[Candidate]:
    """The eager model, channels_last, comes first: what the others are compared with."""
    precision = subject.precision
    shape, names, factor = _common(subject)
    layout = torch.channels_last
    model = eager_copy(subject.model, precision.dtype).to("cuda", memory_format=layout)  # type: ignore[call-overload]

    def x(batch: int) -> Tensor:
        return torch.zeros(batch, *shape, dtype=precision.dtype, device="cuda").contiguous(memory_format=layout)

    def recorded(batch: int) -> Provider:
        buffer = x(batch)
        return GraphProvider(lambda: model(buffer), buffer, names)

    def compiled(batch: int) -> Provider:
        buffer = x(batch)
        torch._dynamo.mark_static_address(buffer)  # its CUDA graph reads it in place, as the others do
        return _compiled(model, buffer, names, mode="max-autotune")

    @functools.cache
    def our_file() -> bytes:
        return lower_onnx(subject.programs[DEFAULT_LEVEL], torch.zeros(1, *shape), precision, {}).serialize()

    def fused(level: str) -> Callable[[int], Provider]:
        return lambda batch: FusedProvider(subject.programs[level], precision, batch, names)

    def engine(flavour: Flavour) -> Callable[[int], Provider]:
        return lambda batch: _engine(flavour, our_file, precision, (batch, *shape), names)

    return [
        Candidate("eager", lambda n: ModuleProvider(model, x(n), names), factor, "a"),
        Candidate("eager in a CUDA graph", recorded, factor, "a"),
        Candidate(f"{_COMPILED} max-autotune", compiled, factor, "i"),
        *(Candidate(f"ours {level}", fused(level), factor, level) for level in subject.programs),
        *(Candidate(name, engine(flavour), ENGINE_FACTOR) for name, flavour in FLAVOURS.items()),
    ]


def _common(subject: Subject) -> tuple[tuple[int, ...], tuple[str, ...], float]:
    return subject.image_shape, subject.names, subject.precision.network_factor


def plain_onnx(model: nn.Module, images: Tensor, batch: Batch) -> bytes:
    """What torch alone makes of the unfused model, in the type of `images`.

    Raises:
        ExportError: torch.onnx.export refuses the model.
    """
    dynamic = None if batch.static else ({0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                model, (images,), dynamo=True, opset_version=18, dynamic_shapes=dynamic, verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx.export: {first_line(error.__cause__ or error)}") from error
    assert exported is not None
    content: bytes = exported.model_proto.SerializeToString()
    return content


def _compiled(model: nn.Module, x: Tensor, names: tuple[str, ...], mode: str = "default") -> Provider:
    """Compiled for the one shape of `x`."""
    torch.compiler.reset()  # what was compiled for another batch size neither counts as a limit nor stays in memory
    provider = ModuleProvider(torch.compile(model, mode=mode, dynamic=False), x, names)
    try:
        provider.step()
    except Exception as error:  # a compiler fails in many ways, a missing C++ compiler among them
        raise ExportError(first_line(error)) from error
    return provider


def _engine(
    flavour: Flavour,
    file: Callable[[], bytes],
    precision: Precision,
    shape: tuple[int, ...],
    names: tuple[str, ...],
) -> Provider:
    """An engine for one batch size in a CUDA graph, its float32 input and outputs on the device."""
    reason = why_not_buildable(flavour)
    if reason:
        raise ExportError(reason)
    batch, channels, height, width = shape
    built = build_engine(file(), flavour, precision, Batch(batch, batch, batch), (channels, height, width))
    trt = import_flavour(flavour)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(built.plan)
    if engine is None:
        raise ExportError(f"{flavour.name} cannot load the engine on {torch.cuda.get_device_name()}")
    context = engine.create_execution_context()
    x = torch.zeros(shape, device="cuda")
    context.set_input_shape("input", shape)
    outputs = [torch.full(tuple(context.get_tensor_shape(name)), float("nan"), device="cuda") for name in names]
    for name, tensor in zip(("input", *names), (x, *outputs), strict=True):
        context.set_tensor_address(name, tensor.data_ptr())

    def run() -> list[Tensor]:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExportError(f"{flavour.name} failed to run a batch of {batch}")
        return outputs

    return GraphProvider(run, x, names)


@dataclass(frozen=True)
class Clock:
    """How a device is timed.

    Attributes:
        turn: runs a provider so many times on inputs in rotation; returns the seconds of each run.
        rounds: turns of each provider.
        seconds: timed per provider, about.
    """

    turn: Callable[[Provider, Iterator[Tensor], int], list[float]]
    rounds: int
    seconds: float


def cpu_turn(provider: Provider, inputs: Iterator[Tensor], count: int) -> list[float]:
    """After a pause and a run that does not count, time `count` runs by the wall clock."""
    time.sleep(_IDLE_SECONDS)
    provider.load(next(inputs))
    provider.step()
    seconds = []
    for _ in range(count):
        provider.load(next(inputs))
        started = time.perf_counter()
        provider.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def cuda_turn(provider: Provider, inputs: Iterator[Tensor], count: int) -> list[float]:
    """Time `count` runs by CUDA events, each behind a run on the same input that does not count.

    While the device is busy with that one, the timed one is launched: its time is the device's, unless launching takes
    longer than running, as it does for an eager model and a small batch.
    """
    events = []
    for _ in range(count):
        provider.load(next(inputs))
        provider.step()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        provider.step()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


CPU_CLOCK = Clock(cpu_turn, rounds=10, seconds=3.0)
CUDA_CLOCK = Clock(cuda_turn, rounds=20, seconds=1.0)


def measure(providers: Mapping[str, Provider], inputs: Sequence[Tensor], clock: Clock) -> dict[str, list[float]]:
    """Seconds of every run: the providers take turns, and each round another one begins."""
    rotation = {name: itertools.cycle(inputs) for name in providers}
    counts = {}
    for name, provider in providers.items():
        once = statistics.median(clock.turn(provider, rotation[name], _WARM_UP))
        counts[name] = max(1, math.ceil(clock.seconds / clock.rounds / once))
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    order = deque(providers)
    for _ in range(clock.rounds):
        for name in order:
            seconds[name] += clock.turn(providers[name], rotation[name], counts[name])
        order.rotate(-1)
    return seconds


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


def compare_providers(
    candidates: Sequence[Candidate],
    subject: Subject,
    batch: int,
    inputs: Sequence[Tensor],
    clock: Clock,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Row]:
    """Check every candidate, time those that are right, and check them again.

    Args:
        candidates: in the order of the rows returned.
        batch: images per run.
        inputs: batches on the device, in rotation.
        progress: called with the name of each step as it begins.
    """
    rows, providers = {}, {}
    for candidate in candidates:
        progress(f"batch {batch}: prepare and check {candidate.name}")
        row = Row(candidate.name, candidate.level)
        try:
            provider = candidate.make(batch)
            row = _checked(row, check(provider, subject, batch, candidate.factor))
        except ExportError as error:
            row = replace(row, reason=first_line(error))
        except Exception as error:  # what one provider does must not cost the others their result
            row = replace(row, reason=f"{type(error).__name__}: {first_line(error)}", failed=True)
        rows[candidate.name] = row
        if row.check is not None and row:
            providers[candidate.name] = provider
    progress(f"batch {batch}: time {len(providers)} providers in {clock.rounds} rounds")
    seconds = measure(providers, inputs, clock)
    progress(f"batch {batch}: check again")
    for candidate in candidates:
        if candidate.name in providers:
            row = replace(rows[candidate.name], seconds=tuple(seconds[candidate.name]))
            again = check(providers[candidate.name], subject, batch, candidate.factor, backwards=True)
            rows[candidate.name] = _checked(row, again)
    return list(rows.values())


def check(provider: Provider, subject: Subject, batch: int, factor: float, backwards: bool = False) -> NetworkCheck:
    """The worst of a provider's outputs on the parity images, in batches of the size that is timed.

    `backwards` gives the images in reverse order: an output left over from an earlier run differs.
    """
    r, order = subject.references, slice(None, None, -1 if backwards else 1)
    found = run_in_batches(provider.infer, r.images[order].copy(), Batch(batch, batch, batch), batch)
    outputs = {name: values[order] for name, values in found.items()}
    checks = compare(outputs, (r.eager, r.folded), r.oracle, factor, subject.precision.network_floor)
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
    compiled = next((median for name, median in medians.items() if name.startswith(_COMPILED)), None)
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
