"""What several files of this room need and is slow to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from export import Batch
from tests.export import digits


@pytest.fixture(scope="session")
def network(trained_digits: tuple[nn.Module, torch.Tensor]) -> nn.Module:
    return trained_digits[0]


def swap_classes(model: onnx.ModelProto) -> None:
    """Exchanges the logits of 3 and 8."""
    for tensor in model.graph.initializer:
        if tensor.name in ("fc.weight", "fc.bias"):
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[[3, 8]] = values[[8, 3]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def add_engine(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    facts = {"flavour": "tensorrt", "version": "10.9", "convolutions": 21, "build_seconds": 1.0, "gpu": None}
    manifest["engines"]["model.trt.engine"], files["model.trt.engine"] = facts, b"no plan"


@pytest.fixture(scope="session")
def bundles(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundles of the network that reads digits, each named by what it is. Tests copy what they change."""
    folder, program = tmp_path_factory.mktemp("bundles"), digits.fused(network)
    for precision in ("fp32", "fp16", "bf16"):
        digits.write(program, folder / precision, precision)
    digits.write(digits.fused(network, Batch(7, 7, 7)), folder / "static")
    digits.rewrite(folder / "fp32", folder / "swapped", digits.change_onnx(swap_classes))
    digits.rewrite(folder / "fp32", folder / "engine", add_engine)
    content = (folder / "fp32" / "model.onnx").read_bytes()
    changed = digits.rewrite(folder / "fp32", folder / "changed", lambda manifest, files: None)
    (changed / "model.onnx").write_bytes(content[:-9] + b"\0" + content[-8:])
    return folder
