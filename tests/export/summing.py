"""Bundles of a network that sums each channel of its input, in fp16, written without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from export.runtime.bundle.folder import FORMAT, publish, staged
from export.runtime.bundle.golden import GOLDEN_FILE, save_golden
from export.runtime.onnx_session import ONNX_FILE
from export.runtime.parity.ladder import References


def network(name: str) -> bytes:
    """An ONNX file; another name is another file."""
    kernel = numpy_helper.from_array(np.ones((3, 1, 4, 4), np.float16), "kernel")
    nodes = [
        helper.make_node("Cast", ["input"], ["narrow"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["narrow", "kernel"], ["sums"], group=3),
        helper.make_node("Flatten", ["sums"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["output"], to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 4, 4])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, name, [x], [y], [kernel])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def golden() -> bytes:
    images = np.random.default_rng(0).normal(size=(16, 3, 4, 4)).astype(np.float32)
    oracle = images.astype(np.float64).sum((2, 3))
    eager = images.astype(np.float16).astype(np.float64).sum((2, 3)).astype(np.float16).astype(np.float32)
    return save_golden(References({"input": images}, {"eager": {"output": eager}}, {"output": oracle}))


def write(path: Path, name: str = "first", **facts: Any) -> Path:
    """A bundle; `facts` go into its manifest."""
    manifest = {
        "format": FORMAT,
        "model": {},
        "precision": "fp16",
        "batch": {"min": 1, "opt": 4, "max": 8},
        "inputs": [{"name": "input", "shape": ["batch", 3, 4, 4], "dtype": "float32"}],
        "outputs": [{"name": "output", "shape": ["batch", 3]}],
        "kept": [],
        "engines": {},
        **facts,
    }
    with staged(path) as staging:
        publish(staging, path, {ONNX_FILE: network(name), GOLDEN_FILE: golden()}, manifest)
    return path
