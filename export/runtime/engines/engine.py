"""Build TensorRT and TensorRT-RTX engines from an ONNX file: one path, since the two share their interface.

What an engine is and whether it runs here is asked without PyTorch, and neither package is run in this process.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from export.base.batch import Batch
from export.base.errors import ExportError, MissingDependency
from export.base.precision import Precision
from export.base.process import run_in_child
from export.runtime.engines.cuda_runtime import compute_capability, gpu_name, why_no_gpu
from export.runtime.engines.options import DEFAULT_ENGINE, DEFAULT_TARGETS, TARGETS, EngineConfig
from export.runtime.onnx_wire import refuse_external_data

_BUILDER = "export.runtime.engines.build_worker"
_FULL_LEVERS = ("EngineConfig.workspace_mib", "EngineConfig.optimization_level")  # TensorRT's, of its memory
_MIB = 2**20
_REMEDY = "build one here: build_on_device(BUNDLE)"


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRT packages.

    Attributes:
        name: the word used on the command line, and the extra that installs it.
        module: what is imported.
        file_name: of the engine in a bundle.
        layers_name: of the list of its layers beside it.
        needs_gpu: whether building needs the target GPU on this machine.
        inspects: whether what was built can be looked at where it was built, kernel by kernel.
    """

    name: str
    module: str
    file_name: str
    layers_name: str
    needs_gpu: bool
    inspects: bool


FLAVOURS = {
    "tensorrt": Flavour(
        "tensorrt", "tensorrt", "model.trt.engine", "model.trt.layers.json", needs_gpu=True, inspects=True
    ),
    "tensorrt-rtx": Flavour(
        "tensorrt-rtx", "tensorrt_rtx", "model.rtx.engine", "model.rtx.layers.json", needs_gpu=False, inspects=False
    ),
}


@dataclass(frozen=True)
class Engine:
    """A serialised engine and how it came about.

    Attributes:
        plan: the bytes a TensorRT runtime deserialises.
        version: of the TensorRT package that built it; only that version runs it, unless `config` says otherwise.
        convolutions: how many convolutions the network has, all proved to be of `precision`.
        seconds: what building took.
        config: how it was built.
        layers: name and types of each layer: of the kernels where the flavour shows them, else of the network as
            parsed. Empty for an engine read from a bundle.
        gpu: that it was built on and for; empty where it was built without one.
    """

    flavour: Flavour
    plan: bytes
    version: str
    precision: Precision
    convolutions: int
    seconds: float
    config: EngineConfig = DEFAULT_ENGINE
    layers: tuple[Mapping[str, Any], ...] = ()
    gpu: str = ""


def import_flavour(flavour: Flavour) -> ModuleType:
    """Import the flavour's package.

    Raises:
        MissingDependency: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(flavour.module)
    except ImportError as error:
        raise MissingDependency(flavour.module, flavour.name, error) from error


def why_not_buildable(flavour: Flavour, dla_core: int | None = None) -> str:
    """Why this machine cannot build the flavour's engines, for its accelerator if asked; empty where it can."""
    try:
        import_flavour(flavour)
    except MissingDependency as error:
        return str(error)
    if flavour.needs_gpu and why_no_gpu(flavour.name):
        return f"builds on the GPU it is for; build on the device from model.onnx: {why_no_gpu(flavour.name)}"
    if dla_core is not None:
        cores = run_in_child("counting accelerators", "", f"{_BUILDER}:count_dla_cores", flavour)
        if dla_core >= cores:
            found = f"this device has {cores} deep-learning accelerators that TensorRT can use"
            return f"EngineConfig.dla_core={dla_core}: {found}"
    return ""


def why_not_runnable(engine: Engine) -> str:
    """Why this machine cannot run an engine, empty where it can: asked before the engine, which is code, is loaded."""
    try:
        installed = import_flavour(engine.flavour).__version__
    except MissingDependency as error:
        return str(error)
    if installed != engine.version and not (engine.config.version_compatible and _follows(installed, engine.version)):
        return f"built by {engine.flavour.name} {engine.version}, {installed} is installed; {_REMEDY}"
    return why_no_gpu(engine.flavour.name) or _why_other_gpu(engine)


