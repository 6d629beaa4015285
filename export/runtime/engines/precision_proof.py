"""The proof that a parsed network computes in the precision asked for, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from export.base.errors import ExportError
from export.base.precision import Precision

_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8"}
_KEPT_TYPES = {"fp16": "FLOAT", "bf16": "FLOAT", "int8": "HALF"}


@dataclass(frozen=True)
class Proof:
    """What was proved of a network.

    Attributes:
        types: convolution or product with weights -> the type it computes in, as TensorRT calls it.
        convolutions: how many of them are convolutions.
        layers: every layer of the network: name, type, types of inputs and outputs.
    """

    types: Mapping[str, str]
    convolutions: int
    layers: list[dict[str, Any]] = field(repr=False)


def prove_precision(trt: ModuleType, network: Any, precision: Precision, kept: Collection[str] = ()) -> Proof:
    """Check that every convolution and every product with weights computes in `precision`.

    In a strongly typed network the types of the tensors are the types of the arithmetic, so an engine cannot
    fall back to another precision in silence. int8 is asked for by Q/DQ: input and weights are dequantised int8.

    Args:
        network: strongly typed, as parsed from an ONNX file.
        kept: layers that compute in a wider type: in fp16 where the precision is int8, else in fp32.

    Raises:
        ExportError: the network is not strongly typed, or a layer computes in another type; names it.
    """
    if not network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        raise ExportError("expected a strongly typed network")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(k).name: layer for layer in layers for k in range(layer.num_outputs)}
    weighted = [layer for layer in layers if _has_weights(trt, layer, producers)]
    unknown = sorted(set(kept) - {layer.name for layer in weighted})
    if unknown:
        raise ExportError(f"{unknown[0]} is to be kept in a wider type, but the network has no such layer")
    types = {}
    for layer in weighted:
        types[layer.name] = (_KEPT_TYPES if layer.name in kept else _TYPES)[precision.name]
        if types[layer.name] == "INT8":
            _check_int8(trt, layer, producers)
        else:
            _check_float(trt, layer, types[layer.name], producers)
    convolutions = sum(layer.type == trt.LayerType.CONVOLUTION for layer in weighted)
    return Proof(types, convolutions, [_record(layer) for layer in layers])


def _has_weights(trt: ModuleType, layer: Any, producers: Mapping[str, Any]) -> bool:
    if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION):
        return True
    if layer.type != trt.LayerType.MATRIX_MULTIPLY:
        return False
    return any(_constant(trt, tensor, producers) for tensor in _inputs(layer))


def _constant(trt: ModuleType, tensor: Any, producers: Mapping[str, Any]) -> bool:
    """Whether a tensor comes from a constant alone."""
    while (producer := producers.get(tensor.name)) is not None:
        if producer.type == trt.LayerType.CONSTANT:
            return True
        if producer.num_inputs == 0:
            return False
        tensor = producer.get_input(0)
    return False


def _check_float(trt: ModuleType, layer: Any, expected: str, producers: Mapping[str, Any]) -> None:
    types = {layer.get_output(0).dtype.name} | {tensor.dtype.name for tensor in _inputs(layer)}
    if types != {expected}:
        raise ExportError(f"{layer.name} would compute in {' and '.join(sorted(types))}: expected {expected}")
    for tensor in _inputs(layer)[1:]:
        if _dequantised(trt, tensor, producers):
            raise ExportError(f"{layer.name} would compute in INT8, its weights are quantised: expected {expected}")


def _check_int8(trt: ModuleType, layer: Any, producers: Mapping[str, Any]) -> None:
    """Input and weights must be fp16 that was dequantised from int8, which a Q or a constant gave."""
    inputs = _inputs(layer)
    for name, tensor in zip(("input", "weights"), [*inputs, None], strict=False):
        dequantise = tensor is not None and _dequantised(trt, tensor, producers)
        source = dequantise.get_input(0) if dequantise else None
        origin = producers.get(source.name) if source is not None else None
        if (
            source is None
            or origin is None
            or origin.type not in (trt.LayerType.QUANTIZE, trt.LayerType.CONSTANT)
            or source.dtype != trt.DataType.INT8
            or tensor.dtype != trt.DataType.HALF
        ):
            found = "no Q/DQ" if source is None else f"{source.dtype.name} dequantised to {tensor.dtype.name}"
            raise ExportError(
                f"{layer.name} would not compute in INT8: expected INT8 dequantised to HALF for its {name}, got {found}"
            )


def _dequantised(trt: ModuleType, tensor: Any, producers: Mapping[str, Any]) -> Any:
    """The DQ layer that gives a tensor, None where another does."""
    producer = producers.get(tensor.name)
    return producer if producer is not None and producer.type == trt.LayerType.DEQUANTIZE else None


def _inputs(layer: Any) -> list[Any]:
    tensors = [layer.get_input(k) for k in range(layer.num_inputs)]
    return [tensor for tensor in tensors if tensor is not None]


def _record(layer: Any) -> dict[str, Any]:
    inputs = [tensor.dtype.name for tensor in _inputs(layer)]
    outputs = [layer.get_output(k).dtype.name for k in range(layer.num_outputs)]
    return {"name": layer.name, "type": layer.type.name, "inputs": inputs, "outputs": outputs}
