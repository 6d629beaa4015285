"""Weights in every tensor of which something is wrong, and files that are none; most refusals of weights are tested
beside `resnet.weights`."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export import ExportConfig, ExportError, export_bundle
from export.terminal.flags import in_flags
from resnet.models import create_model
from resnet.weights import WeightsError, load_weights


def refused(path: Path) -> str:
    """The line with which a file is refused; the model is as it was."""
    model = create_model("resnet8")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError) as error:
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def in_every_tensor(state: dict[str, Tensor]) -> list[tuple[str, float]]:
    names = [name for name, tensor in state.items() if tensor.is_floating_point()]
    cases = [(name, float(value)) for name in names for value in ("nan", "inf", "-inf")]
    return cases + [(name, -0.001) for name in names if name.endswith("running_var")]


def test_nan_inf_and_negative_variances_are_refused_by_name(resnet8: nn.Module, tmp_path: Path) -> None:
    """By the file that holds them, and where the model was made by other means."""
    model = copy.deepcopy(resnet8)
    state = model.state_dict()
    for name, value in in_every_tensor(state):
        last = state[name].view(-1)[-1]
        sound = last.clone()
        last.fill_(value)
        save_file(state, tmp_path / "weights.safetensors")
        message = refused(tmp_path / "weights.safetensors")
        assert re.search(rf"(NaN or Inf|negative variance) in {re.escape(name)}; expected", message), message
        with pytest.raises(ExportError, match=rf"^{re.escape(name)} holds (NaN or Inf|-0\.001): "):
            export_bundle(model, torch.zeros(1, 3, 16, 16), tmp_path / "b", ExportConfig(engine="none"))
        last.copy_(sound)
    assert not (tmp_path / "b").exists()


def test_a_bias_outside_the_fp16_range_is_refused_by_the_name_of_its_layer(
    resnet8: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = copy.deepcopy(resnet8)
    model.get_parameter("layer2.0.bn1.bias").data.fill_(1e5)
    config = ExportConfig("fp16", (1, 2, 4), "none")
    with pytest.raises(ExportError, match=r"^layer2\.0\.conv1: layer2_0_conv1_bias reaches .*at most 6\.55e\+04") as e:
        export_bundle(model, torch.zeros(1, 3, 16, 16), tmp_path / "b", config, images=images)
    assert "--keep-fp32 layer2.0.conv1 leaves" in in_flags(str(e.value)) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_device_is_not_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.symlink_to("/dev/zero")
    assert refused(path) == f"{path}: a pipe, socket or device; expected a regular file"
