"""What to export and how."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec

from export.base.batch import DEFAULT_BATCH, FLOAT32, UINT8, Batch, as_batch
from export.base.errors import ExportError, MissingDependency
from export.base.precision import FORMATS, INT8
from export.quantisation.methods import DEFAULT_METHOD, METHODS
from export.runtime.engines.engine import FLAVOURS, Flavour, why_not_buildable
from export.runtime.engines.options import DEFAULT_ENGINE, EngineConfig
from export.runtime.parity.network import PROBABILITIES, SCORES, VALUES

AUTO = ("auto",)  # in place of the layers to keep: the fewest that do
OUTPUTS = ("auto", SCORES, PROBABILITIES, VALUES)
INPUTS = (FLOAT32, UINT8)


@dataclass(frozen=True, init=False)
class ExportConfig:
    """What to export.

    Attributes:
        precision: `fp32`, `fp16`, `bf16` or `int8`.
        batch: the batch sizes the artefacts accept; given as one, as (minimum, optimum, maximum) or as one static size.
        engine: `none`, `tensorrt`, `tensorrt-rtx`, or `auto` for each that can be built here.
        engine_config: how engines are built.
        calibration_method: int8 only; one of `export.quantisation.methods.METHODS`.
        keep_fp16: int8 only; layers, or modules that hold them, to keep in floating point: float16 for TensorRT,
            float32 for CPUs. `auto`, which is AUTO here, finds the fewest with which the accuracy is retained.
        layer_costs: int8 only; measure what each layer costs on its own, which takes about half a run of the network
            for each. It is measured unasked where accuracy is lost, and where `auto` above has layers to choose.
        keep_fp32: fp16 and bf16 only; layers, or modules that hold them, to keep in float32. `auto` finds the fewest
            with which the network is equal to the eager model.
        outputs: what the outputs are: `scores` of classes, whose top-1 may not change, `values`, or `auto` to find out;
            `probabilities` puts a softmax behind the scores, which are the model's only output.
        unverified: write a bundle, marked as such, where nothing is wrong but the evidence is too weak for a verdict.
        quick: compare on the fewest images that the evidence allows, in batches of no more; every operator is checked
            all the same, and the bundle says that it was exported so.
        kernels: the architectures to make kernel engines for, of `kernels.configs.targets.TARGETS`; `auto`, which is
            AUTO here, is that of the GPU of this machine.
        input: what the artefacts take: `float32`, what the model computes with, or `uint8`, pictures as bytes
            [N, H, W, C], which they normalise themselves by the mean and std of `metadata`'s preprocessing.
        features: names of modules whose outputs the artefacts return in place of the model's, such as
            ("layer2", "layer3", "layer4") for a detector's neck; none for the model's own.
    """

    precision: str
    batch: Batch
    engine: str
    engine_config: EngineConfig
    calibration_method: str
    keep_fp16: tuple[str, ...]
    layer_costs: bool
    keep_fp32: tuple[str, ...]
    outputs: str
    unverified: bool
    quick: bool
    kernels: tuple[str, ...]
    input: str
    features: tuple[str, ...]

    def __init__(
        self,
        precision: str = "fp32",
        batch: Batch | tuple[int, int, int] | int = DEFAULT_BATCH,
        engine: str = "auto",
        engine_config: EngineConfig = DEFAULT_ENGINE,
        calibration_method: str = DEFAULT_METHOD,
        keep_fp16: Collection[str] = (),
        keep_fp32: Collection[str] = (),
        outputs: str = "auto",
        unverified: bool = False,
        kernels: Collection[str] = (),
        input: str = FLOAT32,
        features: Collection[str] = (),
        quick: bool = False,
        layer_costs: bool = False,
    ) -> None:
        """Raises ExportError for values that no export has, and for what another precision takes."""
        if precision not in FORMATS:
            raise ExportError(f"expected a precision of {', '.join(FORMATS)}, got {precision!r}")
        if calibration_method not in METHODS:
            expected = ", ".join(METHODS)
            raise ExportError(f"expected a calibration method of {expected}, got {calibration_method!r}")
        if layer_costs and precision != INT8.name:
            wanted = f"ExportConfig.precision={INT8.name!r}"
            raise ExportError(f"ExportConfig.layer_costs is for {wanted}, got ExportConfig.precision={precision!r}")
        if outputs not in OUTPUTS:
            raise ExportError(f"expected outputs of {', '.join(OUTPUTS)}, got {outputs!r}")
        if outputs == PROBABILITIES and features:
            raise ExportError(
                f"ExportConfig.outputs={outputs!r} is for the model's own output, got ExportConfig.features"
            )
        if input not in INPUTS:
            raise ExportError(f"expected an input of {', '.join(INPUTS)}, got {input!r}")
        if engine not in ("auto", "none", *FLAVOURS):
            raise ExportError(f"expected an engine of auto, none, {', '.join(FLAVOURS)}, got {engine!r}")
        narrowed = {
            "precision": precision,
            "batch": as_batch(batch),
            "engine": engine,
            "engine_config": engine_config,
            "calibration_method": calibration_method,
            "keep_fp16": _kept("keep_fp16", keep_fp16, precision, (INT8.name,)),
            "keep_fp32": _kept("keep_fp32", keep_fp32, precision, ("fp16", "bf16")),
            "outputs": outputs,
            "unverified": unverified,
            "quick": quick,
            "kernels": _targets(kernels, precision),
            "input": input,
            "features": _features(features),
            "layer_costs": layer_costs,
        }
        for name, value in narrowed.items():
            object.__setattr__(self, name, value)


def _kept(name: str, layers: Collection[str], precision: str, precisions: Collection[str]) -> tuple[str, ...]:
    """The layers to keep in a wider type, or AUTO.

    Raises:
        ExportError: the precision is none of those with such layers; a string, or `auto` beside names.
    """
    field = f"ExportConfig.{name}"
    if layers and precision not in precisions:
        wanted = " and ".join(f"ExportConfig.precision={name!r}" for name in precisions)
        raise ExportError(f"{field} is for {wanted}, got ExportConfig.precision={precision!r}")
    if isinstance(layers, str):
        if layers and layers not in AUTO:
            raise ExportError(f"{field}: expected auto or a tuple of names, got {layers!r}")
        return AUTO if layers else ()
    if set(AUTO) <= set(layers) and tuple(layers) != AUTO:
        raise ExportError(f"{field}: expected auto or names, got both: {' '.join(layers)}")
    return tuple(layers)


def _features(names: Collection[str]) -> tuple[str, ...]:
    """Raises ExportError for a string, which is no collection of names, and for a name that is given twice."""
    if isinstance(names, str):
        raise ExportError(f"ExportConfig.features: expected a tuple of names of modules, got {names!r}")
    if len(set(names)) < len(names):
        raise ExportError(f"ExportConfig.features: expected each module once, got {' '.join(names)}")
    return tuple(names)


def _targets(names: Collection[str], precision: str) -> tuple[str, ...]:
    """The architectures of kernel engines, or AUTO.

    Raises:
        ExportError: one that is not known, or twice; `auto` beside others; a precision that no kernel has.
        MissingDependency: Triton is not installed.
    """
    found = (names,) if isinstance(names, str) else tuple(names)
    if not found:
        return ()
    if precision == INT8.name:
        raise ExportError(f"ExportConfig.kernels is for fp32, fp16 and bf16, got ExportConfig.precision={precision!r}")
    if find_spec("triton") is None:
        raise MissingDependency("triton", "export", ModuleNotFoundError(name="triton"))
    if found == AUTO:
        return AUTO
    from kernels.configs.targets import REFUSED, TARGETS  # imports PyTorch, which the rest of this does without

    for name in found:
        if name not in TARGETS:
            expected = f"expected auto or some of {', '.join(TARGETS)}"
            raise ExportError(f"ExportConfig.kernels={name!r}: {REFUSED.get(name, expected)}")
    if len(set(found)) < len(found):
        raise ExportError(f"ExportConfig.kernels: expected each architecture once, got {' '.join(found)}")
    return found


def choose_flavours(config: ExportConfig) -> tuple[list[Flavour], dict[str, str]]:
    """The flavours to build, and why the others are not: name -> reason.

    Raises:
        ExportError: one that was asked for, or an option of engines, is not to be had here.
    """
    asked = config.engine_config
    if config.engine == "none":
        if asked.given:
            raise ExportError(f"{', '.join(asked.given)}: expected an engine to build, got ExportConfig.engine='none'")
        return [], {}
    reasons = {}
    for name, flavour in FLAVOURS.items():
        if config.engine in ("auto", name):
            why_not = asked.why_not(name, config.precision, config.batch)
            reasons[name] = why_not or why_not_buildable(flavour, asked.dla_core)
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if config.engine in skipped or (asked.given and skipped.keys() == reasons.keys()):
        raise ExportError("; ".join(f"ExportConfig.engine={name!r}: {reason}" for name, reason in skipped.items()))
    return [FLAVOURS[name] for name in reasons if name not in skipped], skipped
