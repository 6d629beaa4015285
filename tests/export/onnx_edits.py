"""Changes to ONNX files, made on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Edit = Callable[[onnx.ModelProto], Any]


def edited(model: onnx.ModelProto, edit: Edit) -> onnx.ModelProto:
    """A changed copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    edit(copy)
    return copy


def change(model: onnx.ModelProto, name: str, changed: Callable[[NDArray], NDArray]) -> None:
    """Replace an initialiser by what `changed` makes of it, which must be something else."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    before = numpy_helper.to_array(tensor)
    after = changed(before.copy()).astype(before.dtype)
    assert after.shape == before.shape and not np.array_equal(after, before)
    tensor.CopyFrom(numpy_helper.from_array(after, name))


def setting(index: Any, value: Callable[[NDArray], Any]) -> Callable[[NDArray], NDArray]:
    """For `change`: values of which some are replaced."""

    def changed(values: NDArray) -> NDArray:
        values[index] = value(values)
        return values

    return changed


def producer(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    """The node that computes a value; one without a type where none does."""
    return next((node for node in model.graph.node if value in node.output), onnx.NodeProto())


def bypass(model: onnx.ModelProto, node: onnx.NodeProto, source: str) -> None:
    """Take a node out: its readers read `source`."""
    model.graph.node.remove(node)
    for reader in model.graph.node:
        reader.input[:] = [source if name == node.output[0] else name for name in reader.input]
