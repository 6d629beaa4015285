"""What the process that builds an engine does: parse, prove, build, and look at what was built."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from export.base.batch import Batch
from export.base.errors import ExportError
from export.base.precision import Precision
from export.runtime.engines.engine import Engine, Flavour, import_flavour, too_small_workspace
from export.runtime.engines.inspector import Kernel, prove_kernels, read_kernels
from export.runtime.engines.loader import load_engine, make_logger
from export.runtime.engines.options import EngineConfig
from export.runtime.engines.precision_proof import prove_precision
from export.runtime.engines.shape_proof import prove_shapes

_MIB = 2**20
_SHORT_OF_WORKSPACE = re.compile(r"OutOfMemory|within workspace limit")


def build(
    onnx_bytes: bytes,
    flavour: Flavour,
    precision: Precision,
    batch: Batch,
    inputs: Mapping[str, tuple[int, ...]],
    config: EngineConfig,
    kept: Collection[str],
) -> Engine:
    """What `tensorrt_engine.build_engine` describes, in the process at hand."""
    trt = import_flavour(flavour)
    started = time.perf_counter()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes):
        raise ExportError(f"{flavour.name} cannot parse the ONNX file: {_why_not_parsed(parser)}")
    prove_shapes(network, onnx_bytes)
    proof = prove_precision(trt, network, precision, kept)
    options = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        profile.set_shape(name, *((size, *shape) for size in (batch.minimum, batch.optimum, batch.maximum)))
    options.add_optimization_profile(profile)
    options.clear_flag(trt.BuilderFlag.TF32)  # fp32 means float32
    if flavour.inspects:
        options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _configure(trt, options, config)
    if config.dla_core is not None:
        _use_dla(trt, options, network, proof.types, config.dla_core)
    cache = _timing_cache(options, config.timing_cache) if config.timing_cache else None
    serialised = builder.build_serialized_network(network, options)
    if serialised is None:
        said = f"{flavour.name} {trt.__version__} could not build an engine: {logger.last_error}"
        if config.workspace_mib is not None and not flavour.needs_gpu and _SHORT_OF_WORKSPACE.search(said):
            said = f"{too_small_workspace(config.workspace_mib, flavour, len(onnx_bytes))} ({said})"
        raise ExportError(said)
    plan = bytes(serialised)
    if cache is not None and config.timing_cache:
        _write(config.timing_cache, bytes(cache.serialize()))
    layers = proof.layers
    if flavour.inspects:
        kernels = _kernels(trt, logger, plan, config, {name: (batch.optimum, *shape) for name, shape in inputs.items()})
        prove_kernels(kernels, proof.types, dla=config.dla_core is not None)
        layers = [kernel.to_json() for kernel in kernels]
    seconds = time.perf_counter() - started
    return Engine(flavour, plan, trt.__version__, precision, proof.convolutions, seconds, config, tuple(layers))


def _why_not_parsed(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    failure = parser.get_error(0)
    node = f"{failure.node_name()} ({failure.node_operator()}): " if failure.node_name() else ""
    return f"{node}{failure.desc().splitlines()[0]}"


def count_dla_cores(flavour: Flavour) -> int:
    """How many deep-learning accelerators this device has that TensorRT can use."""
    trt = import_flavour(flavour)
    return int(trt.Builder(make_logger(trt)).num_DLA_cores)


def _configure(trt: ModuleType, options: Any, config: EngineConfig) -> None:
    if config.workspace_mib is not None:
        options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mib * _MIB)
    if config.optimization_level is not None:
        options.builder_optimization_level = config.optimization_level
    if config.version_compatible:
        options.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.hardware_compatible:
        options.hardware_compatibility_level = level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.hardware_compatibility_level != level:  # what cannot be done is ignored in silence
            raise ExportError(f"EngineConfig.hardware_compatible: {trt.__version__} builds for this GPU alone")
    if config.targets:
        options.num_compute_capabilities = len(config.targets)
        for index, target in enumerate(config.targets):
            capability = trt.ComputeCapability.__members__.get(target.replace("sm_", "SM"))
            if capability is None or not options.set_compute_capability(capability, index):
                raise ExportError(f"EngineConfig.targets: TensorRT-RTX {trt.__version__} does not build for {target}")


def _use_dla(trt: ModuleType, options: Any, network: Any, types: Collection[str], core: int) -> None:
    """Give the accelerator what it can do; that must include every layer with weights."""
    options.default_device_type = trt.DeviceType.DLA
    options.DLA_core = core
    if options.DLA_core != core:  # what cannot be done is ignored in silence
        raise ExportError(f"EngineConfig.dla_core={core}: {trt.__version__} has no such deep-learning accelerator")
    options.set_flag(trt.BuilderFlag.GPU_FALLBACK)  # casts and the pooling to one pixel
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name in types and not options.can_run_on_DLA(layer):
            raise ExportError(f"EngineConfig.dla_core: {layer.name} cannot run on the deep-learning accelerator")


def _timing_cache(options: Any, path: Path) -> Any:
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ExportError(f"EngineConfig.timing_cache: {path} cannot be read: {error.strerror}") from error
    cache = options.create_timing_cache(content)
    if cache is None or not options.set_timing_cache(cache, False):
        raise ExportError(
            f"EngineConfig.timing_cache: {path} is not of this device and this version of TensorRT; remove it"
        )
    return cache


def _write(path: Path, content: bytes) -> None:
    """In one step: another build may be reading it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ExportError(f"EngineConfig.timing_cache: {path} cannot be written: {error.strerror}") from error


def _kernels(
    trt: ModuleType, logger: Any, plan: bytes, config: EngineConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[Kernel]:
    """What the engine inspector shows for inputs of `shapes`, without which types may be hidden."""
    _runtime, engine = load_engine(trt, logger, plan, config)
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is None or not all(context.set_input_shape(name, shape) for name, shape in shapes.items()):
        raise ExportError(f"the engine cannot be looked at: {logger.last_error}")
    inspector.execution_context = context
    return read_kernels(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
