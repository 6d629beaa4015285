"""What TensorRT's engine inspector says of the kernels it chose, and whether they compute in the types asked for.

Two forms are read. In TensorRT 10 a tensor has one field `Format/Datatype`, such as `Row major linear FP16 format` or
`Half`; 11 has `Datatype` and `Format`. Where shapes vary a type may be missing; a kernel's weights have a type of
their own, and the name of its tactic says what it multiplies.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.base.errors import ExportError

log = logging.getLogger(__name__)

_WORDS = (  # in the order they are looked for: `bfloat16` holds `float16`, `float16` holds `float`
    ("BF16", r"bfloat16|bf16"),
    ("HALF", r"float16|fp16|half"),
    ("FP8", r"fp8"),
    ("FLOAT", r"fp32|float"),
    ("INT8", r"\bint8"),
)
_TACTIC_WORDS = {"i8": "INT8", "f16": "HALF", "bf16": "BF16", "f32": "FLOAT"}
_TACTIC_PAIR = re.compile(r"_(i8|bf16|f16|f32)(?:i8|bf16|f16|f32)_(tf32)?")
_PRODUCT = re.compile(r"conv|gemm|matrixmultiply|fullyconnected", re.IGNORECASE)
_PRODUCT_TACTIC = re.compile(r"fprop|gemm|xmma", re.IGNORECASE)
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_MYELIN_SUFFIX = re.compile(r"_myl\d+(_\d+)?$")


@dataclass(frozen=True)
class Kernel:
    """One step of an engine.

    Attributes:
        kind: TensorRT's word for it: `CaskConvolution`, `Reformat`, `gemm`.
        layers: names of the layers of the network it computes, as far as the inspector tells.
        inputs: types of the tensors it reads, None where the inspector does not tell.
        outputs: those of the tensors it writes.
        weights: the type of its weights, None where it has none or they are not shown.
        tactic: the name of the implementation.
        product: whether it multiplies with weights: a convolution or a matrix product.
    """

    name: str
    kind: str
    layers: frozenset[str]
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    weights: str | None
    tactic: str
    product: bool

    @property
    def on_dla(self) -> bool:
        """Whether the deep-learning accelerator runs it."""
        return "DLA" in self.kind

    @property
    def types(self) -> set[str]:
        """What it computes in or may compute in, by the best evidence there is; empty where there is none.

        The weights' type, else the types it reads, and in floating point also those it writes: a cast at its start or
        end and an addition may have become part of it. The tactic's name is the last resort.
        """
        pair = _TACTIC_PAIR.search(self.tactic)
        if pair and pair.group(2):
            return {"TF32"}
        if self.weights:
            return {self.weights}
        found = {kind for kind in self.inputs if kind}
        if "INT8" not in found:
            found |= {kind for kind in self.outputs if kind and kind != "INT8"}
        return found or ({_TACTIC_WORDS[pair.group(1)]} if pair else set())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.kind,
            "layers": sorted(self.layers),
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "weights": self.weights,
            "tactic": self.tactic,
        }


def read_kernels(text: str) -> list[Kernel]:
    """Read what `get_engine_information` returns as JSON for an engine built with detailed profiling.

    Raises:
        ExportError: it is of another form, or has names only.
    """
    try:
        record = json.loads(text)
        layers = record["Layers"] if isinstance(record, Mapping) else record
        return [_kernel(layer) for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the engine inspector's answer is not understood ({type(error).__name__}: {error})"
        ) from error


def prove_kernels(kernels: Sequence[Kernel], types: Mapping[str, str], dla: bool = False) -> None:
    """Check that every kernel computes in the type proved for the layers it came from.

    Args:
        kernels: of the engine, from `read_kernels`.
        types: layer -> type, from `prove_precision`.
        dla: whether every one of those layers must run on the deep-learning accelerator.

    Raises:
        ExportError: a kernel computes in another type, or a layer does not run where it was asked to; names it.
    """
    if dla and not any(kernel.on_dla for kernel in kernels):
        raise ExportError("EngineConfig.dla_core: nothing of the engine runs on the deep-learning accelerator")
    shown = 0
    for kernel in kernels:
        if not kernel.product or kernel.on_dla:
            continue
        if dla:
            raise ExportError(f"EngineConfig.dla_core: {kernel.name} runs on the GPU")
        named = kernel.layers & types.keys()
        expected = {types[name] for name in named} if named else set(types.values())
        shown += bool(kernel.types)
        if kernel.types and not _allowed(kernel.types, expected, bool(named)):
            found = " and ".join(sorted(kernel.types))
            wanted = " and ".join(sorted(expected))
            raise ExportError(f"the kernel {kernel.name} computes in {found}: expected {wanted}")
    if not shown and not dla:
        log.warning(
            "the engine inspector shows no types of convolutions: their precision is proved by the network alone"
        )


def _allowed(found: set[str], expected: set[str], named: bool) -> bool:
    """A kernel of known layers must have the type of each of them; one of unknown layers any type that occurs."""
    return expected <= found if named else bool(expected & found)


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    name, kind, tactic = str(layer["Name"]), str(layer["LayerType"]), str(layer.get("TacticName", ""))
    product = bool(_PRODUCT.search(kind)) or layer.get("ParameterType") == "Convolution"
    weights = layer.get("Weights")
    return Kernel(
        name,
        kind,
        frozenset(_layers(name, str(layer.get("Metadata", "")))),
        tuple(_tensor_type(tensor) for tensor in layer.get("Inputs") or ()),
        tuple(_tensor_type(tensor) for tensor in layer.get("Outputs") or ()),
        _type(str(weights["Type"])) if isinstance(weights, Mapping) and weights.get("Count") else None,
        tactic,
        product or bool(_PRODUCT_TACTIC.search(tactic)),
    )


def _layers(name: str, metadata: str) -> Iterable[str]:
    yield from _METADATA.findall(metadata)
    for part in name.split(" + "):
        yield _MYELIN_SUFFIX.sub("", part)


def _tensor_type(tensor: Mapping[str, Any]) -> str | None:
    return _type(str(tensor.get("Format/Datatype") or tensor.get("Datatype", "")))


def _type(words: str) -> str | None:
    """The name of the type in a description such as `Channel major FP16 format where channel % 8 == 0`."""
    return next((name for name, pattern in _WORDS if re.search(pattern, words, re.IGNORECASE)), None)
