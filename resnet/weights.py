"""Weights from a file into a model: opened safely, checked completely, then copied; and back into a file.

Nothing in the model changes unless everything fits. A file is data and stays data: `.pt`, `.pth` and `.pth.tar`
go through PyTorch's weights-only unpickler, which builds tensors and plain containers and refuses code.
"""

import argparse
import hashlib
import logging
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from resnet.data.files import write_atomically
from resnet.errors import ResNetError

_LOG = logging.getLogger(__name__)

_FORMATS = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".tar": "torch"}  # .pth.tar
# Keys under which a state dict is stored; the first one present is taken, so averaged weights only for want of others.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema")
# What DistributedDataParallel, wrapping modules and torch.compile put before every name.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# Tensors whose shape holds a count the user chooses: axis, what it counts, the argument of create_model that sets it.
_SIZES = {
    "fc.weight": (0, "classes", "num_classes"),
    "fc.bias": (0, "classes", "num_classes"),
    "conv1.weight": (1, "input channels", "in_channels"),
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFE_TORCH = "2.10"  # before it, weights_only could be made to run code: CVE-2025-32434, CVE-2026-24747
_SAVE_STATE_DICT = "save its tensors instead: torch.save(model.state_dict(), path)"


class WeightsError(ResNetError):
    """Weights that cannot be used. The message is one line: the file, what was given, what was expected."""

    def __init__(self, file: Path, fault: str) -> None:
        super().__init__(f"{_clean(str(file))}: {fault}")


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights of a model came from.

    Attributes:
        path: the file, as given.
        format: "safetensors" or "torch".
        size: of the file, in bytes.
        sha256: of the file, in hexadecimal.
        wrappers: what was removed, outermost first: containers as "state_dict", key prefixes as "module.*",
            and "n_averaged", the counter of torch.optim.swa_utils.AveragedModel.
        ignored: entries of the file beside the weights, such as "optimizer".
        dtypes: of the floating-point tensors in the file; all are converted to the dtype of the model.
        num_classes: rows of fc.weight; None if there is no such tensor.
        in_channels: input channels of conv1.weight; None if there is no such tensor.
    """

    path: str
    format: str
    size: int
    sha256: str
    wrappers: tuple[str, ...]
    ignored: tuple[str, ...]
    dtypes: tuple[str, ...]
    num_classes: int | None
    in_channels: int | None


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> WeightsInfo:
    """Load a checkpoint into `model`, in place, if and only if all of it fits and every value is sound.

    BatchNorm's num_batches_tracked may be missing; the model keeps its own.

    Args:
        model: a model of the reference family; its state_dict says which names, shapes and dtypes are expected.
        path: .safetensors, .pt, .pth or .pth.tar with a state dict, bare or in the usual wrappers (see WeightsInfo);
            timm and torchvision use the names of this family.

    Raises:
        WeightsError: with the model as it was, for a path that is not a readable regular file with one of these
            suffixes; content that is empty, truncated or something else; a pickle with more than tensors in it,
            which is not run; missing, unexpected or misshapen tensors; NaN or Inf; a negative running_var; and
            for all but .safetensors under a PyTorch older than 2.10.
    """
    file = Path(path)
    form, size = _check_file(file)
    content = _read_safetensors(file, size) if form == "safetensors" else _read_torch(file, size)
    found, wrappers, ignored = _unwrap(file, content)
    expected = model.state_dict()
    _check_fit(file, found, expected)
    converted = {name: tensor.detach().to(expected[name].dtype) for name, tensor in found.items()}
    _check_values(file, converted)
    info = WeightsInfo(
        path=str(file),
        format=form,
        size=size,
        sha256=_sha256(file),
        wrappers=wrappers,
        ignored=ignored,
        dtypes=tuple(sorted({_dtype_name(t.dtype) for t in found.values() if t.is_floating_point()})),
        num_classes=found["fc.weight"].shape[0] if "fc.weight" in found else None,
        in_channels=found["conv1.weight"].shape[1] if "conv1.weight" in found else None,
    )
    model.load_state_dict({**expected, **converted})
    removed, beside = ", ".join(wrappers) or "nothing", ", ".join(map(_short, ignored)) or "nothing"
    _LOG.info(
        "weights from %s: %s, sha256 %s, stored as %s, wrappers removed: %s, entries ignored: %s",
        _clean(info.path), form, info.sha256, ", ".join(info.dtypes), removed, beside,
    )  # fmt: skip
    return info


def save_weights(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as a .safetensors file that appears whole or not at all, in place of an older one.

    Args:
        path: where to write; a file that is there is replaced.
        state_dict: tensors by name, on any device, in any memory format; written in their dtype.
        metadata: stored as text in the header of the file.

    Raises:
        WeightsError: with nothing left behind, for another suffix, for a path that exists and is not a regular
            file, and where the file cannot be written.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(file, f"cannot be written: suffix {_short(file.suffix)!r}, expected .safetensors")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    content = safetensors.torch.save(tensors, dict(metadata))
    try:
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            raise WeightsError(file, "exists and is not a regular file; choose another name")
        write_atomically(file, content)
    except OSError as error:
        raise WeightsError(file, f"cannot be written: {error.strerror or error}") from error


def _check_file(file: Path) -> tuple[str, int]:
    """Format by suffix and size in bytes of a readable regular file; opens nothing that could block."""
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(file, f"{error.strerror or error}; expected a weights file") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise WeightsError(file, f"{kind}; expected a regular file")
    if file.suffix.lower() not in _FORMATS:
        suffix = f"suffix {_short(file.suffix)!r}" if file.suffix else "no suffix"
        raise WeightsError(file, f"{suffix}; expected one of {', '.join(_FORMATS)}")
    return _FORMATS[file.suffix.lower()], status.st_size


def _read_safetensors(file: Path, size: int) -> Mapping[str, Tensor]:
    try:
        return safetensors.torch.load_file(file, device="cpu")
    except Exception as error:  # SafetensorError, OSError, whatever a hostile header provokes: all refusals
        raise WeightsError(file, _unreadable(file, size, "a safetensors file", error)) from error


def _read_torch(file: Path, size: int) -> object:
    if torch.__version__ < _SAFE_TORCH:
        remedy = "update it, or convert the weights to .safetensors"
        raise WeightsError(file, f"PyTorch {torch.__version__} opens it unsafely, expected >= 2.10; {remedy}")
    try:
        # timm stores the arguments of its training script beside the weights. Building a Namespace runs no code of
        # the file's choice: constructor and unpickler only set attributes on it, and nothing here reads them.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle can raise anything; all of it is a refusal
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            fault = _unreadable(file, size, "a state dict written by torch.save", error)
        else:
            fault = f"{size} bytes, a pickle that needs code ({_short(code[1])}), not run; {_SAVE_STATE_DICT}"
        raise WeightsError(file, fault) from error


def _unreadable(file: Path, size: int, expected: str, error: Exception) -> str:
    reason = re.split(r"\n|\. ", str(error))[0]
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
        reason = "no such pickle"  # PyTorch's own text is about how to load the file unsafely
    try:
        look = _looks_like(file, size, reason)
    except OSError as failure:
        return f"{size} bytes, cannot be read ({failure.strerror}); expected {expected}"
    return f"{size} bytes, looks like {look}; expected {expected} ({_short(reason)})"


def _looks_like(file: Path, size: int, reason: str) -> str:
    """What a file that is not what it should be seems to be, in a few words."""
    with file.open("rb") as stream:
        head = stream.read(1024)
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer (fetch the file itself: git lfs pull)"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a failed download?)"
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(file):
            return "a truncated zip archive"
        try:
            with zipfile.ZipFile(file) as archive:
                checkpoint = any(name.endswith("data.pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            return "a damaged zip archive"
        return "a torch.save archive" if checkpoint else "a zip archive"
    if head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        truncated = 8 + header > size or "not fully covered" in reason
        return "a truncated safetensors file" if truncated else "a safetensors file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[0] == 0x80 and head[1:2] <= b"\x05":
        return "a pickle"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "text"
    return "binary data"


def _unwrap(file: Path, content: object) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors by bare name, the wrappers removed, and the entries beside the weights."""
    wrappers: list[str] = []
    ignored: list[str] = []
    while isinstance(content, Mapping) and not all(isinstance(v, Tensor) for v in content.values()):
        container = next((key for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if container is None:
            break
        wrappers.append(container)
        ignored += [str(key) for key in content if key != container]
        content = content[container]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        given = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            given += f" with {_some(map(str, content))}"
        places = ", ".join(_CONTAINERS)
        raise WeightsError(file, f"holds {given}; expected tensors by name, bare or under one of {places}")
    tensors = dict(content)
    if any(name.startswith("module.") for name in tensors) and tensors.pop("n_averaged", None) is not None:
        wrappers.append("n_averaged")
    while prefix := _common_prefix(tensors):
        wrappers.append(prefix + "*")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, tuple(wrappers), tuple(ignored)


def _common_prefix(names: Collection[str]) -> str | None:
    """The wrapper's prefix that all names have, if there is one."""
    return next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None)


def _check_fit(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse names, shapes and kinds of tensor that are not the model's."""
    missing = [n for n in expected if n not in found and not n.endswith(".num_batches_tracked")]
    unexpected = [n for n in found if n not in expected]
    misshapen = [n for n in expected if n in found and found[n].shape != expected[n].shape]
    if not missing and not unexpected and misshapen:
        hint = _size_hint(found, expected, misshapen)
        if hint:
            raise WeightsError(file, hint)
    if missing or unexpected or misshapen:
        shapes = [f"{n}: file {list(found[n].shape)}, model {list(expected[n].shape)}" for n in misshapen]
        parts = (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        faults = ", ".join(f"{len(names)} {what} ({_some(names)})" for what, names in parts if names)
        raise WeightsError(file, f"tensors do not fit the model: {faults}")
    for name, tensor in found.items():
        kinds = _FLOATS if expected[name].is_floating_point() else (torch.int64, torch.int32)
        if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.is_meta:
            given, wanted = _dtype_name(tensor.dtype), " or ".join(map(_dtype_name, kinds))
            kind = f"{given}, {tensor.layout}, on {tensor.device}"
            raise WeightsError(file, f"{_short(name)} is {kind}; expected {wanted}, dense, with data")


def _size_hint(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], misshapen: list[str]) -> str | None:
    """What to say when nothing but the class count or the input channels differs; None when more does."""
    hints: dict[str, str] = {}
    for name in misshapen:
        if name not in _SIZES:
            return None
        axis, what, argument = _SIZES[name]
        theirs, ours = list(found[name].shape), list(expected[name].shape)
        if len(theirs) != len(ours) or [*ours[:axis], theirs[axis], *ours[axis + 1 :]] != theirs:
            return None
        count = f"weights for {theirs[axis]} {what}, the model has {ours[axis]}"
        hint = f"{count} ({name}: file {theirs}, model {ours}); try create_model({argument}={theirs[axis]})"
        hints.setdefault(argument, hint)
    return "; ".join(hints.values())


def _check_values(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN, Inf and negative variances, in the dtype of the model."""
    unsound = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if unsound:
        raise WeightsError(file, f"NaN or Inf in {_some(unsound)}; expected finite weights")
    negative = [n for n, t in tensors.items() if n.endswith("running_var") and (t < 0).any()]
    if negative:
        raise WeightsError(file, f"negative variance in {_some(negative)}; expected running_var >= 0")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _clean(text: str) -> str:
    """The text on one line: what cannot be printed becomes an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(text: str) -> str:
    """Text from a file, fit for a message."""
    return _clean(text[:120])


def _some(names: Iterable[str]) -> str:
    """The first three names, and a mark if there are more."""
    first = [_short(name) for name in islice(names, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
