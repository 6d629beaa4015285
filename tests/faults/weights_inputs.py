"""Weights files with damage, with tensors that do not belong there, and with code that must not run."""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from resnet.data.preprocessing import Preprocessing
from resnet.model_card import ModelCard, read_model_card
from resnet.models import create_model
from resnet.weights import load_weights
from tests.faults.bundle_inputs import TryOne, refused_or
from tests.faults.mutations import NASTY, damaged_bytes, damaged_safetensors

CANARY = "executed"
CODE: tuple[tuple[Callable[..., object], tuple[object, ...]], ...] = (
    (os.mkdir, (CANARY,)),
    (os.system, (f"touch {CANARY}",)),
    (eval, (f"__import__('os').mkdir({CANARY!r})",)),
    (exec, (f"open({CANARY!r}, 'w')",)),
    (open, (CANARY, "w")),
    (importlib.import_module, ("this",)),
    (torch.load, (CANARY,)),
    (torch.hub.load, (".", "evil")),
    (Path, ("/etc/passwd",)),
    (np.testing.runstring, (f"open({CANARY!r}, 'w')", {})),
    (functools.partial, (os.mkdir, CANARY)),
)


class Payload:
    """Calls a function when it is unpickled by anything that lets it."""

    def __init__(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def weights_files(_: Path, folder: Path) -> TryOne:
    torch.set_num_threads(1)  # of tensors this small more cost time
    torch.manual_seed(0)
    model = create_model("resnet8")
    state = model.state_dict()
    card = ModelCard("resnet8", Preprocessing((16, 16), (16, 16), (0.5,) * 3, (0.5,) * 3), tuple("abcdefghij"), "x")
    whole = {
        ".safetensors": safetensors.torch.save(state, card.to_metadata()),
        ".pt": saved(state, True),
        ".pth": saved(state, False),
    }

    def try_one(index: int) -> str:
        generator = random.Random(f"weights {index}")
        suffix, content = made(generator, whole, state)
        path = folder / f"weights{suffix}"
        path.write_bytes(content)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        refused_or(lambda: read_model_card(path))
        word = refused_or(lambda: load_weights(model, path))
        assert not (folder / CANARY).exists(), "code ran"
        if word == "refused":
            after = model.state_dict()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "half loaded"
        else:
            for name, tensor in model.state_dict().items():
                assert tensor.isfinite().all() and not ("running_var" in name and (tensor < 0).any()), "unsound weights"
        path.unlink()
        return word

    return try_one


def made(generator: random.Random, whole: dict[str, bytes], state: dict[str, Tensor]) -> tuple[str, bytes]:
    """The suffix and the bytes of one file."""
    kind, suffix = generator.random(), generator.choice(list(whole))
    if kind < 0.3:
        damage = damaged_safetensors if suffix == ".safetensors" else damaged_bytes
        return suffix, damage(generator, whole[suffix])
    if kind < 0.35:
        return suffix, damaged_bytes(generator, whole[generator.choice(list(whole))])
    if kind < 0.55:
        return generator.choice((".pt", ".pth")), with_code(generator, state)
    if kind < 0.65:
        return ".pt", with_entry(whole[".pt"], generator)
    return generator.choice((".pt", ".pth")), saved(changed(generator, state), generator.random() < 0.5)


def saved(content: object, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def with_code(generator: random.Random, state: dict[str, Tensor]) -> bytes:
    """A payload somewhere in a checkpoint, or bare in a pickle of any protocol."""
    payload = Payload(*generator.choice(CODE))
    content: object = generator.choice((
        payload,
        {**state, "fc.bias": payload},
        {"state_dict": dict(state), "optimizer": payload},
        {"state_dict": dict(state), "args": argparse.Namespace(lr=payload)},
        {"model": {"module.fc.bias": payload}},
        [state, payload],
    ))  # fmt: skip
    if generator.random() < 0.7:
        return saved(content, generator.random() < 0.5)
    pickled = pickle.dumps(payload, generator.randrange(6))
    return pickled if generator.random() < 0.5 else damaged_bytes(generator, pickled)


def with_entry(content: bytes, generator: random.Random) -> bytes:
    """The archive with one entry replaced, removed, doubled or renamed."""
    stream, kind = io.BytesIO(), generator.randrange(4)
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = generator.choice(old.namelist())
        for name in old.namelist():
            entry = old.read(name)
            if name != chosen:
                new.writestr(name, entry)
            elif kind == 0:
                new.writestr(name, damaged_bytes(generator, entry))
            elif kind == 1:
                new.writestr(f"{name.partition('/')[0]}/data.pkl", pickle.dumps(Payload(*generator.choice(CODE)), 2))
            elif kind == 2:
                new.writestr(generator.choice(("../../evil", "/tmp/evil", "a\nb", name + "x")), entry)
    return stream.getvalue()


_TENSORS: tuple[Callable[[Tensor], object], ...] = (
    lambda t: t * float("nan"), lambda t: t.double() * 1e300, lambda t: -t.abs().float() - 1,
    lambda t: t.to(torch.complex64), lambda t: t.half(), lambda t: t.to(torch.int8), lambda t: t.bool(),
    lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t.unsqueeze(0), lambda t: t.flatten(),
    lambda t: t[:0] if t.ndim else t, lambda t: torch.zeros(1).expand(10**12), lambda t: torch.zeros(0, 2**40),
    lambda t: torch.as_strided(t, t.shape, [0] * t.ndim), lambda t: nn.Parameter(t.float()), lambda t: [t],
    lambda t: {"weight": t}, lambda t: t.float().to(torch.float8_e4m3fn),
)  # fmt: skip


def changed(generator: random.Random, state: dict[str, Tensor]) -> object:
    """A state dict with one to three entries changed, perhaps in wrappers."""
    content: dict[Any, Any] = dict(state)
    for _ in range(generator.choice((1, 1, 2, 3))):
        name = generator.choice(list(state))
        kind = generator.randrange(5)
        if kind == 0:
            content.pop(name, None)
        elif kind == 1:
            content[name] = generator.choice(NASTY)
        elif kind == 2:
            key = generator.choice([*map(str, NASTY), None, 3, 1.5, ("a",), f"{name}\n", f"module.{name}"])
            content[key] = content.pop(name, state[name])
        else:
            content[name] = generator.choice(_TENSORS)(state[name])
    for _ in range(generator.choice((0, 0, 1, 2, 30))):
        key = generator.choice(("state_dict", "model", "ema", "model_ema", "other", "module"))
        content = {key: content, "epoch": generator.choice(NASTY)}
    if generator.random() < 0.1:
        content = {f"module.model.{key}": value for key, value in content.items()}
    return content
