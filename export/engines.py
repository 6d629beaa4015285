"""What is built of a program for a device, engines of TensorRT and of this project's kernels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from export.base.batch import Arrays, Batch
from export.base.errors import ExportError
from export.base.normalisation import Normalisation
from export.base.precision import FORMATS, PRECISIONS, Precision
from export.base.progress import Progress
from export.config import AUTO, ExportConfig
from export.runtime.engines.engine import Engine, Flavour, build_engine
from export.runtime.engines.kernel_engine import why_not_here
from export.runtime.engines.runner import KernelRunner
from export.runtime.parity.ladder import Execution, attempt
from export.runtime.parity.rungs import Rung
from export.runtime.runner import Interface
from kernels.configs.targets import TARGETS, Target

if TYPE_CHECKING:
    from export.fusion.program import FusedProgram
    from export.lowering.kernel_engine import KernelEngine


def build_engines(
    flavours: Sequence[Flavour],
    onnx_bytes: bytes,
    config: ExportConfig,
    inputs: Mapping[str, tuple[int, ...]],
    kept: Collection[str],
    progress: Progress,
) -> list[Engine]:
    """Build an engine of each flavour; `kept` as in `build_engine`, which raises what this raises."""
    engines = []
    for flavour in flavours:
        progress(f"build the {flavour.name} engine")
        precision, options = FORMATS[config.precision], config.engine_config
        levers, otherwise = ("ExportConfig.batch",), "export with ExportConfig.engine='none'"
        engines.append(
            build_engine(onnx_bytes, flavour, precision, config.batch, inputs, options, kept, levers, otherwise)
        )
    return engines


def choose_targets(config: ExportConfig, skipped: dict[str, str]) -> list[Target]:
    """The architectures to make kernel engines for; why there is none is added to `skipped`.

    Raises:
        ExportError: the installed Triton does not compile for an architecture that was asked for.
    """
    if not config.kernels:
        return []
    from kernels.compile import version_reason  # imports Triton, which `config` has found
    from kernels.launch import target_of

    if config.kernels == AUTO:
        if not torch.cuda.is_available():
            skipped["kernel"] = "there is no GPU here: name architectures, such as ExportConfig.kernels=('sm_87',)"
            return []
        try:
            return [target_of(torch.device("cuda"))]
        except ValueError as error:
            skipped["kernel"] = str(error)
            return []
    targets = [TARGETS[name] for name in config.kernels]
    if reasons := [reason for target in targets if (reason := version_reason(target))]:
        raise ExportError(f"ExportConfig.kernels: {'; '.join(reasons)}")
    return targets


def build_kernels(
    targets: Sequence[Target],
    program: FusedProgram,
    config: ExportConfig,
    skipped: dict[str, str],
    progress: Progress,
    normalisation: Normalisation | None = None,
) -> list[KernelEngine]:
    """A kernel engine for each architecture for which the network can have one; `skipped` gets why one cannot."""
    engines = []
    for target in targets:
        from export.lowering.kernel_engine import lower_kernels  # imports Triton, which `choose_targets` has found

        progress(f"compile the kernels for {target.name}")
        try:
            precision = PRECISIONS[config.precision]
            engines.append(lower_kernels(program, precision, target, config.batch, normalisation))
        except ExportError as error:
            skipped[f"{target.name} kernel"] = str(error)
    return engines


def prove_kernels(
    engine: KernelEngine, interface: Interface, precision: Precision, given: Arrays, batch: Batch, progress: Progress
) -> Execution | Rung:
    """What a kernel engine computes where the GPU here is its own, else what the emulator finds of some blocks."""
    if why_not_here(engine.content, engine.target.name):
        from export.criteria.kernel_blocks import emulated_rung  # imports Triton, as whatever made the engine has

        progress(f"emulate blocks of {engine.name}")
        return emulated_rung(engine, given, batch)
    progress(f"run {engine.name}")
    return attempt(kernel_runner(engine, interface), "", precision, given, batch)


def kernel_runner(engine: KernelEngine, interface: Interface) -> KernelRunner:
    """What runs it, under its name in the report."""
    runner = KernelRunner(engine.content, interface)
    runner.name, runner.file = f"kernels {engine.target.name}", engine.name
    return runner
