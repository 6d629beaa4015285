"""Named modules' outputs in place of the model's: what they are, how far apart their cells lie, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load
from torch import Tensor, nn

from export import ExportConfig, ExportError, ExportResult, fuse, open_bundle, verify_bundle
from export.fusion.features import strides, with_features
from export.quantisation.calibration import InMemory
from export.runtime.artefacts import running_first
from export.runtime.bundle.golden import save_golden
from export.runtime.parity.ladder import References
from resnet.models import create_model
from tests.export import digits
from tests.export.networks import Called
from tests.scripts.loading import ROOT, refusal, run_here

pytestmark = pytest.mark.usefixtures("captured_once")

WANTED = ("layer3", "layer1.0.bn1")  # not in the order of forward; ReLUs follow a bn1 in place


@torch.no_grad()
def by_hand(model: Any, images: Tensor) -> dict[str, Tensor]:
    x = F.relu(model.bn1(model.conv1(images)))
    normalised = model.layer1[0].bn1(model.layer1[0].conv1(x))
    return {"layer3": model.layer3(model.layer2(model.layer1(x))), "layer1.0.bn1": normalised}


@pytest.mark.parametrize("settings", [{"precision": "fp32"}, {"input": "uint8"}, {"precision": "int8"}], ids=str)
def test_a_bundle_returns_what_the_modules_do(
    settings: dict[str, Any], trained_digits: tuple[nn.Module, Tensor], export: Callable[..., ExportResult]
) -> None:
    model, images = trained_digits
    given, more = images, {}
    if "input" in settings:
        given = ((images * 0.4 + 0.31) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    if settings.get("precision") == "int8":
        more["calibration"] = InMemory(images[:4].repeat(25, 1, 1, 1).numpy())
    result = export(images=given, features=WANTED, **settings, **more)
    assert result and all(verify_bundle(result.output)), result.report.verdict
    assert result.strides == {"layer3": (4, 4), "layer1.0.bn1": (1, 1)}
    bundle = open_bundle(result.output)
    entries = bundle.manifest["outputs"]
    assert [(entry["name"], entry["shape"][1:], entry["stride"], entry["kind"]) for entry in entries] == [
        ("layer3", [64, 4, 4], [4, 4], "values"),
        ("layer1.0.bn1", [16, 16, 16], [1, 1], "values"),
    ]
    checked = result.report.to_json()["rungs"][-1]["outputs"]
    assert (
        checked.keys() == set(WANTED) and "a cell for 4 \u00d7 4 pixels" in (result.output / "report.html").read_text()
    )
    with running_first(bundle) as (_, infer):
        outputs = infer(given.numpy())
    for name, right in by_hand(model, images).items():
        error = np.linalg.norm(outputs[name] - right.numpy()) / right.norm().item()
        assert error < {"fp32": 1e-5, "int8": 5e-2}.get(settings.get("precision", ""), 3e-3), name
    assert (outputs["layer1.0.bn1"] < 0).any(), "what follows in place is in it"
    stored = {tensor.name for tensor in onnx.load(result.output / "model.onnx").graph.initializer}
    assert any(name.startswith("layer3.0.conv1.weight") for name in stored)
    assert not any(name.startswith("fc") for name in stored)
    assert not any(hasattr(module, "_forward_hooks") and module._forward_hooks for module in model.modules())


def test_with_the_scores_among_them_accuracy_is_measured(export: Callable[..., ExportResult]) -> None:
    result = export(features=("fc", "layer2"), labelled=digits.held_out())
    assert result and len(result.report.accuracy) == 3 and open_bundle(result.output).class_count == 10
    with pytest.raises(ExportError, match=r"got ExportConfig.features='layer2' first, of shape \['batch', 32, 8, 8\]"):
        export(features=("layer2", "fc"), labelled=digits.held_out())


class Maps(nn.Module):
    """Ways of making maps, of an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, (2, 1), 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.average = nn.AvgPool2d(2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.up, self.wide, self.sum = nn.ConvTranspose2d(8, 8, 2, 2), nn.Upsample(scale_factor=2), nn.Identity()
        self.turned = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(self.stem(x))
        small = self.average(self.dilated(pooled))
        summed: Tensor = self.sum(small * self.gate(small))
        cut = pooled[:, :, : 2 * small.shape[2], : 2 * small.shape[3]]
        self.turned(summed.transpose(2, 3))
        return torch.cat([self.up(summed), self.wide(small), cut], 1)


def test_strides_are_those_of_the_operators_not_a_ratio_of_sizes() -> None:
    names = ("stem", "pool", "dilated", "average", "sum", "up", "wide", "gate", "turned")
    found = strides(fuse(with_features(Maps().eval(), names), torch.zeros(1, 3, 33, 45)).source)
    four, eight = (4, 2), (8, 4)
    expected = {"stem": (2, 1), "pool": four, "dilated": four, "average": eight, "sum": eight, "up": four, "wide": four}
    assert found == expected  # a gate has no cells, and of turned ones nobody knows


def test_of_large_outputs_few_are_golden() -> None:
    maps = np.zeros((16, 2**20), np.float32)
    several = References({"input": maps[:, :4]}, {"eager": {"a.b": maps}}, {"a.b": maps})
    assert {len(values) for values in load(save_golden(several)).values()} == {4}


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (("layr2",), "no module is called 'layr2'; expected one of the model's, such as layer2"),
    "itself": (("",), "no module is called ''"),
    "twice": (("layer1.0.relu",), "layer1.0.relu is called more than once in forward"),
    "unused": (("spare",), "forward does not call spare"),
    "a tuple": (("fc.pair",), "fc.pair returns a tuple: expected a module that returns a tensor"),
    "text": ("layer2", "expected a tuple of names of modules, got 'layer2'"),
    "repeated": (("layer2", "layer2"), "expected each module once, got layer2 layer2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_output_of_a_module_is_refused(case: str, export: Callable[..., ExportResult]) -> None:
    names, message = REFUSED[case]
    model = create_model("resnet8", in_channels=1).eval()
    model.spare = nn.ReLU()
    pair = Called(lambda x, m: (x, x))
    model.fc = Called(lambda x, m: m.pair(m.linear(x))[0], linear=model.fc, pair=pair)  # type: ignore[assignment]
    with pytest.raises(ExportError, match=f"ExportConfig.features: .*{message}"):
        export(model=model.eval(), features=names)


def test_the_flag(tmp_path: Any) -> None:
    weights = ROOT / "resnet" / "checkpoints" / "resnet20-digits.safetensors"
    command = ("export", "--weights", weights, "--engine", "none", "--batch", "1:2:4", "--output", tmp_path / "b")
    said = run_here(*command, "--features", "layer2", "layer3").stdout
    assert "layer3: one cell for 4 x 4 pixels of the input\n" in said
    assert "accuracy not measured: layer2 is no class scores" in said and "equal to the eager model" in said
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["accuracy"] == []
    expected = "--data: expected class scores to measure, got --features layer2 first; --features fc layer2 has them"
    assert expected in refusal(run_here(*command, "--features", "layer2", "--data", "digits"))
    assert ExportConfig(features=["layer2"]).features == ("layer2",)
