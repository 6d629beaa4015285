"""Checkpoints as trainers, libraries and repositories leave them: each loads exactly, or is named for what it is."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import enum
import functools
import gzip
import io
import logging
import pathlib
import pickle
import re
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resnet.models import create_model
from resnet.weights import WeightsError, load_weights, recognise_weights

State = dict[str, Tensor]


@functools.cache
def meta(name: str, classes: int, channels: int) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes=classes, in_channels=channels)


def network(name: str, classes: int, channels: int = 3) -> nn.Module:
    """Without the work of drawing weights; all 0 but for running_var."""
    model = copy.deepcopy(meta(name, classes, channels)).to_empty(device="cpu")
    for key, tensor in model.state_dict().items():
        tensor.fill_(1 if key.endswith("running_var") else 0)
    return model


def weights(name: str, classes: int, channels: int = 3, start: int = 1) -> State:
    """Every tensor with a value of its own, and one element in the file."""
    shapes = {key: tensor for key, tensor in meta(name, classes, channels).state_dict().items()}
    return {k: torch.tensor(start + n, dtype=t.dtype).expand(t.shape) for n, (k, t) in enumerate(shapes.items())}


S8 = weights("resnet8", 10)
S18 = weights("resnet18", 5)
S50 = weights("resnet50", 5)
OTHER = weights("resnet8", 10, start=1000)


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def swap(state: State, *rules: tuple[str, str]) -> State:
    """The names with every rule applied, in order."""
    names = {name: name for name in state}
    for pattern, replacement in rules:
        names = {name: re.sub(pattern, replacement, now) for name, now in names.items()}
    return {now: state[name] for name, now in names.items()}


def without(state: State, pattern: str) -> State:
    return {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


FC = r"^fc\."
CHILDREN = (("^conv1", "0"), ("^bn1", "1"), *((rf"^layer{n}", str(n + 3)) for n in range(1, 5)))
SMALL_CHILDREN = (("^conv1", "0"), ("^bn1", "1"), *((rf"^layer{n}", str(n + 2)) for n in range(1, 4)))
HUGGING_FACE = (
    (r"^conv1", "resnet.embedder.embedder.convolution"),
    (r"^bn1", "resnet.embedder.embedder.normalization"),
    (r"downsample\.0", "shortcut.convolution"),
    (r"downsample\.1", "shortcut.normalization"),
    *((rf"\.conv{n}\.", f".layer.{n - 1}.convolution.") for n in (1, 2, 3)),
    *((rf"\.bn{n}\.", f".layer.{n - 1}.normalization.") for n in (1, 2, 3)),
    *((rf"^layer{n}\.(\d+)", rf"resnet.encoder.stages.{n - 1}.layers.\1") for n in (1, 2, 3, 4)),
    (FC, "classifier.1."),
)
TWO = torch.ones(2)
# what is saved for a network, and what must be found said: of wrappers, renamed, unused, others
LOADS: dict[str, tuple[str, Any, str]] = {
    "lightning": ("resnet8", {"state_dict": {**under("model.", S8), "criterion.weight": torch.ones(10)}},
        "criterion"),
    "lightning-net": ("resnet8", {"state_dict": under("net.", S8), "callbacks": {}}, "net.*"),
    "lightning-metrics": ("resnet8", {"state_dict": {**under("backbone.", S8), "train_acc.tp": TWO,
        "val_auroc.confmat": TWO, "loss_fn.pos_weight": TWO}}, "train_acc.tp"),
    "lightning-teacher": ("resnet8", under("student.net.", S8) | under("teacher.", weights("resnet14", 10)),
        "teacher."),
    "compiled-ddp": ("resnet8", under("_orig_mod.module.", S8), "_orig_mod.*"),
    "deep": ("resnet8", {"state_dict": under("module.model.encoder.", S8)}, "encoder.*"),
    "subclass": ("resnet8", {**S8, "criterion.weight": TWO}, "criterion.weight"),
    "thop": ("resnet8", {**S8, "layer1.0.conv1.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        "total_ops"),
    "extra-state": ("resnet8", {**S8, "bn1._extra_state": None}, "bn1._extra_state"),
    "mmpretrain": ("resnet50", {"meta": {}, "state_dict": swap(S50, (FC, "head.fc."), (r"^(?!head)",
        "backbone."))}, "head.fc -> fc"),
    "timm-head": ("resnet8", swap(S8, (FC, "head.fc.")), "head.fc -> fc"),
    "cadene": ("resnet18", swap(S18, (FC, "last_linear.")), "last_linear -> fc"),
    "dropout-head": ("resnet8", swap(S8, (FC, "fc.1.")), "fc.1 -> fc"),
    "classifier": ("resnet8", swap(S8, (FC, "classifier."), (r"^(?!classifier)", "encoder.")),
        "classifier -> fc"),
    "two-in-a-row": ("resnet8", swap(S8, (FC, "1."), (r"^(?!1\.)", "0.")), "1 -> fc"),
    "children": ("resnet18", swap(S18, (FC, "10."), *CHILDREN), "10 -> fc"),
    "features": ("resnet18", swap(S18, (FC, "fc."), *CHILDREN, (r"^(?!fc)", "model.features.")), "features.*"),
    "children-small": ("resnet8", swap(S8, (FC, "8."), *SMALL_CHILDREN), "8 -> fc"),
    "hugging-face": ("resnet18", swap(S18, *HUGGING_FACE), "classifier.1 -> fc"),
    "hugging-face-50": ("resnet50", swap(S50, *HUGGING_FACE), "classifier.1 -> fc"),
    "cifar": ("resnet8", {"net": under("module.", swap(S8, (FC, "linear."), ("downsample", "shortcut"))),
        "acc": 93.1}, "shortcut -> downsample"),
    "moco": ("resnet8", {"state_dict": under("module.encoder_k.", OTHER) | under("module.encoder_q.", S8)
        | {"module.queue": TWO, "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}},
        "state_dict.module.encoder_k"),
    "dino": ("resnet8", {"teacher": under("backbone.", OTHER), "student": under("module.backbone.", S8)},
        "teacher.backbone"),
    "byol": ("resnet8", under("target_encoder.net.", OTHER) | under("online_encoder.net.", S8)
        | {"online_predictor.net.0.weight": TWO, "online_encoder.projector.net.0.weight": TWO},
        "target_encoder.net"),
    "simclr": ("resnet8", {"state_dict": {**under("encoder.", S8), "projector.0.weight": TWO}},
        "projector.0.weight"),
    "ema-and-weights": ("resnet8", {"ema_state_dict": under("module.module.", OTHER), "state_dict": S8},
        "ema_state_dict"),
    "ema-alone": ("resnet8", {"ema_state_dict": {"module": under("module.", S8)}}, "ema_state_dict"),
    "lightning-ema": ("resnet8", {"state_dict": under("ema_model.module.", OTHER) | under("model.", S8)},
        "ema_model.module"),
    "swin-style": ("resnet8", {"model": S8, "max_accuracy": 81.2, "config": collections.defaultdict(list,
        a=[1])}, "config"),
    "fsdp": ("resnet8", swap(S8, (r"(layer\d\.\d)\.", r"\1._fsdp_wrapped_module._orig_mod.")), "float32"),
    "half": ("resnet8", {k: t.half() if t.is_floating_point() else t for k, t in S8.items()}, "float16"),
    "no-counters": ("resnet8", {"state_dict": without(under("module.", S8), "num_batches")}, "module.*"),
    "gray": ("resnet8/1", weights("resnet8", 10, 1), "float32"),
}  # fmt: skip


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("case", LOADS)
def test_layouts_load_exactly_and_say_what_was_done(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, content, said = LOADS[case]
    name, _, channels = name.partition("/")
    state = {"resnet8": S8, "resnet18": S18, "resnet50": S50}[name] if not channels else content
    path = saved(content, tmp_path / "weights.ckpt")
    model = network(name, len(state["fc.bias"]), int(channels or 3))
    with caplog.at_level(logging.INFO, logger="resnet.weights"):
        info = load_weights(model, path)
    for key, tensor in model.state_dict().items():
        kept = case == "no-counters" and key.endswith("num_batches_tracked")
        assert torch.equal(tensor, torch.zeros_like(tensor) if kept else state[key]), key
    everything = (*info.wrappers, *info.renamed, *info.unused, *info.others, *info.ignored, *info.dtypes)
    assert said in everything or any(said in one for one in everything), everything
    assert all(word in caplog.text for word in (*info.wrappers, *info.renamed, *info.others))
    found = recognise_weights(path)
    assert found and (found.name, found.num_classes, found.in_channels) == (
        name,
        len(state["fc.bias"]),
        int(channels or 3),
    )


class Mode(enum.Enum):
    FAST = "fast"


class Config(dict):
    """As EasyDict, AttributeDict and yacs have it."""


class Meters(list):
    """As a history of losses."""


def beside() -> dict[str, object]:
    """What trainers keep beside the weights, none of it code."""
    config = Config(lr=0.1, nested=Config(a=1))
    config.frozen = True  # type: ignore[attr-defined]
    return {
        "best": np.float64(0.9), "epoch": np.int64(3), "curve": np.arange(3.0), "flag": np.bool_(True),
        "numpy_rng": np.random.get_state(), "rng": np.random.RandomState(0), "new_rng": np.random.default_rng(0),
        "names": np.array(["a", "b"]), "objects": np.array([None, 1], dtype=object), "dtype": np.dtype("f4"),
        "args": argparse.Namespace(mode=Mode.FAST, path=pathlib.Path("a"), config=config), "config": config,
        "meters": Meters([1.0]), "when": datetime.datetime(2024, 1, 1), "took": datetime.timedelta(1),
        "schedule": functools.partial(torch.optim.SGD, lr=0.1), "loss": nn.CrossEntropyLoss(),
        "counts": collections.Counter("ab"), "recent": collections.deque([1, 2], 3),
        "groups": collections.defaultdict(dict, a={"b": 1}), "space": types.SimpleNamespace(a=1), "set": {1, 2},
        "frozen": frozenset([1]), "range": range(3), "complex": 1j, "bytes": b"x",
        "optimizer": torch.optim.Adam([nn.Parameter(TWO)]).state_dict(), "type": float, "size": torch.Size([1]),
        "network": nn.Sequential(nn.Linear(1, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_beside_the_weights_are_read_without_their_code(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {**beside(), "state_dict": S8}
    if not zipped:  # which stores the source of a module, and refuses to read it
        content = {name: value for name, value in content.items() if not isinstance(value, nn.Module)}
    path = tmp_path / "weights.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for kind in (Mode, Config, Meters):
        monkeypatch.setattr(kind, "__new__", lambda *_: pytest.fail("code of the file's choice ran"), raising=False)
    monkeypatch.setitem(sys.modules, "numpy.random._pickle", None)
    before = set(torch.serialization.get_safe_globals())
    model = network("resnet8", 10)
    info = load_weights(model, path)
    assert all(torch.equal(tensor, S8[key]) for key, tensor in model.state_dict().items())
    assert len(info.ignored) == len(content) - 1 and set(torch.serialization.get_safe_globals()) == before


CHOSEN = {"state_dict": S8, "state_dict_ema": under("module.", OTHER), "epoch": 1}
FLAT = {**under("model.net.", S8), **under("model.ema.", OTHER), "model.norm.mean": torch.ones(3)}
KEYS: dict[str, tuple[object, str, State]] = {
    "container": (CHOSEN, "state_dict_ema", OTHER),
    "container-and-prefix": (CHOSEN, "state_dict_ema.module", OTHER),
    "the-default": (CHOSEN, "state_dict", S8),
    "prefix": (FLAT, "model.ema", OTHER),
    "end-of-a-prefix": (FLAT, "net", S8),
    "leaves-what-is-beside": ({**under("model.", S8), "head.weight": torch.ones(3, 10)}, "model", S8),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_chooses_one_of_several(case: str, tmp_path: Path) -> None:
    content, key, state = KEYS[case]
    model = network("resnet8", 10)
    info = load_weights(model, saved(content, tmp_path / "weights.pth"), key=key)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert key in info.key


NORMALISED = {**under("model.", S8), "normalize.mean": torch.ones(3)}
WIDE_HEAD = {
    **without(S8, FC),
    "fc.0.weight": torch.ones(64, 64),
    "fc.0.bias": torch.ones(64),
    "fc.2.weight": torch.ones(10, 64),
    "fc.2.bias": torch.ones(10),
}
FASTAI = {"0." + k: t for k, t in swap(without(S18, FC), *CHILDREN).items()} | {
    "1.2.weight": torch.ones(1024),
    "1.2.bias": torch.ones(1024),
    "1.4.weight": torch.ones(512, 1024),
    "1.8.weight": torch.ones(5, 512),
}
CIFAR18 = {**S18, "conv1.weight": torch.ones(64, 3, 3, 3)}
PLAIN = weights("plain8", 10)
with warnings.catch_warnings():  # on its way out of PyTorch, not out of files
    warnings.simplefilter("ignore", UserWarning)
    EIGHT_BITS = torch.quantize_per_tensor(S8["conv1.weight"], 0.1, 0, torch.qint8)
# the model, what is saved, and the words that must say what is wrong with it
REFUSED: dict[str, tuple[str, Any, str]] = {
    "another": ("resnet50", S18, r"fits resnet18 with 5 classes.*name='resnet18'.*num_classes=5"),
    "another-wrapped": ("resnet14", {"state_dict": under("model.", S8)}, r"fits resnet8 with 10 classes"),
    "another-gray": ("resnet14", weights("resnet8", 7, 1), r"fits resnet8 with 7 classes and 1 input channels"),
    "classes": ("resnet8", weights("resnet8", 7),
        r"fits resnet8 with 7 classes; weights for 7 classes, .*num_classes=7"),
    "hidden-layer": ("resnet8", WIDE_HEAD, r"2 layers \(fc\.0\.weight \[64, 64\], fc\.2\.weight \[10, 64\]\)"),
    "moco-2": ("resnet8", under("module.encoder_q.", WIDE_HEAD) | {"module.queue": TWO}, "2 layers"),
    "fast.ai": ("resnet18", {"model": FASTAI, "opt": {}}, r"a fast\.ai head"),
    "detector": ("resnet18", {"state_dict": under("backbone.", without(S18, FC)) | {"neck.conv.weight": TWO}},
        "no classifier in it"),
    "barlow": ("resnet8", {"model": under("module.backbone.", without(S8, FC))
        | {"module.projector.0.weight": TWO}}, "no classifier"),
    "normaliser": ("resnet8", NORMALISED,
        r"1 unexpected \(normalize\.mean\), load_weights\(key='model'\) leaves them"),
    "neck": ("resnet8", {**under("backbone.", without(S8, FC)), **under("head.", {"fc.weight": S8["fc.weight"],
        "fc.bias": S8["fc.bias"]}), "neck.projection.weight": TWO}, r"1 unexpected \(neck\.projection"),
    "two-classifiers": ("resnet8", {**under("net.", S8), "classifier.weight": torch.ones(3, 10),
        "classifier.bias": torch.ones(3)}, r"2 unexpected \(classifier"),
    "two-streams": ("resnet8", {**under("rgb.", without(S8, FC)), **under("flow.", without(OTHER, FC)),
        "fc.weight": S8["fc.weight"], "fc.bias": S8["fc.bias"]},
        r"2 networks share one classifier.*key='rgb'\) or load_weights\(key='flow'"),
    "second-head": ("resnet8", {**under("net.", S8), "head.weight": TWO}, r"unexpected \(head\.weight\)"),
    "biases": ("resnet8", {**S8, "layer1.0.conv1.bias": torch.ones(16)}, "convolutions with a bias"),
    "folded": ("resnet8", {**without(S8, "bn1"), "conv1.bias": torch.ones(16)}, "BatchNorm is folded already"),
    "cifar-stem": ("resnet18", CIFAR18, "a 3 x 3 stem, where the model's is 7 x 7"),
    "kuangliu": ("resnet18", {"net": under("module.", swap(CIFAR18, (FC, "linear."), ("downsample",
        "shortcut")))}, "a 3 x 3 stem"),
    "option-a": ("resnet8", swap(PLAIN, (FC, "linear.")), "shortcuts that pad with zeros"),
    "option-a-as-plain": ("plain8", swap(PLAIN, (FC, "linear.")), "shortcuts that pad with zeros"),
    "deep-stem": ("resnet18", {**without(S18, "^conv1"), "conv1.0.weight": TWO}, "deep stem"),
    "resnet-d": ("resnet18", swap(S18, (r"downsample\.1", "downsample.2"), (r"downsample\.0", "downsample.1")),
        "average pool in the shortcuts"),
    "squeeze": ("resnet18", {**S18, "layer1.0.se.fc1.weight": TWO}, "attention in the blocks"),
    "no-bias": ("resnet8", without(S8, r"fc\.bias"), "a classifier without bias"),
    "pruned": ("resnet8", swap(S8, (r"^layer1\.0\.conv1\.weight", "layer1.0.conv1.weight_orig"))
        | {"layer1.0.conv1.weight_mask": TWO}, "prune.remove"),
    "quantised": ("resnet8", {**S8, "conv1.weight": EIGHT_BITS}, r"conv1\.weight is qint8.*quantised"),
    "sparse": ("resnet8", {**S8, "fc.weight": S8["fc.weight"].to_sparse()}, "sparse_coo"),
    "arrays": ("resnet8", {"state_dict": {k: np.zeros(1) for k in S8}}, r"holds a dict with state_dict"),
    "one-array": ("resnet8", {**S8, "fc.weight": np.zeros(1)}, r"fc\.weight is numpy\S+, expected a tensor"),
    "whole-model": ("resnet8", nn.Sequential(nn.Linear(1, 1)),
        r"needs code \(torch\.nn\.modules\.container\.Sequential\), not run; save"),
    "model-in-a-dict": ("resnet8", {"model": nn.Linear(1, 1), "epoch": 3},
        r"model \(torch\.nn\.modules\.linear\.Linear\)"),
    "shadow": ("resnet8", {"ema": {"shadow_params": [TWO], "decay": 0.9}}, "holds a dict with ema"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    name, content, said = REFUSED[case]
    model = network(name, 5 if name == "resnet18" else 10)
    path = saved(content, tmp_path / "weights.pth")
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    message = str(caught.value).removeprefix(str(path))
    assert re.search(said, message) and "\n" not in message and len(message) < 400, message
    assert not any(tensor.any() for key, tensor in model.state_dict().items() if not key.endswith("running_var"))


def test_an_unknown_key_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = saved(CHOSEN, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"key='teacher'\); it has state_dict, state_dict_ema"):
        load_weights(network("resnet8", 10), path, key="teacher")


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return stream.getvalue()


def scripted() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), stream)
    return stream.getvalue()


def torch_saved(**how: Any) -> bytes:
    stream = io.BytesIO()
    torch.save({"fc.weight": TWO}, stream, **how)
    return stream.getvalue()


NO_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "torchscript": (scripted, "a TorchScript archive"),
    "exported": (lambda: zipped("m/archive_format", "m/models/model.json"), r"a torch\.export archive"),
    "onnx": (lambda: b"\x08\x0a\x12\x07pytorch\x1a\x052.1.0:\x90", "an ONNX file"),
    "keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file, as Keras"),
    "npz": (lambda: zipped("a.npy"), r"a NumPy archive \(\.npz\)"),
    "tflite": (lambda: b"\x20\0\0\0TFL3" + bytes(9), "TensorFlow Lite"),
    "engine": (lambda: b"ftrt" + bytes(99), "a TensorRT engine"),
    "zip": (lambda: zipped("run/best.pth"), "a zip archive with a weights file in it"),
    "gzip": (lambda: gzip.compress(b"x"), "a gzip file"),
    "error": (lambda: b'{"error": "no access"}', "JSON"),
    "denied": (lambda: b'<?xml version="1.0"?><Error>', "a failed download"),
    "truncated": (lambda: torch_saved()[:-50], "a truncated zip archive"),
    "protocol": (lambda: torch_saved(pickle_protocol=4), "protocol 4"),
    "one-byte": (lambda: b"\x80", "looks like a pickle"),
    "detectron": (lambda: pickle.dumps({"model": np.zeros(1)}, 4), "a pickle, of protocol 4"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*torch.jit", "ignore:.*TorchScript")
@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_other_files_are_named_for_what_they_are(case: str, tmp_path: Path) -> None:
    make, said = NO_WEIGHTS[case]
    for name in ("weights.pt", "weights.bin", "weights.h5"):
        path = tmp_path / name
        path.write_bytes(make())
        with pytest.raises(WeightsError, match=said) as caught:
            load_weights(network("resnet8", 10), path)
        assert len(str(caught.value)) < len(str(path)) + 400 and "weights_only" not in str(caught.value)
