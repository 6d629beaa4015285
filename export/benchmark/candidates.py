"""The ways of running a network that a machine may have, to be compared."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.base.batch import INPUT, Batch
from export.base.errors import ExportError, first_line
from export.base.precision import INT8, PRECISIONS, Precision
from export.benchmark.runners import CompiledRunner, FusedRunner, GraphRunner, ModuleRunner
from export.criteria.references import run_references, run_simulations
from export.fusion.capture import eager_copy
from export.fusion.passes import DEFAULT_LEVEL, LEVELS
from export.fusion.program import FusedProgram, output_names
from export.lowering.onnx_file import lower_onnx
from export.quantisation.scheme import CPU
from export.runtime.engines.cuda_driver import start_driver
from export.runtime.engines.engine import FLAVOURS, Flavour, build_engine, why_not_buildable
from export.runtime.engines.runner import KernelRunner, TensorRTRunner
from export.runtime.onnx_session import OnnxRunner
from export.runtime.parity.ladder import ENGINE_FACTOR, References
from export.runtime.runner import Interface, TimedRunner

COMPILED = "torch.compile"
KERNEL_ENGINE = "kernel engine"
# What the names of candidates begin with.
PROVIDERS = ("eager", COMPILED, "onnxruntime", "ours", *(f"ours {level}" for level in LEVELS), KERNEL_ENGINE,
             *FLAVOURS)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """The network under comparison.

    Attributes:
        model: in eval mode.
        programs: level of fusion -> the fused program.
        precision: what all of them compute in.
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
        return cls(
            model, programs, precision, run_references(model, program, names, {INPUT: images.numpy()}, precision)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs, in order."""
        return tuple(self.references.oracle)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.programs[DEFAULT_LEVEL].image_shape

    def interface(self, batch: int) -> Interface:
        """Of the network at one batch size."""
        return Interface.of(self.names, {INPUT: self.image_shape}, Batch(batch, batch, batch))

    @functools.cached_property
    def onnx_file(self) -> bytes:
        """Of this project."""
        return _lowered(self.programs[DEFAULT_LEVEL], self.precision)


@dataclass(frozen=True)
class Candidate:
    """A way of running the network, which this machine may not have.

    Attributes:
        name: what the table calls it.
        make: batch size -> what runs it, not yet loaded; raises ExportError where it cannot run here.
        factor: k of the network criterion.
        level: of `workloads`, whose floor its time is compared with; empty for none.
        references: what it is compared with where that is not the subject's: a quantised network is held to the same
            network quantised and run in float32.
    """

    name: str
    make: Callable[[int], TimedRunner]
    factor: float
    level: str = ""
    references: References | None = None


def cpu_candidates(subject: Subject, threads: int) -> list[Candidate]:
    """The model as a user runs it comes first: what the others are compared with."""
    dtype, names, factor = subject.precision.dtype, subject.names, subject.precision.network_factor
    model = eager_copy(subject.model, dtype)
    channels_last = eager_copy(subject.model, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def x(batch: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        return torch.zeros(batch, *subject.image_shape, dtype=dtype).contiguous(memory_format=layout)

    @functools.cache
    def plain_file() -> bytes:
        batch = subject.programs[DEFAULT_LEVEL].batch
        return plain_onnx(model, x(min(2, batch.maximum)), batch, names)  # 2: torch.export takes a 1 for a fixed size

    def onnx(read: Callable[[], bytes]) -> Callable[[int], TimedRunner]:
        return lambda n: OnnxRunner(read, subject.interface(n), threads=threads)

    return [
        Candidate("eager", lambda n: ModuleRunner(model, x(n), names), factor),
        Candidate(
            "eager channels_last",
            lambda n: ModuleRunner(channels_last, x(n, torch.channels_last), names),
            factor,
        ),
        Candidate(COMPILED, lambda n: CompiledRunner(model, x(n), names), factor),
        Candidate("onnxruntime, plain export", onnx(plain_file), factor),
        Candidate("onnxruntime, our file", onnx(lambda: subject.onnx_file), factor),
    ]


def int8_candidate(subject: Subject, quantised: FusedProgram, threads: int) -> Candidate:
    """The file for ONNX Runtime in 8 bits; `quantised` is the program as it wants it."""

    @functools.cache
    def file() -> bytes:
        return _lowered(quantised, CPU.arithmetic)

    def make(batch: int) -> TimedRunner:
        return OnnxRunner(file, subject.interface(batch), threads=threads)

    references = run_simulations(subject.references, {"simulated": (quantised, PRECISIONS["fp32"])})
    return Candidate("onnxruntime, our int8 file", make, INT8.network_factor, references=references)


def cuda_candidates(subject: Subject) -> list[Candidate]:
    """The eager model, channels_last, comes first: what the others are compared with."""
    precision, names, factor = subject.precision, subject.names, subject.precision.network_factor
    layout = torch.channels_last
    model = eager_copy(subject.model, precision.dtype).to("cuda", memory_format=layout)  # type: ignore[call-overload]

    def x(batch: int) -> Tensor:
        zeros = torch.zeros(batch, *subject.image_shape, dtype=precision.dtype, device="cuda")
        return zeros.contiguous(memory_format=layout)

    def compiled(batch: int) -> TimedRunner:
        buffer = x(batch)
        torch._dynamo.mark_static_address(buffer)  # its CUDA graph reads it in place, as the others do
        return CompiledRunner(model, buffer, names, mode="max-autotune")

    def fused(level: str) -> Callable[[int], TimedRunner]:
        return lambda batch: FusedRunner(subject.programs[level], precision, batch, names)

    def engine(flavour: Flavour) -> Callable[[int], TimedRunner]:
        return lambda batch: _engine(flavour, subject, batch)

    return [
        Candidate("eager", lambda n: ModuleRunner(model, x(n), names), factor, "a"),
        Candidate("eager in a CUDA graph", lambda n: GraphRunner(model, x(n), names), factor, "a"),
        Candidate(f"{COMPILED} max-autotune", compiled, factor, "i"),
        *(Candidate(f"ours {level}", fused(level), factor, level) for level in subject.programs),
        Candidate(KERNEL_ENGINE, lambda n: _kernel_engine(subject, n), factor, DEFAULT_LEVEL),
        *(Candidate(name, engine(flavour), ENGINE_FACTOR) for name, flavour in FLAVOURS.items()),
    ]


def plain_onnx(model: nn.Module, images: Tensor, batch: Batch, names: Sequence[str]) -> bytes:
    """What torch alone makes of the unfused model, in the type of `images`; `names` of its outputs.

    Raises:
        ExportError: torch.onnx.export refuses the model.
    """
    dynamic = None if batch.static else ({0: torch.export.Dim("batch", min=batch.minimum, max=batch.maximum)},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported: Any = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                opset_version=18,
                dynamic_shapes=dynamic,
                verbose=False,
                input_names=[INPUT],
                output_names=list(names),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx.export: {first_line(error.__cause__ or error)}") from error
    content: bytes = exported.model_proto.SerializeToString()
    return content


def _lowered(program: FusedProgram, precision: Precision) -> bytes:
    return lower_onnx(program, precision, {}).serialize()


def _engine(flavour: Flavour, subject: Subject, batch: int) -> TimedRunner:
    """An engine for one batch size."""
    reason = why_not_buildable(flavour)
    if reason:
        raise ExportError(reason)
    static, inputs = Batch(batch, batch, batch), {INPUT: subject.image_shape}
    engine = build_engine(subject.onnx_file, flavour, subject.precision, static, inputs)
    return TensorRTRunner(engine, subject.interface(batch))


def _kernel_engine(subject: Subject, batch: int) -> TimedRunner:
    """The kernels of the default level, lowered for the GPU here and one batch size, by the driver alone."""
    from export.lowering.kernel_engine import lower_kernels  # imports Triton
    from kernels.launch import target_of

    start_driver()  # what is missing is said before anything is compiled
    try:
        target = target_of(torch.device("cuda"))
    except ValueError as error:
        raise ExportError(str(error)) from error
    static = Batch(batch, batch, batch)
    engine = lower_kernels(subject.programs[DEFAULT_LEVEL], subject.precision, target, static)
    return KernelRunner(engine.content, subject.interface(batch))
