"""Build TensorRT and TensorRT-RTX engines from an ONNX file: one path, since the two share their interface.

What an engine is and whether it runs here is asked without PyTorch too.
"""

from __future__ import annotations

import importlib
import logging
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from export.batch import Batch
from export.errors import ExportError, MissingDependency
from export.precision import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRT packages.

    Attributes:
        name: the word used on the command line, and the extra that installs it.
        module: what is imported.
        file_name: of the engine in a bundle.
        needs_gpu: whether building needs the target GPU on this machine.
    """

    name: str
    module: str
    file_name: str
    needs_gpu: bool


FLAVOURS = {
    "tensorrt": Flavour("tensorrt", "tensorrt", "model.trt.engine", needs_gpu=True),
    "tensorrt-rtx": Flavour("tensorrt-rtx", "tensorrt_rtx", "model.rtx.engine", needs_gpu=False),
}


@dataclass(frozen=True)
class Engine:
    """A serialised engine and how it came about.

    Attributes:
        plan: the bytes a TensorRT runtime deserialises.
        version: of the TensorRT package that built it; only that version runs it.
        convolutions: how many convolutions the network has, all proved to be of `precision`.
        seconds: what building took.
    """

    flavour: Flavour
    plan: bytes
    version: str
    precision: Precision
    convolutions: int
    seconds: float


def import_flavour(flavour: Flavour) -> ModuleType:
    """Import the flavour's package.

    Raises:
        MissingDependency: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(flavour.module)
    except ImportError as error:
        raise MissingDependency(flavour.module, flavour.name) from error


def why_not_buildable(flavour: Flavour) -> str | None:
    """Why this machine cannot build the flavour's engines, None where it can."""
    try:
        import_flavour(flavour)
    except MissingDependency as error:
        return str(error)
    if flavour.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU on the building machine; build on the device from model.onnx"
    return None


def why_not_runnable(engine: Engine) -> str:
    """Why this machine cannot run an engine, empty where it can: asked before the engine, which is code, is loaded."""
    try:
        installed = import_flavour(engine.flavour).__version__
    except MissingDependency as error:
        return str(error)
    if installed != engine.version:
        return f"built by {engine.flavour.name} {engine.version}, {installed} is installed: export again with it"
    try:
        import torch
    except ImportError:
        return "torch, which holds an engine's inputs on the GPU, is not installed"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU here"


def build_engine(
    onnx_bytes: bytes, flavour: Flavour, precision: Precision, batch: Batch, image_shape: tuple[int, int, int]
) -> Engine:
    """Build an engine whose precision is the ONNX file's, with one optimisation profile.

    Args:
        onnx_bytes: a serialised ONNX model with one input `input` [batch, C, H, W].
        precision: what every convolution must compute in; proved from the parsed network's types.
        batch: minimum, optimum and maximum of the profile.
        image_shape: (C, H, W).

    Raises:
        MissingDependency: the package is not installed.
        ExportError: the file does not parse, has another precision, or the builder fails; says why.
    """
    trt = import_flavour(flavour)
    started = time.perf_counter()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes):
        reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise ExportError(f"{flavour.name} cannot parse the ONNX file: {reason.splitlines()[0]}")
    convolutions = prove_precision(trt, network, precision)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((size, *image_shape) for size in (batch.minimum, batch.optimum, batch.maximum)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{flavour.name} {trt.__version__} could not build an engine: {logger.last_error}")
    return Engine(flavour, bytes(plan), trt.__version__, precision, convolutions, time.perf_counter() - started)


def prove_precision(trt: ModuleType, network: Any, precision: Precision) -> int:
    """Check that every convolution of a parsed, strongly typed network computes in `precision`.

    In a strongly typed network the types of the tensors are the types of the arithmetic, so an engine
    cannot fall back to another precision in silence.

    Returns:
        How many convolutions there are.

    Raises:
        ExportError: the network is not strongly typed, or a convolution has another type; names it.
    """
    if not network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        raise ExportError("expected a strongly typed network")
    expected = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}[precision.name]
    convolutions = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.CONVOLUTION:
            continue
        convolutions += 1
        types = {layer.get_input(0).dtype, layer.get_output(0).dtype}
        if types != {expected}:
            raise ExportError(f"{layer.name} would compute in {sorted(map(str, types))}: expected {expected}")
    return convolutions


def _logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Hands the builder's messages to `logging` and keeps the last error for the refusal."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = message.splitlines()[0]
            log.debug("%s", message)

    return Logger()
