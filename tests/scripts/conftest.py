"""What several files of this room need and is slow to make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from export import Batch
from tests.export import digits


@pytest.fixture(scope="session")
def network(trained_digits: tuple[nn.Module, torch.Tensor]) -> nn.Module:
    return trained_digits[0]


@pytest.fixture(scope="session")
def bundles(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundles of the network that reads digits, each named by what it is. Tests copy what they change."""
    folder, program = tmp_path_factory.mktemp("bundles"), digits.fused(network)
    for precision in ("fp32", "fp16", "bf16"):
        digits.write(program, folder / precision, precision)
    digits.write(digits.fused(network, Batch(7, 7, 7)), folder / "static")
    digits.write(digits.fused(digits.with_swapped_classes(network)), folder / "swapped")
    digits.rewrite(folder / "fp32", folder / "engine", digits.add_engine("model.trt.engine", "tensorrt", "10.9"))
    content = (folder / "fp32" / "model.onnx").read_bytes()
    changed = digits.rewrite(folder / "fp32", folder / "changed", lambda manifest, files: None)
    (changed / "model.onnx").write_bytes(content[:-9] + b"\0" + content[-8:])
    return folder
