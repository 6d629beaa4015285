"""Files that keep tensors elsewhere are told from their bytes, wherever in the file the tensor is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from export import ExportError
from export.runtime.onnx_wire import refuse_external_data


def graph(*nodes: onnx.NodeProto, **more: Any) -> onnx.GraphProto:
    return helper.make_graph(nodes, "graph", [], [], **more)


def function(value: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"], value=value)
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph(), functions=[helper.make_function("own", "f", [], ["y"], [node], opset)])


def branch(value: onnx.TensorProto) -> onnx.ModelProto:
    inner = graph(helper.make_node("Constant", [], ["y"], value=value))
    return helper.make_model(graph(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=graph())))


def sparse(value: onnx.TensorProto) -> onnx.ModelProto:
    indices = onnx.numpy_helper.from_array(np.arange(3), "indices")
    return helper.make_model(graph(sparse_initializer=[helper.make_sparse_tensor(value, indices, [9])]))


PLACES: dict[str, Callable[[onnx.TensorProto], onnx.ModelProto]] = {
    "initialiser": lambda value: helper.make_model(graph(initializer=[value])),
    "branch": branch,
    "function": function,
    "sparse": sparse,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_elsewhere_is_refused(place: str) -> None:
    value = onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")
    refuse_external_data(PLACES[place](value).SerializeToString())
    value.external_data.add(key="location", value="w.bin")
    with pytest.raises(ExportError, match="keeps tensors in other files"):
        refuse_external_data(PLACES[place](value).SerializeToString())


@pytest.mark.parametrize("content", [b"\x3a", b"\x3a\x7f\x00", b"\x0b\x00", b"\xff" * 20], ids=bytes.hex)
def test_what_is_no_message_is_refused(content: bytes) -> None:
    with pytest.raises(ExportError, match="expected an ONNX file"):
        refuse_external_data(content)
