"""The ways of running a network that a machine may have, to be compared."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.base.batch import Batch
from export.base.errors import ExportError, first_line
from export.base.precision import INT8, PRECISIONS, Precision
from export.benchmark.providers import (
    EngineProvider,
    FusedProvider,
    GraphProvider,
    ModuleProvider,
    OnnxProvider,
    Provider,
)
from export.criteria.references import run_references, run_simulations
from export.fusion.capture import eager_copy
from export.fusion.passes import DEFAULT_LEVEL
from export.fusion.program import FusedProgram, output_names
from export.lowering.onnx_file import lower_onnx
from export.quantisation.scheme import CPU
from export.runtime.engines.engine import FLAVOURS, Flavour, build_engine, why_not_buildable
from export.runtime.parity.ladder import ENGINE_FACTOR, References

COMPILED = "torch.compile"


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


@dataclass(frozen=True)
class Candidate:
    """A way of running the network, which this machine may not have.

    Attributes:
        name: what the table calls it.
        make: batch size -> provider; raises ExportError where it cannot run here.
        factor: k of the network criterion.
        level: of `workloads`, whose floor its time is compared with; empty for none.
        references: what it is compared with where that is not the subject's: a quantised network is held to the same
            network quantised and run in float32.
    """

    name: str
    make: Callable[[int], Provider]
    factor: float
    level: str = ""
    references: References | None = None


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
        Candidate(COMPILED, lambda n: _compiled(model, x(n), names), factor),
        Candidate("onnxruntime, plain export", onnx(plain_file), factor),
        Candidate("onnxruntime, our file", onnx(our_file), factor),
    ]


def int8_candidate(subject: Subject, quantised: FusedProgram, threads: int) -> Candidate:
    """The file for ONNX Runtime in 8 bits; `quantised` is the program as it wants it."""

    @functools.cache
    def file() -> bytes:
        return lower_onnx(quantised, torch.zeros(1, *subject.image_shape), CPU.arithmetic, {}).serialize()

    def make(batch: int) -> Provider:
        return OnnxProvider(file(), (batch, *subject.image_shape), threads, subject.names)

    references = run_simulations(subject.references, {"simulated": (quantised, PRECISIONS["fp32"])})
    return Candidate("onnxruntime, our int8 file", make, INT8.network_factor, references=references)


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
        Candidate(f"{COMPILED} max-autotune", compiled, factor, "i"),
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
    """An engine for one batch size."""
    reason = why_not_buildable(flavour)
    if reason:
        raise ExportError(reason)
    batch, channels, height, width = shape
    built = build_engine(file(), flavour, precision, Batch(batch, batch, batch), (channels, height, width))
    return EngineProvider(built, names)
