"""Weights from a file into a model: opened safely, checked completely, then copied; and back into a file.

Nothing in the model changes unless everything fits. A file is data and stays data: all but `.safetensors` goes
through PyTorch's weights-only unpickler, which builds tensors and plain containers and refuses code.
"""

import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from resnet.data.files import write_atomically
from resnet.weights.layouts import CONTAINERS, NetworkCopy, as_they_are, choose, find_copies, keys_of
from resnet.weights.reading import check_file, class_name, read_content
from resnet.weights.recognition import Recognised, recognise
from resnet.weights.refusals import WeightsError, clean, short, some

_LOG = logging.getLogger(__name__)

# Tensors whose shape holds a count the user chooses: axis, what it counts, the argument of create_model that sets it.
_SIZES = {
    "fc.weight": (0, "classes", "num_classes"),
    "fc.bias": (0, "classes", "num_classes"),
    "conv1.weight": (1, "input channels", "in_channels"),
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FAMILY = "layer1.0.conv1.weight"  # in the state dict of every network of it


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
        key: what was loaded, as load_weights(key) would choose it; empty where the file holds one network, bare.
        renamed: what has other names in the file, as "head.fc -> fc".
        unused: tensors beside the network's in the same state dict, by their names there: of losses, metrics, other
            copies of the network.
        others: keys of the other copies in the file that fit the model too.
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
    key: str = ""
    renamed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def load_weights(model: nn.Module, path: str | os.PathLike[str], key: str | None = None) -> WeightsInfo:
    """Load a checkpoint into `model`, in place, if and only if all of it fits and every value is sound.

    Every tensor of the model is filled by exactly one of the file, of its name in one of the known layouts and of its
    shape; BatchNorm's num_batches_tracked may be missing, the model keeps its own. Of several copies that fit, one
    that is no average of another is taken (no EMA, no teacher, no momentum encoder), and of those the first.

    Args:
        model: a model of the reference family; its state_dict says which names, shapes and dtypes are expected.
        path: .safetensors, or .pt, .pth, .pth.tar, .ckpt, .bin, .th, .pkl or .model as torch.save writes them: a
            state dict, bare or in containers, behind prefixes and with other tensors beside it (see WeightsInfo);
            named as torchvision and timm, MMPretrain, Hugging Face or the CIFAR repositories do.
        key: which copy to take, by the containers and prefixes that lead to it: "state_dict_ema", "teacher",
            "state_dict.model.net". Tensors beside it are then left behind whatever they are.

    Raises:
        WeightsError: with the model as it was, for a path that is not a readable regular file with one of these
            suffixes; content that is empty, truncated or something else; a pickle of more than tensors and data,
            which is not run; a key that is not there; missing, unexpected or misshapen tensors; NaN or Inf; a
            negative running_var; and for all but .safetensors under a PyTorch older than 2.10.
    """
    file = Path(path)
    form, size = check_file(file)
    content = read_content(file, form, size)
    expected = model.state_dict()
    copies = _copies(file, content, key, family=_FAMILY in expected)
    faults = [_fault(copy, expected, key is not None) for copy in copies]
    if None not in faults:
        raise WeightsError(file, faults[0] or "")
    copy = copies[faults.index(None)]
    found = copy.tensors
    fitting = [c for c, fault in zip(copies, faults, strict=True) if fault is None]
    shared = [c for c in fitting if c.tensors.get("fc.weight") is found.get("fc.weight") and c.follows == copy.follows]
    if key is None and len(shared) > 1 and "fc.weight" in found:
        keys = " or ".join(f"load_weights(key={short(c.label)!r})" for c in shared[:3])
        raise WeightsError(file, f"{len(shared)} networks share one classifier, so none is the whole; choose {keys}")
    converted = {name: tensor.detach().to(expected[name].dtype) for name, tensor in found.items()}
    _check_values(file, converted)
    info = WeightsInfo(
        path=str(file),
        format=form,
        size=size,
        sha256=_sha256(file),
        wrappers=copy.wrappers,
        ignored=copy.ignored,
        dtypes=tuple(sorted({_dtype_name(t.dtype) for t in found.values() if t.is_floating_point()})),
        num_classes=found["fc.weight"].shape[0] if "fc.weight" in found else None,
        in_channels=found["conv1.weight"].shape[1] if "conv1.weight" in found else None,
        key=copy.label,
        renamed=copy.renamed,
        unused=tuple(name for name in copy.rest if name not in copy.wrappers),
        others=tuple(c.label for c in fitting if c is not copy),
    )
    model.load_state_dict({**expected, **converted})
    _LOG.info("weights from %s", _description(info))
    return info


def recognise_weights(path: str | os.PathLike[str], key: str | None = None) -> Recognised | None:
    """Which model of the family a checkpoint is for, by its tensors; None where it is none of them.

    Args:
        path: as for `load_weights`.
        key: as for `load_weights`.

    Raises:
        WeightsError: the file cannot be read, or has no such key.
    """
    file = Path(path)
    form, size = check_file(file)
    copies = _copies(file, read_content(file, form, size), key, family=True)
    found = (recognise(copy.tensors) for copy in copies if not copy.head)
    return next((network for network in found if network is not None), None)


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
        raise WeightsError(file, f"cannot be written: suffix {short(file.suffix)!r}, expected .safetensors")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    content = safetensors.torch.save(tensors, dict(metadata))
    try:
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            raise WeightsError(file, "exists and is not a regular file; choose another name")
        write_atomically(file, content)
    except OSError as error:
        raise WeightsError(file, f"cannot be written: {error.strerror or error}") from error


def _copies(file: Path, content: object, key: str | None, family: bool) -> list[NetworkCopy]:
    """What could be the network, the preferred first; of a file that has nothing of the kind, what it has instead."""
    copies = (find_copies(content) if family else []) or as_they_are(content)
    if not copies:
        given = f"a {class_name(content)}"
        if isinstance(content, Mapping):
            given += f" with {some(_entry(*entry) for entry in content.items())}"
        places = ", ".join(CONTAINERS)
        raise WeightsError(file, f"holds {given}; expected tensors by name, bare or under one of {places}")
    if key is None:
        return copies
    chosen = choose(copies, key) or choose(as_they_are(content), key)
    if not chosen:
        there = list(dict.fromkeys(label for label in (*keys_of(content), *(c.label for c in copies)) if label))
        have = some(there, 8) if there else "no keys: one network, bare"
        raise WeightsError(file, f"has nothing under load_weights(key={short(key)!r}); it has {have}")
    return chosen


def _entry(name: object, value: object) -> str:
    """An entry of a file that holds no state dict: with what it is, where that is no plain container or number."""
    plain = isinstance(value, (Mapping, Tensor, list, tuple, str, int, float, type(None)))
    return str(name) if plain else f"{name} ({class_name(value)})"


def _description(info: WeightsInfo) -> str:
    """All of it on one line, for the log."""
    parts = [
        f"{clean(info.path)}: {info.format}",
        f"sha256 {info.sha256}",
        f"stored as {', '.join(info.dtypes)}",
        f"wrappers removed: {', '.join(info.wrappers) or 'nothing'}",
        f"entries ignored: {', '.join(map(short, info.ignored)) or 'nothing'}",
    ]
    if info.renamed:
        parts.append(f"renamed: {', '.join(map(short, info.renamed))}")
    if info.unused:
        parts.append(f"{len(info.unused)} other tensors not used: {', '.join(map(short, _grouped(info.unused)))}")
    if info.others:
        taken = f"{short(info.key)} taken" if info.key else "the bare one taken"
        choice = ", ".join(f"load_weights(key={short(other)!r})" for other in info.others)
        parts.append(f"{len(info.others) + 1} networks fit, {taken}; the others by {choice}")
    return ", ".join(parts)


def _grouped(names: Iterable[str]) -> list[str]:
    """By what they begin with: "teacher.* (122)"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [same[0] if len(same) == 1 else f"{first}.* ({len(same)})" for first, same in groups.items()]


def _fault(copy: NetworkCopy, expected: Mapping[str, Tensor], chosen: bool) -> str | None:
    """Why these tensors are not the model's: their names, shapes or kinds, or what is beside them. None: they are.

    What is beside a copy that the caller has chosen stays behind by the caller's choice.
    """
    found = copy.tensors
    missing = [n for n in expected if n not in found and not n.endswith(".num_batches_tracked")]
    misshapen = [n for n in expected if n in found and found[n].shape != expected[n].shape]
    own = [n for n in found if n not in expected]
    unexpected = [*own, *(() if chosen and not missing else (*copy.left, *(copy.head if not missing else ())))]
    if not missing and not unexpected and misshapen:
        hint = _size_hint(found, expected, misshapen)
        if hint:
            network = recognise(found)
            return f"fits {network}; {hint}" if network else hint
    if missing or unexpected or misshapen:
        shapes = [f"{n}: file {list(found[n].shape)}, model {list(expected[n].shape)}" for n in misshapen]
        parts = (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        remarks = _remarks(copy, expected, missing, own, misshapen)
        if not remarks and not missing and not own and not misshapen and copy.label:
            remarks = [f"load_weights(key={short(copy.label)!r}) leaves them behind"]
        shown = 1 if remarks else 3
        faults = ", ".join(f"{len(names)} {what} ({some(names, shown)})" for what, names in parts if names)
        return ", ".join((f"tensors do not fit the model: {faults}", *remarks[:2]))
    for name, tensor in found.items():
        kinds = _FLOATS if expected[name].is_floating_point() else (torch.int64, torch.int32)
        if tensor.dtype not in kinds or tensor.layout != torch.strided or tensor.is_meta:
            given, wanted = _dtype_name(tensor.dtype), " or ".join(map(_dtype_name, kinds))
            kind = f"{given}, {tensor.layout}, on {tensor.device}"
            quantised = " (quantised; load the float weights it was made from)" if tensor.is_quantized else ""
            return f"{short(name)} is {kind}{quantised}; expected {wanted}, dense, with data"
    if copy.renamed and any(r.endswith("linear -> fc") for r in copy.renamed) and _is_plain(expected):
        return f"has the names of residual networks of CIFAR repositories; {_ZERO_PADDED}"
    return None


_ZERO_PADDED = "shortcuts that pad with zeros have no tensors, and no model here has them"


def _is_plain(expected: Mapping[str, Tensor]) -> bool:
    return _FAMILY in expected and not any(".downsample." in name for name in expected)


def _remarks(
    copy: NetworkCopy, expected: Mapping[str, Tensor], missing: list[str], own: list[str], misshapen: list[str]
) -> list[str]:
    """What tensors that do not fit seem to be, each in a few words, the most telling first."""
    found, said = copy.tensors, []
    others = [*own, *copy.left]
    no_tensors = [name for name in missing if name in copy.no_tensors]
    if no_tensors:
        kinds = {class_name(copy.no_tensors[name]) for name in no_tensors}
        said.append(f"{some(no_tensors)} is {some(sorted(kinds))}, expected a tensor")
    if any(re.search(r"(_packed_params|zero_point|fake_quant|activation_post_process)", n) for n in others):
        said.append("a quantised network: load the float weights it was made from")
    if any(re.search(r"\.(weight_orig|weight_mask)$", n) for n in others):
        said.append("pruned: call torch.nn.utils.prune.remove before saving")
    if any(re.search(r"(\.parametrizations\.|\.weight_[gv]$)", n) for n in own):
        said.append("parametrised weights: remove the parametrisation before saving")
    if copy.head:
        shapes = some(f"{n} {list(t.shape)}" for n, t in copy.head.items() if t.dim() > 1)
        maker = "a fast.ai head of" if copy.prefix.endswith("0.") and "1." in "".join(copy.head)[:2] else "a head of"
        said.append(f"{maker} {_layers(copy.head)} ({shapes}), which is no plain fc: export your module from Python")
    elif "fc.weight" in missing and "fc.weight" not in no_tensors and _FAMILY in found:
        said.append("no classifier in it: a backbone, as detectors and self-supervised training leave it")
    elif missing == ["fc.bias"]:
        said.append("a classifier without bias")
    if any(re.search(r"(^|\.)(conv1\.0|stem(\.\d)?|conv1\.conv\d)\.", n) for n in others):
        said.append("a deep stem (ResNet-C, -D)")
    elif any(re.search(r"downsample\.2\.", n) for n in own):
        said.append("an average pool in the shortcuts (ResNet-D)")
    if any(re.search(r"\.(conv\d|downsample\.0)\.bias$|^conv1\.bias$", n) for n in own):
        folded = _FAMILY.replace("conv1.weight", "bn1.running_mean") not in found
        said.append("convolutions with a bias" + (": BatchNorm is folded already" if folded else ""))
    if any(re.search(r"layer\d+\.\d+\.(se\w*|eca|cbam|ca|sa|attn|att\w*)\.", n) for n in own):
        said.append("attention in the blocks (squeeze-and-excite or the like)")
    if "conv1.weight" in misshapen and found["conv1.weight"].dim() == 4 == expected["conv1.weight"].dim():
        theirs, ours = (list(t["conv1.weight"].shape[2:]) for t in (found, expected))
        if theirs != ours:
            said.append(f"a {theirs[0]} x {theirs[1]} stem, where the model's is {ours[0]} x {ours[1]}")
    if missing and not own and all(".downsample." in name for name in missing):
        said.append(f"a network without projections: {_ZERO_PADDED}")
    network = recognise(found)
    mine = recognise(expected)
    if network is not None and network != mine:
        arguments = [f"create_model(name={network.name!r})"] if mine is None or network.name != mine.name else []
        if mine is None or network.num_classes != mine.num_classes:
            arguments.append(f"create_model(num_classes={network.num_classes})")
        if mine is None or network.in_channels != mine.in_channels:
            arguments.append(f"create_model(in_channels={network.in_channels})")
        also = "" if network.certain else " (or a residual network with shortcuts that pad with zeros, not known here)"
        said.insert(0, f"the file fits {network}{also}: {' '.join(arguments)}")
    return said


def _layers(head: Mapping[str, Tensor]) -> str:
    modules = {name.rpartition(".")[0] for name in head}
    return f"{len(modules)} layers" if len(modules) > 1 else "another kind"


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
        raise WeightsError(file, f"NaN or Inf in {some(unsound)}; expected finite weights")
    negative = [n for n, t in tensors.items() if n.endswith("running_var") and (t < 0).any()]
    if negative:
        raise WeightsError(file, f"negative variance in {some(negative)}; expected running_var >= 0")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
