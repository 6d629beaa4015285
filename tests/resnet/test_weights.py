import argparse
import hashlib
import logging
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from resnet.models import create_model
from resnet.weights import WeightsError, load_weights, save_weights
from tests.children import in_forks
from tests.faults.weights_inputs import Payload
from tests.resnet import checks

State = dict[str, Tensor]


@pytest.fixture
def state(calibrated: dict[str, nn.Module]) -> State:
    """Of a small model with no tensor at its default, the statistics included."""
    return {name: tensor.clone() for name, tensor in calibrated["resnet20"].state_dict().items()}


@pytest.fixture
def model() -> nn.Module:
    return create_model("resnet20")


def save(content: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(content, dict)
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def refusal(model: nn.Module, path: Path) -> str:
    """The one-line message with which `path` is refused, the model being as it was."""
    before, training = checks.bits(model), model.training
    message = checks.refusal(WeightsError, load_weights, model, path)
    assert checks.bits(model) == before and model.training == training
    assert message.startswith(str(path)) and len(message) < len(str(path)) + 400
    return message


def assert_loaded(model: nn.Module, state: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "a.PTH", "a.pth.tar", "before-zip.pth"])
def test_loads(model: nn.Module, state: State, tmp_path: Path, name: str) -> None:
    path = save(state, tmp_path / name)
    if name == "before-zip.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    info = load_weights(model.train(), str(path))
    assert_loaded(model, state)
    assert model.training and info.path == str(path)
    assert info.format == ("safetensors" if name == "a.safetensors" else "torch")
    assert (info.size, info.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (info.wrappers, info.ignored, info.dtypes) == ((), (), ("float32",))
    assert (info.num_classes, info.in_channels) == (10, 3)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def under(key: str, state: State) -> dict[str, object]:
    return {key: state, "epoch": 3}


def from_timm(state: State) -> dict[str, object]:
    momentum, arguments = {"state": {0: torch.ones(2)}, "param_groups": [{"lr": 0.1}]}, argparse.Namespace(aug=None)
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    return {"epoch": 7, "optimizer": momentum, "args": arguments, "state_dict_ema": averaged, "state_dict": state}


def averaged_by_pytorch(state: State) -> dict[str, object]:
    model = create_model("resnet20")
    model.load_state_dict(state)
    return {"model_ema": torch.optim.swa_utils.AveragedModel(model, use_buffers=True).state_dict()}


# what is saved, and what is reported of it: wrappers removed and entries ignored
WRAPPED: dict[str, tuple[Callable[[State], Mapping[str, object]], tuple[str, ...], tuple[str, ...]]] = {
    **{
        key: (partial(under, key), (key,), ("epoch",))
        for key in ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema")
    },
    "timm": (from_timm, ("state_dict",), ("epoch", "optimizer", "args", "state_dict_ema")),
    "model-before-ema": (lambda s: {"ema": {}, "model": s}, ("model",), ("ema",)),
    "nested": (lambda s: {"model": {"state_dict": s, "x": 1}, "y": 2}, ("model", "state_dict"), ("y", "x")),
    "compiled-ddp": (lambda s: prefixed("module._orig_mod.", s), ("module.*", "_orig_mod.*"), ()),
    "everything": (
        lambda s: {"state_dict": OrderedDict(prefixed("model.module.", s)), "epoch": 1},
        ("state_dict", "model.*", "module.*"),
        ("epoch",),
    ),
    "averaged-by-pytorch": (averaged_by_pytorch, ("model_ema", "n_averaged", "module.*"), ()),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_removed_and_reported(
    model: nn.Module, state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    wrap, wrappers, ignored = WRAPPED[case]
    path = save(wrap(state), tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO, logger="resnet.weights"):
        info = load_weights(model, path)
    assert_loaded(model, state)
    assert (info.wrappers, info.ignored) == (wrappers, ignored)
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "let in for more than one load"
    (message,) = caplog.messages
    assert all(word in message for word in (*wrappers, *ignored, info.sha256, str(path)))


def test_batch_counters_may_be_missing(model: nn.Module, state: State, tmp_path: Path) -> None:
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    stored = {name: tensor for name, tensor in state.items() if name not in counters}
    load_weights(model, save(stored, tmp_path / "weights.safetensors"))
    assert_loaded(model, state | {name: torch.tensor(0) for name in counters})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_precisions_are_converted_and_reported(
    model: nn.Module, state: State, tmp_path: Path, dtype: torch.dtype, suffix: str
) -> None:
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    info = load_weights(model, save(stored, tmp_path / f"weights{suffix}"))
    assert_loaded(model, {n: t.to(state[n].dtype) for n, t in stored.items()})
    assert info.dtypes == (str(dtype).removeprefix("torch."),)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def changed(**tensors: Tensor) -> Callable[[State], object]:
    """Other tensors in place of some; `__` in a name is a dot."""
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


SEVEN_CLASSES = {"fc__weight": torch.ones(7, 64), "fc__bias": torch.ones(7)}
ONE_CHANNEL = {"conv1__weight": torch.ones(16, 1, 3, 3)}
# what is wrong with the tensors: a change to a sound state dict, and the words that must say so
MISFITS: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda s: s.pop("bn1.weight"), r"1 missing \(bn1.weight\)$"),
    "unexpected": (changed(head=torch.ones(2)), r"1 unexpected \(head\)$"),
    "misshapen": (changed(bn1__bias=torch.ones(5)), r"1 misshapen \(bn1.bias: file \[5\], model \[16\]\)$"),
    "many": (lambda s: [s.pop(n) for n in [*s][:9]], r"8 missing \(conv1.weight, bn1.weight, bn1.bias, ...\)$"),
    "one-prefix": (lambda s: s.update({"module.fc.bias": s.pop("fc.bias")}), r"1 missing \(fc.bias\), 1 unexpected"),
    "deeper": (lambda s: s.update(create_model("resnet32").state_dict()), r"72 unexpected \(layer1\.3\.[^;]+$"),
    "classes": (
        changed(**SEVEN_CLASSES),
        r"7 classes, the model has 10 \(fc.weight: file \[7, 64\], model \[10, 64\]\);"
        r" try create_model\(num_classes=7\)$",
    ),
    "channels": (
        changed(**ONE_CHANNEL),
        r"1 input channels, the model has 3 \(conv1.weight: .*\); try create_model\(in_channels=1\)$",
    ),
    "classes-and-channels": (
        changed(**ONE_CHANNEL, **SEVEN_CLASSES),
        r"try create_model\(in_channels=1\); .*try create_model\(num_classes=7\)$",
    ),
    "other-fc": (changed(fc__weight=torch.ones(7, 32)), r"1 misshapen \(fc.weight: file \[7, 32\]"),
    "nan": (lambda s: s["layer2.0.bn1.bias"].fill_(float("nan")), r"NaN or Inf in layer2.0.bn1.bias;"),
    "overflow": (changed(fc__bias=torch.ones(10).double() * 1e300), r"NaN or Inf in fc.bias;"),
    "negative": (lambda s: s["bn1.running_var"][-1:].fill_(-1e-12), r"negative variance in bn1.running_var;"),
    "integers": (changed(fc__bias=torch.ones(10, dtype=torch.int64)), r"fc.bias is int64"),
    "sparse": (changed(fc__bias=torch.ones(10).to_sparse()), "fc.bias is float32, torch.sparse_coo"),
    "meta": (changed(fc__bias=torch.ones(10, device="meta")), "fc.bias is float32, torch.strided, on meta"),
    "counter": (changed(bn1__num_batches_tracked=torch.tensor(0.5)), r"tracked is float32"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused(model: nn.Module, state: State, tmp_path: Path, case: str) -> None:
    change, expected = MISFITS[case]
    change(state)
    message = refusal(model, save(state, tmp_path / "weights.pt"))
    assert re.search(expected, message), message


TENSORS = {"fc.bias": torch.ones(1000)}


def truncated(path: Path) -> None:
    os.truncate(save(TENSORS, path), path.stat().st_size // 2)


def zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x" * 100)


NOT_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes, looks like an empty file"),
    "truncated": (truncated, "looks like a truncated "),
    "html": (lambda p: p.write_text("\n<!DOCTYPE html><html>404</html>"), "32 bytes, looks like an HTML page"),
    "text": (lambda p: p.write_text("not found\n"), "10 bytes, looks like text"),
    "lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "looks like a git-lfs pointer"),
    "zip": (zip_archive, "looks like a zip archive"),
    "tar": (lambda p: p.write_bytes(tarfile.TarInfo("folder/").tobuf()), "looks like a tar archive"),
    "random": (lambda p: p.write_bytes(bytes(range(128, 256)) * 40), "5120 bytes, looks like binary data"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})[:-1]), "looks like a pickle"),
    "huge-header": (lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f{}" + b" " * 99), "a truncated safetensors file"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", NOT_WEIGHTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth.tar"])
def test_files_that_are_no_weights_are_refused(model: nn.Module, tmp_path: Path, case: str, suffix: str) -> None:
    write, expected = NOT_WEIGHTS[case]
    path = tmp_path / f"weights{suffix}"
    write(path)
    message = refusal(model, path)
    assert expected in message
    assert ("expected a safetensors file" if suffix == ".safetensors" else "expected a state dict") in message
    assert "weights_only" not in message  # PyTorch's own text says how to load it unsafely


# a name, what is there, and the words that must say why that is not read
PLACES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "torch": ("a.safetensors", partial(torch.save, TENSORS), "looks like a torch.save archive"),
    "safetensors": ("a.pt", partial(safetensors.torch.save_file, TENSORS), "looks like a safetensors file"),
    **{
        name: (name, partial(torch.save, TENSORS), "expected one of .safetensors, .pt, .pth, .tar")
        for name in ("a.onnx", "weights", "a.pt.gz")
    },
    **{
        given: ("a.pt", partial(torch.save, content), f"holds {given}; expected tensors by name, bare or under one of")
        for given, content in {
            "a list": [torch.ones(2)],
            "a dict with epoch, lr": {"epoch": 3, "lr": 0.1},
            "a dict with fc.bias, epoch": {**TENSORS, "epoch": 3},
            "a dict with 0": {0: torch.ones(2)},
            "a dict with state_dict": {"state_dict": 5},
        }.items()
    },
    "unprintable": ("a.pt", partial(torch.save, {"a\nb\x1b[31m" + "c" * 999: torch.ones(1)}), r"a\nb\x1b[31mccc"),
    "missing": ("a.pt", lambda path: None, "No such file"),
    "directory": ("a.pt", Path.mkdir, "a directory; expected a regular file"),
    "device": ("a.pt", lambda path: path.symlink_to("/dev/zero"), "a pipe, socket or device; expected a"),
    "unreadable": ("a.pt", lambda path: path.symlink_to("/proc/self/mem"), "bytes, cannot be read ("),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_is_not_read_is_refused(model: nn.Module, tmp_path: Path, case: str) -> None:
    name, make, expected = PLACES[case]
    make(tmp_path / name)
    assert expected in refusal(model, tmp_path / name)


def test_pipe_is_refused_without_waiting(model: nn.Module, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pt")
    (message,) = in_forks(lambda: refusal(model, tmp_path / "weights.pt"))
    assert "a pipe, socket or device" in message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(model: nn.Module, state: State, tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / "weights.pt"
    content = {"state_dict": state, "args": argparse.Namespace(lr=Payload(os.mkdir, (str(marker),)))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(model, path)
    assert "mkdir" in message and "not run" in message and "torch.save(model.state_dict(), path)" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload was live: an unguarded load runs it
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("version", ["2.9.1", "2.10.0a0", "1.13.1"])
def test_old_pytorch_opens_no_pickles(
    model: nn.Module, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    message = refusal(model, save(state, tmp_path / "weights.pt"))
    assert version in message and ">= 2.10" in message
    load_weights(model, save(state, tmp_path / "weights.safetensors"))
    assert_loaded(model, state)


def test_tensors_are_saved_as_they_are(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.ones(3)),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(5),
    }
    path, metadata = tmp_path / "tensors.safetensors", {"model": "resnet20", "note": "a\nb \u00e9"}
    save_weights(str(path), tensors, metadata)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    assert list(tmp_path.iterdir()) == [path]


NO_PLACES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "directory": (Path.mkdir, "weights.safetensors", "exists and is not a regular file"),
    "pipe": (os.mkfifo, "weights.safetensors", "exists and is not a regular file"),
    "link": (lambda path: path.symlink_to("elsewhere"), "weights.safetensors", "exists and is not a regular file"),
    "no-folder": (lambda path: path.parent.rmdir(), "weights.safetensors", "cannot be written: No such file or dir"),
    "other-suffix": (lambda path: None, "weights.pt", r"expected \.safetensors$"),
    "no-suffix": (lambda path: None, "weights", r"expected \.safetensors$"),
}


@pytest.mark.parametrize("case", NO_PLACES)
def test_places_that_are_no_files_are_refused(state: State, tmp_path: Path, case: str) -> None:
    make, name, expected = NO_PLACES[case]
    path = tmp_path / "folder" / name
    path.parent.mkdir()
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError, match=expected):
        save_weights(path, state, {})
    assert sorted(tmp_path.rglob("*")) == before
