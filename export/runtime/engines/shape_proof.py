"""The proof that a parsed network has the shapes of the ONNX file, layer by layer."""

from __future__ import annotations

from typing import Any

from export.base.errors import ExportError
from export.runtime.onnx_wire import value_shapes


def prove_shapes(network: Any, onnx_bytes: bytes) -> None:
    """Check that every value has the shape that the exported model gives it.

    Runtimes differ in how many windows a pooling has, or in what a resize rounds: an engine of other shapes would
    compute something else, in 16 bits without being noticed where no GPU is here to run it.

    Args:
        network: as parsed from the file.
        onnx_bytes: the file, whose values have the names of the network's tensors. Of a value without a shape, or with
            a size that is not known before it runs, nothing is asked, nor of the batch.

    Raises:
        ExportError: a layer has another shape; names it, with both.
    """
    shapes = value_shapes(onnx_bytes)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for k in range(layer.num_outputs):
            tensor = layer.get_output(k)
            expected, got = shapes.get(tensor.name), _shape(tensor)
            if expected is None or got is None:
                continue
            if len(got) != len(expected) or any(
                None not in (m, n) and m != n for m, n in zip(got, expected, strict=True)
            ):
                raise ExportError(
                    f"{layer.name} ({layer.type.name}) would give {tensor.name} the shape {_words(got)}: "
                    f"expected {_words(expected)}, as in the ONNX file"
                )


def _shape(tensor: Any) -> tuple[int | None, ...] | None:
    """Of a tensor of TensorRT, with None for a size that it does not know; None where it does not know the rank."""
    try:
        return tuple(size if size >= 0 else None for size in tensor.shape)
    except ValueError:  # of a rank below 0
        return None


def _words(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('N' if size is None else str(size) for size in shape)}]"
