import argparse
import hashlib
import logging
import os
import pickle
import re
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from resnet.models import create_model
from resnet.weights import WeightsError, load_weights, save_weights
from tests.faults.weights_inputs import Payload

State = dict[str, Tensor]


def trained() -> nn.Module:
    """A small model with no tensor at its default, the statistics included."""
    model = create_model("resnet20")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            else:
                tensor.fill_(5)
    return model


@pytest.fixture
def state() -> State:
    return trained().state_dict()


@pytest.fixture
def model() -> nn.Module:
    return create_model("resnet20")


def snapshot(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def save(content: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(content, dict)
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def refusal(model: nn.Module, path: Path) -> str:
    """The one-line message with which `path` is refused, the model being as it was."""
    before, training = snapshot(model), model.training
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    assert snapshot(model) == before and model.training == training
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < len(str(path)) + 400
    return message


def assert_loaded(model: nn.Module, state: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".PTH", ".pth.tar"])
def test_loads(model: nn.Module, state: State, tmp_path: Path, suffix: str) -> None:
    path = save(state, tmp_path / f"weights{suffix}")
    info = load_weights(model.train(), str(path))
    assert_loaded(model, state)
    assert model.training and info.path == str(path)
    assert info.format == ("safetensors" if suffix == ".safetensors" else "torch")
    assert (info.size, info.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (info.wrappers, info.ignored, info.dtypes) == ((), (), ("float32",))
    assert (info.num_classes, info.in_channels) == (10, 3)


def test_loads_the_format_before_zip(model: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert_loaded(model, state)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """Weights that must not be taken."""
    return {name: tensor + 1 for name, tensor in state.items()}


def from_timm(state: State) -> dict[str, object]:
    momentum = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    arguments = argparse.Namespace(model="resnet18", mean=(0.5,), opt_kwargs={}, aug=None)
    written = {"epoch": 7, "optimizer": momentum, "args": arguments}
    return {**written, "state_dict_ema": other(state), "state_dict": state}


Wrap = Callable[[State], Mapping[str, object]]


def beside_an_epoch(key: str) -> Wrap:
    return lambda state: {key: state, "epoch": 3}


# what is saved, and what is reported of it: wrappers removed and entries ignored
WRAPPED: dict[str, tuple[Wrap, tuple[str, ...], tuple[str, ...]]] = {
    **{
        key: (beside_an_epoch(key), (key,), ("epoch",))
        for key in ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema")
    },
    "timm": (from_timm, ("state_dict",), ("epoch", "optimizer", "args", "state_dict_ema")),
    "model-before-ema": (lambda s: {"ema": other(s), "model": s}, ("model",), ("ema",)),
    "nested": (lambda s: {"model": {"state_dict": s, "x": 1}, "y": 2}, ("model", "state_dict"), ("y", "x")),
    "ddp": (lambda s: prefixed("module.", s), ("module.*",), ()),
    "lightning": (lambda s: prefixed("model.", s), ("model.*",), ()),
    "compiled-ddp": (lambda s: prefixed("module._orig_mod.", s), ("module.*", "_orig_mod.*"), ()),
    "everything": (
        lambda s: {"state_dict": OrderedDict(prefixed("model.module.", s)), "epoch": 1},
        ("state_dict", "model.*", "module.*"),
        ("epoch",),
    ),
    "averaged-by-pytorch": (
        lambda s: {"model_ema": torch.optim.swa_utils.AveragedModel(trained(), use_buffers=True).state_dict()},
        ("model_ema", "n_averaged", "module.*"),
        (),
    ),
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
    "inf": (lambda s: s["fc.weight"][3, 5:6].fill_(-float("inf")), r"NaN or Inf in fc.weight;"),
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


CONTENT: dict[str, object] = {
    "list": [torch.ones(2)],
    "no-tensors": {"epoch": 3, "lr": 0.1},
    "mixed": {"fc.weight": torch.ones(2), "epoch": 3},
    "numbered": {0: torch.ones(2)},
    "hollow-wrapper": {"state_dict": 5},
}


@pytest.mark.parametrize("case", CONTENT)
def test_content_that_is_no_state_dict_is_refused(model: nn.Module, tmp_path: Path, case: str) -> None:
    message = refusal(model, save(CONTENT[case], tmp_path / "weights.pt"))
    assert f"holds a {type(CONTENT[case]).__name__}" in message and "expected tensors by name" in message


def zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x" * 100)


NOT_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes, looks like an empty file"),
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


@pytest.mark.parametrize("kept", [0.001, 0.3, 0.999], ids=str)
@pytest.mark.parametrize(("suffix", "look"), [(".safetensors", "safetensors file"), (".pt", "a truncated zip archive")])
def test_truncated_files_are_refused(
    model: nn.Module, state: State, tmp_path: Path, kept: float, suffix: str, look: str
) -> None:
    path = save(state, tmp_path / f"weights{suffix}")
    size = int(kept * path.stat().st_size)
    os.truncate(path, size)
    assert re.search(f" {size} bytes, looks like .*{look}", refusal(model, path))


@pytest.mark.parametrize(
    ("written", "named", "look"),
    [
        (".pt", "renamed.safetensors", "looks like a torch.save archive"),
        (".safetensors", "renamed.pt", "looks like a safetensors file"),
        *((".pt", name, "expected one of .safetensors, .pt, .pth, .tar") for name in ("a.onnx", "weights", "a.pt.gz")),
    ],
)
def test_wrong_suffix_is_refused(
    model: nn.Module, state: State, tmp_path: Path, written: str, named: str, look: str
) -> None:
    path = save(state, tmp_path / f"weights{written}").rename(tmp_path / named)
    assert look in refusal(model, path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["whole", "beside-the-weights", "in-timm's-arguments"])
def test_code_in_a_pickle_is_refused_and_not_run(
    model: nn.Module, state: State, tmp_path: Path, zipped: bool, place: str
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "weights.pt"
    content: object = Payload(os.mkdir, (str(marker),))
    if place != "whole":
        content = {"state_dict": state, "args": argparse.Namespace(lr=content) if "timm" in place else content}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(model, path)
    assert "mkdir" in message and "not run" in message and "torch.save(model.state_dict(), path)" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload was live: an unguarded load runs it
    assert marker.exists()


def test_arguments_are_let_in_for_one_load_only(model: nn.Module, state: State, tmp_path: Path) -> None:
    path = save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "weights.pt")
    before = set(torch.serialization.get_safe_globals())
    load_weights(model, path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


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


def linked(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


NO_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "weights.pt", "No such file"),
    "directory": (lambda folder: folder.rename(folder.with_suffix(".pt")), "a directory; expected a regular file"),
    "device": (
        lambda folder: linked(folder / "weights.pt", "/dev/zero"),
        "a pipe, socket or device; expected a",
    ),
    "unreadable": (lambda folder: linked(folder / "weights.pt", "/proc/self/mem"), "bytes, cannot be read ("),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_paths_that_are_no_files_are_refused(model: nn.Module, tmp_path: Path, case: str) -> None:
    make, expected = NO_FILES[case]
    (tmp_path / "folder").mkdir()
    assert expected in refusal(model, make(tmp_path / "folder"))


def test_pipe_is_refused_without_waiting(model: nn.Module, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pt")
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(refusal(model, tmp_path / "weights.pt")), daemon=True)
    thread.start()
    thread.join(timeout=600)  # against waiting for ever; a busy machine is slow
    assert messages and "a pipe, socket or device" in messages[0]


def test_unprintable_names_stay_on_one_line(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    message = refusal(model, save({"a\nb\x1b[31m" + "c" * 999: torch.ones(1)}, path))
    assert r"a\nb\x1b[31mccc" in message and "\x1b" not in message


def test_saved_weights_load_again(model: nn.Module, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, state, {"model": "resnet20", "note": "a\nb \u00e9"})
    info = load_weights(model, path)
    assert_loaded(model, state)
    assert info.wrappers == info.ignored == () and info.dtypes == ("float32",)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"model": "resnet20", "note": "a\nb \u00e9"}
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_are_saved_as_they_are(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.ones(3)),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(5),
    }
    save_weights(str(tmp_path / "tensors.safetensors"), tensors, {})
    loaded = safetensors.torch.load_file(tmp_path / "tensors.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name


NO_PLACES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "directory": (Path.mkdir, "weights.safetensors", "exists and is not a regular file"),
    "pipe": (os.mkfifo, "weights.safetensors", "exists and is not a regular file"),
    "link": (lambda path: path.symlink_to("elsewhere"), "weights.safetensors", "exists and is not a regular file"),
    "no-folder": (lambda path: path.parent.rmdir(), "weights.safetensors", "cannot be written: No such file or dir"),
    **{
        name: (lambda path: None, name, r"expected \.safetensors$")
        for name in ("weights.pt", "weights", "a.safetensors.gz")
    },
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
