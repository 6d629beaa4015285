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
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from resnet.models import create_model
from resnet.weights import WeightsError, load_weights, save_weights


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
def state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trained().state_dict().items()}


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


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".PTH", ".pth.tar"])
def test_loads(model, state, tmp_path, suffix):
    path = save(state, tmp_path / f"weights{suffix}")
    info = load_weights(model.train(), path)
    assert_loaded(model, state)
    assert model.training
    assert info.path == str(path)
    assert info.format == ("safetensors" if suffix == ".safetensors" else "torch")
    assert (info.size, info.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert (info.wrappers, info.ignored, info.dtypes) == ((), (), ("float32",))
    assert (info.num_classes, info.in_channels) == (10, 3)


def test_loads_the_format_before_zip(model, state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert_loaded(model, state)


def test_path_may_be_text(model, state, tmp_path):
    load_weights(model, str(save(state, tmp_path / "weights.pt")))
    assert_loaded(model, state)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "state_dict": (lambda s: {"epoch": 3, "state_dict": s}, ("state_dict",), ("epoch",)),
    "model": (lambda s: {"model": s, "optimizer": {}, "args": [1]}, ("model",), ("optimizer", "args")),
    "model_state_dict": (lambda s: {"model_state_dict": s, "loss": 0.5}, ("model_state_dict",), ("loss",)),
    "model_ema": (lambda s: {"model_ema": s, "step": 1}, ("model_ema",), ("step",)),
    "ema": (lambda s: {"ema": s}, ("ema",), ()),
    "state_dict_ema": (lambda s: {"state_dict_ema": s, "epoch": 9}, ("state_dict_ema",), ("epoch",)),
    "timm": (
        lambda s: {
            "epoch": 7,
            "arch": "resnet18",
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
            "args": argparse.Namespace(model="resnet18", mean=(0.5,), opt_kwargs={}, aug=None),
            "state_dict_ema": {k: v + 1 for k, v in s.items()},
            "state_dict": s,
        },
        ("state_dict",),
        ("epoch", "arch", "optimizer", "args", "state_dict_ema"),
    ),
    "model-before-ema": (lambda s: {"ema": {k: v + 1 for k, v in s.items()}, "model": s}, ("model",), ("ema",)),
    "nested": (lambda s: {"model": {"state_dict": s, "x": 1}, "y": 2}, ("model", "state_dict"), ("y", "x")),
    "ddp": (lambda s: prefixed("module.", s), ("module.*",), ()),
    "lightning": (lambda s: prefixed("model.", s), ("model.*",), ()),
    "compiled": (lambda s: prefixed("_orig_mod.", s), ("_orig_mod.*",), ()),
    "compiled-ddp": (lambda s: prefixed("module._orig_mod.", s), ("module.*", "_orig_mod.*"), ()),
    "everything": (
        lambda s: {"state_dict": OrderedDict(prefixed("model.module.", s)), "epoch": 1},
        ("state_dict", "model.*", "module.*"),
        ("epoch",),
    ),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_removed_and_reported(model, state, tmp_path, caplog, case):
    wrap, wrappers, ignored = WRAPPED[case]
    path = save(wrap(state), tmp_path / "weights.pt")
    with caplog.at_level(logging.INFO, logger="resnet.weights"):
        info = load_weights(model, path)
    assert_loaded(model, state)
    assert (info.wrappers, info.ignored) == (wrappers, ignored)
    assert len(caplog.messages) == 1
    assert all(word in caplog.messages[0] for word in (*wrappers, *ignored, info.sha256, str(path)))


# sha256 of the lines "name shape" of the state dicts of timm 1.0.31 and of torchvision 0.28, which are the same
PUBLISHED_TENSORS = {
    "resnet18": "66b04efc1dfd4b80",
    "resnet34": "4aa3e2bbbdc5e2fd",
    "resnet50": "614cd53ddf849669",
    "resnet101": "593b3bde446ee903",
    "resnet152": "9ce3831312550858",
    "resnext50_32x4d": "5157aafec2a2c5e4",
    "resnext101_32x8d": "98e3cd7345111310",
    "resnext101_64x4d": "945d960d03b26b2a",
    "wide_resnet50_2": "bf71ae35ce444195",
    "wide_resnet101_2": "2f1e7d726d1251d2",
}


@pytest.mark.parametrize("name", PUBLISHED_TENSORS)
def test_tensors_are_those_of_timm_and_torchvision(name):
    with torch.device("meta"):
        tensors = create_model(name).state_dict()
    lines = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == PUBLISHED_TENSORS[name]


def test_other_architecture_of_timm_is_refused(tmp_path):
    """resnet50d: three convolutions in the stem, and a pool before the projection that shifts its names."""
    with torch.device("meta"):
        model = create_model("resnet50")
    theirs = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("downsample.1.", "downsample.2.").replace("downsample.0.", "downsample.1.")
        theirs[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)  # one number each in the file
    stem = theirs.pop("conv1.weight")
    theirs |= {f"conv1.{index}.weight": stem for index in (0, 1, 3, 4, 6)}
    path = save({"state_dict": theirs, "arch": "resnet50d"}, tmp_path / "model_best.pth.tar")
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: tensors do not fit the model: 17 missing (conv1.weight, ") and "\n" not in message
    )
    assert " unexpected (" in message and " misshapen (layer1.0.downsample.1.weight: file " in message


def test_averaged_model_as_pytorch_writes_it(model, state, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(trained(), use_buffers=True).state_dict()
    info = load_weights(model, save({"model_ema": averaged}, tmp_path / "weights.pt"))
    assert_loaded(model, state)
    assert info.wrappers == ("model_ema", "n_averaged", "module.*")


def test_prefix_on_some_names_only_is_no_wrapper(model, state, tmp_path):
    state["module.fc.bias"] = state.pop("fc.bias")
    message = refusal(model, save(state, tmp_path / "weights.pt"))
    assert "1 missing (fc.bias), 1 unexpected (module.fc.bias)" in message


def test_batch_counters_may_be_missing(model, state, tmp_path):
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    for name in counters:
        del state[name]
    load_weights(model, save(state, tmp_path / "weights.safetensors"))
    assert_loaded(model, state | {name: torch.tensor(0) for name in counters})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_precisions_are_converted_and_reported(model, state, tmp_path, dtype, suffix):
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    info = load_weights(model, save(stored, tmp_path / f"weights{suffix}"))
    assert_loaded(model, {n: t.to(state[n].dtype) for n, t in stored.items()})
    assert info.dtypes == (str(dtype).removeprefix("torch."),)
    assert all(p.dtype == torch.float32 for p in model.parameters())


# what is wrong with the tensors: a change to a sound state dict, and the words that must say so
MISFITS = {
    "missing": (lambda s: s.pop("bn1.weight"), r"1 missing \(bn1.weight\)$"),
    "unexpected": (lambda s: s.update(head=torch.ones(2)), r"1 unexpected \(head\)$"),
    "misshapen": (
        lambda s: s.update({"layer1.0.conv1.weight": torch.ones(16, 16, 5, 5)}),
        r"1 misshapen \(layer1.0.conv1.weight: file \[16, 16, 5, 5\], model \[16, 16, 3, 3\]\)$",
    ),
    "many": (
        lambda s: [s.pop(n) for n in list(s) if n.startswith("layer3")],
        r"35 missing \(layer3.0.conv1.weight, layer3.0.bn1.weight, layer3.0.bn1.bias, ...\)$",
    ),
    "empty": (lambda s: s.clear(), r"107 missing \(conv1.weight, "),
    "classes": (
        lambda s: s.update({"fc.weight": torch.ones(7, 64), "fc.bias": torch.ones(7)}),
        r"7 classes, the model has 10 \(fc.weight: file \[7, 64\], model \[10, 64\]\); try --num-classes 7$",
    ),
    "channels": (
        lambda s: s.update({"conv1.weight": torch.ones(16, 1, 3, 3)}),
        r"1 input channels, the model has 3 \(conv1.weight: .*\); try --in-channels 1$",
    ),
    "classes-and-channels": (
        lambda s: s.update(
            {
                "conv1.weight": torch.ones(16, 1, 3, 3),
                "fc.weight": torch.ones(7, 64),
                "fc.bias": torch.ones(7),
            }
        ),
        r"try --in-channels 1; .*try --num-classes 7$",
    ),
    "other-fc": (
        lambda s: s.update({"fc.weight": torch.ones(7, 32)}),
        r"1 misshapen \(fc.weight: file \[7, 32\]",
    ),
    "nan": (lambda s: s["layer2.0.bn1.bias"].fill_(float("nan")), r"NaN or Inf in layer2.0.bn1.bias;"),
    "inf": (lambda s: s["fc.weight"][3, 5:6].fill_(-float("inf")), r"NaN or Inf in fc.weight;"),
    "overflow": (lambda s: s.update({"fc.bias": torch.ones(10).double() * 1e300}), r"NaN or Inf in fc.bias;"),
    "negative-variance": (
        lambda s: s["layer1.2.bn2.running_var"][-1:].fill_(-1e-12),
        r"negative variance in layer1.2.bn2.running_var;",
    ),
    "integers": (lambda s: s.update({"fc.bias": torch.ones(10, dtype=torch.int64)}), r"fc.bias is int64"),
    "complex": (
        lambda s: s.update({"fc.bias": torch.ones(10, dtype=torch.complex64)}),
        r"fc.bias is complex64",
    ),
    "counter": (lambda s: s.update({"bn1.num_batches_tracked": torch.tensor(0.5)}), r"tracked is float32"),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_misfits_are_refused(model, state, tmp_path, case, suffix):
    change, expected = MISFITS[case]
    change(state)
    message = refusal(model, save(state, tmp_path / f"weights{suffix}"))
    assert re.search(expected, message), message


@pytest.mark.parametrize("tensor", [torch.ones(10).to_sparse(), torch.ones(10, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_data_are_refused(model, state, tmp_path, tensor):
    message = refusal(model, save(state | {"fc.bias": tensor}, tmp_path / "weights.pt"))
    assert "fc.bias is float32" in message


def test_other_architecture_is_refused(model, tmp_path):
    message = refusal(model, save(create_model("resnet32").state_dict(), tmp_path / "weights.pt"))
    assert "72 unexpected (layer1.3.conv1.weight, " in message and "--num-classes" not in message


CONTENT = {
    "list": [torch.ones(2)],
    "tensor": torch.ones(2),
    "number": 3,
    "no-tensors": {"epoch": 3, "lr": 0.1},
    "mixed": {"fc.weight": torch.ones(2), "epoch": 3},
    "numbered": {0: torch.ones(2)},
    "hollow-wrapper": {"state_dict": 5},
}


@pytest.mark.parametrize("case", CONTENT)
def test_content_that_is_no_state_dict_is_refused(model, tmp_path, case):
    message = refusal(model, save(CONTENT[case], tmp_path / "weights.pt"))
    assert f"holds a {type(CONTENT[case]).__name__}" in message and "expected tensors by name" in message


def zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x" * 100)


def tar_archive(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("folder/"))


NOT_WEIGHTS = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes, looks like an empty file"),
    "html": (lambda p: p.write_text("\n<!DOCTYPE html><html>404</html>"), "32 bytes, looks like an HTML page"),
    "text": (lambda p: p.write_text("not found\n"), "10 bytes, looks like text"),
    "lfs": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "looks like a git-lfs pointer",
    ),
    "zip": (zip_archive, "looks like a zip archive"),
    "tar": (tar_archive, "looks like a tar archive"),
    "random": (lambda p: p.write_bytes(bytes(range(128, 256)) * 40), "5120 bytes, looks like binary data"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})[:-1]), "looks like a pickle"),
    "huge-header": (
        lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f{}" + b" " * 99),
        "a truncated safetensors file",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", NOT_WEIGHTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".pth.tar"])
def test_files_that_are_no_weights_are_refused(model, tmp_path, case, suffix):
    write, expected = NOT_WEIGHTS[case]
    path = tmp_path / f"weights{suffix}"
    write(path)
    message = refusal(model, path)
    assert expected in message
    assert ("expected a safetensors file" if suffix == ".safetensors" else "expected a state dict") in message
    assert "weights_only" not in message  # PyTorch's own text says how to load it unsafely


@pytest.mark.parametrize("kept", [0.001, 0.3, 0.999], ids=str)
@pytest.mark.parametrize(("suffix", "look"), [(".safetensors", "safetensors file"), (".pt", "a truncated zip archive")])
def test_truncated_files_are_refused(model, state, tmp_path, kept, suffix, look):
    path = save(state, tmp_path / f"weights{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert f"{int(kept * len(whole))} bytes, looks like" in (message := refusal(model, path))
    assert look in message


@pytest.mark.parametrize(
    ("written", "named", "look"),
    [(".pt", ".safetensors", "a torch.save archive"), (".safetensors", ".pt", "a safetensors file")],
    ids=["torch-as-safetensors", "safetensors-as-torch"],
)
def test_wrong_suffix_says_what_the_file_is(model, state, tmp_path, written, named, look):
    path = save(state, tmp_path / f"weights{written}").rename(tmp_path / f"renamed{named}")
    assert f"looks like {look}" in refusal(model, path)


@pytest.mark.parametrize("name", ["weights.bin", "weights", "weights.pt.gz"])
def test_other_suffixes_are_refused(model, tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert "expected one of .safetensors, .pt, .pth, .tar" in refusal(model, tmp_path / name)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["whole", "beside-the-weights", "in-timm's-arguments"])
def test_code_in_a_pickle_is_refused_and_not_run(model, state, tmp_path, zipped, place):
    marker, path = tmp_path / "executed", tmp_path / "weights.pt"
    content: object = Payload(marker)
    if place != "whole":
        content = {"state_dict": state, "args": argparse.Namespace(lr=content) if "timm" in place else content}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(model, path)
    assert "mkdir" in message and "not run" in message and "torch.save(model.state_dict(), path)" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload was live: an unguarded load runs it
    assert marker.exists()


def test_arguments_are_let_in_for_one_load_only(model, state, tmp_path):
    path = save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "weights.pt")
    before = set(torch.serialization.get_safe_globals())
    load_weights(model, path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


def test_pickled_module_is_refused_with_the_way_out(model, tmp_path):
    torch.save(trained(), tmp_path / "module.pth")
    message = refusal(model, tmp_path / "module.pth")
    assert "resnet.models.CifarResNet" in message and "torch.save(model.state_dict(), path)" in message


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("version", ["2.9.1", "2.10.0a0", "1.13.1"])
def test_old_pytorch_opens_no_pickles(model, state, tmp_path, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    message = refusal(model, save(state, tmp_path / "weights.pt"))
    assert version in message and ">= 2.10" in message
    load_weights(model, save(state, tmp_path / "weights.safetensors"))
    assert_loaded(model, state)


NO_FILES = {
    "missing": (lambda folder: folder / "weights.pt", "No such file"),
    "through-a-file": (lambda folder: save({}, folder / "file.pt") / "weights.pt", "Not a directory"),
    "directory": (lambda folder: folder.rename(folder.with_suffix(".pt")), "a directory; expected a regular file"),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_paths_that_are_no_files_are_refused(model, tmp_path, case):
    make, expected = NO_FILES[case]
    (tmp_path / "folder").mkdir()
    assert expected in refusal(model, make(tmp_path / "folder"))


def test_pipe_is_refused_without_waiting(model, tmp_path):
    os.mkfifo(tmp_path / "weights.pt")
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(refusal(model, tmp_path / "weights.pt")), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert messages and "a pipe, socket or device" in messages[0]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose first byte is unreadable")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_with_read_errors_is_refused(model, tmp_path, suffix):
    (tmp_path / f"weights{suffix}").symlink_to("/proc/self/mem")
    assert "bytes, cannot be read (" in refusal(model, tmp_path / f"weights{suffix}")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_without_permission_is_refused(model, state, tmp_path, suffix):
    path = save(state, tmp_path / f"weights{suffix}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads files of any mode")
    message = refusal(model, path)
    path.chmod(0o600)
    assert "cannot be read (Permission denied)" in message


def test_unprintable_names_stay_on_one_line(model, tmp_path):
    path = tmp_path / "weights.pt"
    message = refusal(model, save({"a\nb\x1b[31m" + "c" * 999: torch.ones(1)}, path))
    assert r"a\nb\x1b[31mccc" in message and "\x1b" not in message


def test_saved_weights_load_again(model, state, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, state, {"model": "resnet20", "note": "a\nb \u00e9"})
    info = load_weights(model, path)
    assert_loaded(model, state)
    assert info.wrappers == info.ignored == () and info.dtypes == ("float32",)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"model": "resnet20", "note": "a\nb \u00e9"}
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_are_saved_as_they_are(tmp_path):
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


NO_PLACES = {
    "directory": (lambda path: path.mkdir(), "exists and is not a regular file"),
    "pipe": (os.mkfifo, "exists and is not a regular file"),
    "link": (lambda path: path.symlink_to(path.with_name("elsewhere")), "exists and is not a regular file"),
    "no-folder": (lambda path: path.parent.rmdir(), "cannot be written: No such file or directory"),
}


@pytest.mark.parametrize("case", NO_PLACES)
def test_places_that_are_no_files_are_refused(state, tmp_path, case):
    make, expected = NO_PLACES[case]
    path = tmp_path / "folder" / "weights.safetensors"
    path.parent.mkdir()
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError, match=expected):
        save_weights(path, state, {})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["weights.pt", "weights", "weights.safetensors.gz"])
def test_saving_under_another_suffix_is_refused(state, tmp_path, name):
    with pytest.raises(WeightsError, match=r"expected \.safetensors$"):
        save_weights(tmp_path / name, state, {})
    assert list(tmp_path.iterdir()) == []