def _why_other_gpu(engine: Engine) -> str:
    """Why an engine is not for the GPU here, empty where it is."""
    flavour, here = engine.flavour, gpu_name(engine.flavour.name)
    if engine.config.hardware_compatible:
        served, built = compute_capability(flavour.name) >= (8, 0), "for GPUs from Ampere on"
    else:
        served, built = engine.gpu in ("", here), f"on {engine.gpu}"
    if not served:
        return f"built {built}, here is {here}; {_REMEDY}"
    return "" if flavour.needs_gpu else why_not_served(flavour, engine.config.targets)


def why_not_served(flavour: Flavour, targets: Sequence[str] = ()) -> str:
    """Why engines that need no GPU to be built, if for `targets`, do not run on the GPU here; empty where they do.

    By default they also run on what is newer than all of TARGETS.
    """
    major, minor = compute_capability(flavour.name)
    target, here = f"sm_{major}{minor}", gpu_name(flavour.name)
    newer = 10 * major + minor > max(int(known.removeprefix("sm_")) for known in TARGETS)
    served = targets or DEFAULT_TARGETS
    if target in served or (newer and not targets):
        return ""
    if target not in TARGETS and not newer:
        return f"{flavour.name} does not serve the GPU here: {here}"
    remedy = "without EngineConfig.targets" if newer else f"with EngineConfig.targets=({target!r},)"
    return f"built for {', '.join(served)}, here is {here}; export again {remedy}"


def _follows(installed: str, built: str) -> bool:
    """Whether a version is a later one of the same major version."""
    later, earlier = ([int(part) for part in version.split(".") if part.isdecimal()] for version in (installed, built))
    return later[:1] == earlier[:1] and later >= earlier


def build_engine(
    onnx_bytes: bytes,
    flavour: Flavour,
    precision: Precision,
    batch: Batch,
    inputs: Mapping[str, tuple[int, ...]],
    config: EngineConfig = DEFAULT_ENGINE,
    kept: Collection[str] = (),
    levers: Sequence[str] = (),
    otherwise: str = "",
) -> Engine:
    """Build an engine whose precision is the ONNX file's, with one optimisation profile, in a process of its own.

    Args:
        onnx_bytes: a serialised ONNX model.
        precision: what every convolution and every product with weights must compute in; proved from the parsed
            network's types and, where the flavour shows them, from the kernels that were chosen.
        batch: minimum, optimum and maximum of the profile.
        inputs: name in the file -> shape without the batch.
        config: how to build it.
        kept: layers, by the names of their ONNX nodes, that compute in a wider type: in fp16 where the precision is
            int8, else in fp32.
        levers: what to lower where the process dies or runs out of memory, beside what the flavour has for that.
        otherwise: what to do instead of lowering them.

    Raises:
        MissingDependency: the package is not installed.
        ExportError: the file does not parse, keeps weights elsewhere or has another precision, or the builder fails or
            dies; says why. The workspace is too small for the weights, where those count.
    """
    import_flavour(flavour)
    refuse_external_data(onnx_bytes)
    if config.workspace_mib is not None and not flavour.needs_gpu and config.workspace_mib * _MIB < len(onnx_bytes):
        raise ExportError(too_small_workspace(config.workspace_mib, flavour, len(onnx_bytes)))
    task, target = f"building the {flavour.name} engine", f"{_BUILDER}:build"
    arguments = (onnx_bytes, flavour, precision, batch, inputs, config, frozenset(kept))
    advice = _what_to_lower([*levers, *(_FULL_LEVERS if flavour.needs_gpu else ())], otherwise)
    engine: Engine = run_in_child(task, advice, target, *arguments)
    return replace(engine, gpu=gpu_name(flavour.name)) if flavour.needs_gpu else engine


def too_small_workspace(given_mib: int, flavour: Flavour, weights: int) -> str:
    """What to say of a workspace that a flavour fills with `weights` bytes before any kernel has some."""
    mib = -(-weights // _MIB)
    return (
        f"EngineConfig.workspace_mib={given_mib}: too little for {flavour.name}, which counts the weights in, "
        f"{mib} MiB: expected about twice that and 16 more, EngineConfig.workspace_mib={2 * mib + 16}, or none"
    )


def _what_to_lower(levers: Sequence[str], otherwise: str) -> str:
    lower = f"lower {' or '.join(filter(None, (', '.join(levers[:-1]), levers[-1])))}" if levers else ""
    return ", or ".join(filter(None, (lower, otherwise)))
