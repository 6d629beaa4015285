"""What weights may hold and what a weights file may be: loaded knowingly, or refused with the model as it was."""

from __future__ import annotations

import copy
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export import Batch, ExportConfig, ExportError, export_bundle, fuse
from export.base.precision import PRECISIONS
from resnet.models import create_model
from resnet.weights import WeightsError, load_weights

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, Tensor]


@pytest.fixture
def state(resnet8: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in resnet8.state_dict().items()}


def refused(path: Path) -> str:
    """The line with which a file is refused; the model is as it was."""
    model = create_model("resnet8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def saved(content: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def in_every_tensor() -> list[tuple[str, str]]:
    names = [name for name, tensor in create_model("resnet8").state_dict().items() if tensor.is_floating_point()]
    cases = [(name, value) for name in names for value in ("nan", "inf", "-inf")]
    return cases + [(name, "-0.001") for name in names if name.endswith("running_var")]


def test_row_05_nan_inf_and_negative_variances_are_refused_by_name(
    state: State, resnet8: nn.Module, tmp_path: Path
) -> None:
    """In every tensor of the network: by the file that holds it, and where the model was made by other means."""
    for name, value in in_every_tensor():
        broken = {**state, name: state[name].clone()}
        broken[name].view(-1)[-1] = float(value)
        message = refused(saved(broken, tmp_path / "weights.safetensors"))
        assert re.search(rf"(NaN or Inf|negative variance) in {re.escape(name)}; expected", message), message
        model = copy.deepcopy(resnet8)
        model.load_state_dict(broken)
        with pytest.raises(ExportError, match=rf"^{re.escape(name)} holds (NaN or Inf|-0\.001): "):
            export_bundle(model, torch.zeros(1, 3, 16, 16), tmp_path / "b", ExportConfig(engine="none"))
    assert not (tmp_path / "b").exists()


OVERFLOWS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "weight": (lambda m: m.layer1[0].bn1.weight.data.fill_(1e6), "layer1.0.conv1: layer1_0_conv1_weight reaches "),
    "bias": (lambda m: m.layer2[0].bn1.bias.data.fill_(1e5), "layer2.0.conv1: layer2_0_conv1_bias reaches "),
    "variance of 0": (
        lambda m: (m.bn1.running_var.fill_(0), m.bn1.weight.data.fill_(1e4)), "conv1: conv1_weight reaches ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OVERFLOWS)
def test_row_06_weights_outside_the_fp16_range_are_refused_by_the_name_of_the_layer(
    case: str, resnet8: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    """In fp32 the same network is no reason to refuse; nor in bfloat16, which has the range of float32."""
    break_it, expected = OVERFLOWS[case]
    model = copy.deepcopy(resnet8)
    break_it(model)
    example = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ExportError) as error:
        export_bundle(model, example, tmp_path / "b", ExportConfig("fp16", (1, 2, 4), "none"), images=images)
    assert str(error.value).startswith(expected) and "expected at most 6.55e+04" in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    layer = expected.partition(":")[0]
    assert f"ExportConfig.keep_fp32=({layer!r},) leaves" in str(error.value)
    program = fuse(model, example, Batch(1, 2, 4)).keeping({layer})
    assert {weight.dtype for weight in program.at(PRECISIONS["fp16"]).state_dict().values()} == {
        torch.float16,
        torch.float32,
    }


MISFITS: dict[str, tuple[Callable[[State], object], str]] = {
    "classes": (
        lambda s: s.update({"fc.weight": torch.ones(7, 64), "fc.bias": torch.ones(7)}),
        r"weights for 7 classes, the model has 10 \(fc.weight: file \[7, 64\], model \[10, 64\]\); "
        r"try create_model\(num_classes=7\)",
    ),
    "channels": (
        lambda s: s.update({"conv1.weight": torch.ones(16, 1, 3, 3)}),
        r"1 input channels, the model has 3 \(conv1.weight: file \[16, 1, 3, 3\], model \[16, 3, 3, 3\]\)",
    ),
    "missing": (lambda s: [s.pop(n) for n in list(s) if "bn1" in n], r"16 missing \(bn1.weight, bn1.bias, bn1.runn"),
    "unexpected": (lambda s: s.update(a=torch.ones(1), b=torch.ones(1)), r"2 unexpected \(a, b\)"),
    "misshapen": (
        lambda s: s.update({"layer1.0.conv1.weight": torch.ones(16, 16, 5, 5)}),
        r"1 misshapen \(layer1.0.conv1.weight: file \[16, 16, 5, 5\], model \[16, 16, 3, 3\]\)",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("case", MISFITS)
def test_row_13_what_does_not_fit_is_refused_with_both_shapes(
    case: str, suffix: str, state: State, tmp_path: Path
) -> None:
    change, expected = MISFITS[case]
    change(state)
    assert re.search(expected, refused(saved(state, tmp_path / f"weights{suffix}")))


def prefixed(prefix: str) -> Callable[[State], Mapping[str, Any]]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


WRAPPED: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "bare": (dict, ()),
    "DDP": (prefixed("module."), ("module.*",)),
    "model.": (prefixed("model."), ("model.*",)),
    "compiled": (prefixed("_orig_mod."), ("_orig_mod.*",)),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3}, ("state_dict",)),
    "lightning": (lambda s: {"state_dict": prefixed("model.")(s), "epoch": 3}, ("state_dict", "model.*")),
    "DDP in model": (lambda s: {"model": prefixed("module.")(s), "optimizer": {}}, ("model", "module.*")),
    "EMA": (lambda s: {"state_dict_ema": s, "arch": "resnet8"}, ("state_dict_ema",)),
    "averaged": (
        lambda s: {"n_averaged": torch.tensor(5), **prefixed("module.")(s)}, ("n_averaged", "module.*"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_row_14_wrappers_are_removed_and_the_log_says_so(
    case: str, state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrap, removed = WRAPPED[case]
    model = create_model("resnet8")
    with caplog.at_level(logging.INFO, logger="resnet"):
        info = load_weights(model, saved(wrap(state), tmp_path / "weights.pt"))
    assert info.wrappers == removed and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert f"wrappers removed: {', '.join(removed) or 'nothing'}" in caplog.text


def test_row_15_a_checkpoint_of_timm_or_torchvision_loads(tmp_path: Path) -> None:
    """Both name the tensors of a ResNet-18 as this family does: written down, since neither is installed here."""
    parts = ("weight", "bias", "running_mean", "running_var")
    names = ["conv1.weight", *(f"bn1.{p}" for p in parts)]
    for stage in range(1, 5):
        for block in range(2):
            for index in (1, 2):
                names += [f"layer{stage}.{block}.conv{index}.weight"]
                names += [
                    f"layer{stage}.{block}.bn{index}.{p}" for p in ("weight", "bias", "running_mean", "running_var")
                ]
        if stage > 1:
            names += [f"layer{stage}.0.downsample.0.weight"]
            names += [f"layer{stage}.0.downsample.1.{p}" for p in parts]
    names += ["fc.weight", "fc.bias"]
    donor = create_model("resnet18").state_dict()
    published = {name: donor[name] for name in names}  # old files hold no num_batches_tracked
    assert len(published) == 102
    model = create_model("resnet18")
    for suffix in (".pth", ".safetensors"):
        load_weights(model, saved(published, tmp_path / f"resnet18{suffix}"))
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in published.items())


def cut(path: Path, state: State, share: float) -> Path:
    content = saved(state, path).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


NO_WEIGHTS: dict[str, tuple[Callable[[Path, State], object], str]] = {
    "truncated": (lambda p, s: cut(p, s, 0.5), r"^\d+ bytes, looks like a truncated "),
    "empty": (lambda p, s: p.touch(), "^0 bytes, looks like an empty file; expected "),
    "HTML": (lambda p, s: written(p, b"<!DOCTYPE html><html>404"), "^24 bytes, looks like an HTML page"),
    "random": (lambda p, s: written(p, random.Random(0).randbytes(5000)), "^5000 bytes, looks like binary data"),
    "git-lfs": (
        lambda p, s: written(p, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "looks like a git-lfs",
    ),
    "directory": (lambda p, s: p.mkdir(), "^a directory; expected a regular file$"),
    "missing": (lambda p, s: None, "^No such file or directory; expected a weights file$"),
    "pipe": (lambda p, s: os.mkfifo(p), "^a pipe, socket or device; expected a regular file$"),
    "device": (lambda p, s: p.symlink_to("/dev/zero"), "^a pipe, socket or device; expected a regular file$"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_row_21_what_is_no_weights_file_is_refused_with_what_it_looks_like(
    case: str, suffix: str, state: State, tmp_path: Path
) -> None:
    make, expected = NO_WEIGHTS[case]
    path = tmp_path / f"weights{suffix}"
    make(path, state)
    assert re.search(expected, refused(path).removeprefix(f"{path}: "))


def test_row_21_an_unreadable_file_is_refused(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path / "weights.pt")
    path.chmod(0)
    if os.access(path, os.R_OK):  # as root: a file that gives an error to everybody
        path.unlink()
        path.symlink_to("/proc/self/mem")
    assert "cannot be read (" in refused(path)


def test_row_21_the_script_ends_with_exit_code_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"<html>")
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), "--model", "resnet8", "--weights", "weights.pt"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    refusal = [line for line in process.stderr.splitlines() if " s  " not in line]  # progress lines apart
    assert process.returncode == 2 and process.stdout == "" and len(refusal) == 1, process.stderr
    assert refusal[0].startswith("export.py: error: weights.pt: 6 bytes, looks like an HTML page")
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pt"}
