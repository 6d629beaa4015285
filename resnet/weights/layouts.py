"""Where in a file the tensors of a network are, and what they are called there.

Trainers put containers round a state dict, prefixes before its names, other tensors beside it, and more than one copy
into a file; some libraries have names of their own for the same network. `find_copies` finds every copy and gives its
tensors the names of this family, one tensor to one name. It looks at names alone: whether the tensors fit, and
whether what is left over may stay behind, is for the caller to check and to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# Keys under which a state dict is stored, in order of preference; then any other, in the order of the file.
CONTAINERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema")
# What DistributedDataParallel, wrapping modules and torch.compile put before every name.
_WRAPPERS = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.", "encoder.", "self.")
_DEPTH, _MOST_CONTAINERS = 8, 1000  # how deep, and how many containers are looked into
# Copies of which another is preferred: averages, and the networks that follow another one in self-supervised training.
_FOLLOWER = re.compile(
    r"(^|[._])(n?ema\w*|\w+_ema|\w*teacher\w*|\w*momentum\w*|swa\w*|avg|averaged?|polyak|shadow|target|encoder_k"
    r"|key_encoder|encoder_key|k_encoder)([._]|$)"
)
# What training has beside the network and its forward pass does not read: by a part of its name, by the first part.
_OF_TRAINING = re.compile(
    r"(^|\.)(criterions?|criteria|loss\w*|\w+_loss|\w*loss_fn|crossentropy|ce|bce|metrics?(_\w+)?|\w+_metrics?"
    r"|(\w+_)?(acc|accuracy|f1|auroc|auc|precision|recall|confmat|confusion_matrix)"
    r"|(class|pos|loss|label|sample)_weights?|n_averaged|total_ops|total_params)(\.|$)",
    re.IGNORECASE,
)
_BESIDE = re.compile(
    r"(\w*teacher\w*|n?ema(_\w+)?|\w+_ema|momentum\w*|\w+_momentum|swa(_\w+)?|queue\w*|(\w+_)?(projector|predictor)\w*"
    r"|projection(_head|_layer)?|prototypes?\w*|center|discriminator|num_updates|decay|(global_)?step|epoch)(\.|$)",
    re.IGNORECASE,
)
_COUNTERS = ("total_ops", "total_params")  # left in every module by thop, which counts operations
_BODY = re.compile(r"(conv1|bn1|layer\d+)\.")
_HEAD = re.compile(
    r"(fc|head|heads|linear|classifier|last_linear|cls_head|new_fc|fc_cls|output|output_layer|logits|prediction"
    r"|classification_head)\."
)
_ANCHOR = "layer1.0.conv1.weight"  # every network of the family has one


@dataclass(frozen=True)
class _Naming:
    """How a library names the parts of a network of this family.

    Attributes:
        anchor: the end of the name that it has for the first convolution of the first block.
        stem: what its first convolution must be called, where the anchor alone says too little.
        rules: pattern of a name behind the prefix, and what it is called here; the first that matches counts.
        head: pattern of what may be the classifier, beside those of _HEAD.
        said: what to report of it.
    """

    anchor: str
    rules: tuple[tuple[re.Pattern[str], str], ...] = ()
    head: re.Pattern[str] | None = None
    said: str | None = None
    stem: str | None = None


def _numbered(first_stage: int, stages: int) -> _Naming:
    """nn.Sequential(*model.children()): convolution, BatchNorm, ReLU, perhaps max-pool, stages, pool, classifier."""
    rules = [(r"0\.(?=(weight|bias)$)", "conv1."), (r"1\.(?=\w+$)", "bn1.")]
    rules += [(rf"{first_stage + n}\.(?=\d+\.)", f"layer{n + 1}.") for n in range(stages)]
    return _Naming(
        f"{first_stage}.0.conv1.weight",
        tuple((re.compile(pattern), name) for pattern, name in rules),
        re.compile(rf"({'|'.join(map(str, range(first_stage + stages, first_stage + stages + 6)))})\."),
        "0, 1, ... -> conv1, bn1, ...",
        "0.weight",
    )


_NAMINGS = (
    _Naming(_ANCHOR),
    _numbered(3, 3),
    _numbered(4, 4),
    _Naming(  # Hugging Face transformers: ResNetForImageClassification
        "encoder.stages.0.layers.0.layer.0.convolution.weight",
        tuple(
            (re.compile(pattern), name)
            for pattern, name in (
                (r"embedder\.embedder\.convolution\.", "conv1."),
                (r"embedder\.embedder\.normalization\.", "bn1."),
                *(
                    (rf"encoder\.stages\.{s}\.layers\.(\d+)\.{theirs}\.", rf"layer{s + 1}.\1.{ours}.")
                    for s in range(4)
                    for theirs, ours in (
                        (r"shortcut\.convolution", "downsample.0"),
                        (r"shortcut\.normalization", "downsample.1"),
                        *((rf"layer\.{n}\.convolution", f"conv{n + 1}") for n in range(3)),
                        *((rf"layer\.{n}\.normalization", f"bn{n + 1}") for n in range(3)),
                    )
                ),
            )
        ),
        said="embedder, encoder.stages -> conv1, layer",
    ),
)
# What parallel, compiled and checkpointed modules put into the middle of a name.
_INNER = re.compile(r"((?:^|\.)(?:layer\d+|conv1|bn1|fc)\.(?:\d+\.)?)(?:_\w+_wrapped_module|_orig_mod|module)\.")
_SHORTCUT = re.compile(r"(layer\d+\.\d+)\.shortcut\.(?=[01]\.)")


@dataclass(frozen=True)
class NetworkCopy:
    """One network's tensors in a file.

    Attributes:
        containers: keys that lead to the mapping with its tensors, outermost first.
        prefix: what stands before all its names there, such as "module.model.".
        tensors: by the names of this family.
        ignored: entries of the file beside the containers, and values in the mapping that are no tensors.
        renamed: what has other names in the file, as "head.fc -> fc".
        rest: the other tensors of the mapping, by their names there.
        left: those of `rest` that a forward pass could need, or that nothing is known of.
        head: of a classifier that is not one linear layer: its tensors, by their names there.
        no_tensors: values in the mapping that are none, by name without the prefix.
    """

    containers: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    ignored: tuple[str, ...]
    renamed: tuple[str, ...] = ()
    rest: dict[str, Tensor] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    head: dict[str, Tensor] = field(default_factory=dict)
    no_tensors: dict[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What load_weights(key) calls it; empty for the only tensors of a file without containers."""
        return ".".join((*self.containers, *self.prefix.split("."))).strip(".")

    @property
    def wrappers(self) -> tuple[str, ...]:
        """What was removed, outermost first."""
        counted = ("n_averaged",) if "n_averaged" in self.rest and self.prefix.startswith("module.") else ()
        return (*self.containers, *counted, *(f"{part}.*" for part in self.prefix.split(".") if part))

    @property
    def follows(self) -> bool:
        """Whether it is an average of another copy, or follows it otherwise."""
        return _FOLLOWER.search(self.label.lower()) is not None


@dataclass(frozen=True)
class _Named:
    """A mapping with tensors in it, and how to come there."""

    path: tuple[str, ...]
    ignored: tuple[str, ...]
    entries: Mapping[object, object]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.entries.items() if isinstance(k, str) and isinstance(v, Tensor)}


def find_copies(content: object) -> list[NetworkCopy]:
    """Every copy of a network of this family in what a file holds, the preferred one first."""
    return sorted((copy for named in _walk(content) for copy in _copies(named)), key=_preference)


def as_they_are(content: object) -> list[NetworkCopy]:
    """The mappings that hold nothing but tensors, without known prefixes; for networks of other families."""
    found = []
    for named in _walk(content):
        tensors, prefix = named.tensors, ""
        if len(tensors) < len(named.entries):
            continue
        rest = {}
        if any(name.startswith("module.") for name in tensors) and "n_averaged" in tensors:
            rest["n_averaged"] = tensors.pop("n_averaged")
        while common := next((p for p in _WRAPPERS if tensors and all(n.startswith(p) for n in tensors)), None):
            prefix += common
            tensors = {name.removeprefix(common): tensor for name, tensor in tensors.items()}
        found.append(NetworkCopy(named.path, prefix, tensors, named.ignored, rest=rest))
    return sorted(found, key=_preference)


def keys_of(content: object) -> list[str]:
    """The containers of a file in which there are tensors."""
    return [".".join(named.path) for named in _walk(content) if named.path]


def choose(copies: list[NetworkCopy], key: str) -> list[NetworkCopy]:
    """The copies that a key means: its containers and prefixes, from the outermost on, or any of them in a row."""
    wanted = key.strip(".").split(".")
    parts = [(copy, copy.label.split(".")) for copy in copies]
    if exact := [copy for copy, own in parts if own == wanted]:
        return exact
    if outer := [copy for copy, own in parts if own[: len(wanted)] == wanted]:
        return outer
    return [
        copy
        for copy, own in parts
        if any(own[n : n + len(wanted)] == wanted for n in range(len(own) - len(wanted) + 1))
    ]


def _rank(path: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(CONTAINERS.index(key) if key in CONTAINERS else len(CONTAINERS) for key in path)


def _preference(copy: NetworkCopy) -> tuple[object, ...]:
    return copy.follows, _rank(copy.containers)  # the rest is left in the order of the file: sorted() is stable


def _walk(content: object) -> Iterator[_Named]:
    """Every mapping in the content that has tensors by name, from the outermost."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], tuple[str, ...], object]] = [((), (), content)]
    while waiting and len(seen) < _MOST_CONTAINERS:
        path, ignored, value = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        named = _Named(path, ignored, value)
        if named.tensors:
            yield named
        if len(path) < _DEPTH:
            for key, inner in value.items():
                if isinstance(key, str) and isinstance(inner, Mapping):
                    beside = tuple(str(other) for other in value if other != key)
                    waiting.append(((*path, key), (*ignored, *beside), inner))


def _copies(named: _Named) -> Iterator[NetworkCopy]:
    tensors = {_inner(name): tensor for name, tensor in named.tensors.items()}
    if len(tensors) < len(named.tensors):
        tensors = named.tensors  # two names would become one
    found: dict[str, _Naming] = {}  # by prefix, in the order of the file; the first naming that fits counts
    for name in tensors:
        for naming in _NAMINGS:
            prefix = name.removesuffix(naming.anchor)
            if prefix == name or prefix[-1:] not in ("", "."):
                continue
            if naming.stem is None or prefix + naming.stem in tensors:
                found.setdefault(prefix, naming)
                break
    for prefix, naming in found.items():
        yield _copy(named, tensors, prefix, naming, [*found])


def _inner(name: str) -> str:
    """The name without what was put into its middle, however often."""
    while (shorter := _INNER.sub(r"\1", name)) != name:
        name = shorter
    return name


def _copy(named: _Named, tensors: dict[str, Tensor], prefix: str, naming: _Naming, prefixes: list[str]) -> NetworkCopy:
    """The copy with that prefix; every tensor goes to one name at most, and no two to the same."""
    own: dict[str, Tensor] = {}
    taken: set[str] = set()
    renamed: dict[str, None] = {naming.said: None} if naming.said else {}
    for stored, tensor in tensors.items():
        if not stored.startswith(prefix) or _is_of(stored, prefix, prefixes):
            continue
        name = stored[len(prefix) :]
        for pattern, replacement in naming.rules:
            if pattern.match(name):
                name = pattern.sub(replacement, name, count=1)
                break
        projection = _SHORTCUT.sub(r"\1.downsample.", name)
        if projection != name and prefix + projection not in tensors:
            name = projection
            renamed["shortcut -> downsample"] = None
        if _BODY.match(name) and name not in own and not name.endswith(_COUNTERS):
            own[name] = tensor
            taken.add(stored)
    head = _head(tensors, prefix, naming, prefixes, taken)
    modules = {name.rpartition(".")[0] for name in head}
    if len(modules) == 1 and {name.rpartition(".")[2] for name in head} <= {"weight", "bias"}:
        own |= {f"fc.{stored.rpartition('.')[2]}": tensor for stored, tensor in head.items()}
        taken |= head.keys()
        if modules != {f"{prefix}fc"}:
            renamed[f"{modules.pop()} -> fc"] = None
        head = {}
    rest = {name: tensor for name, tensor in tensors.items() if name not in taken}
    others = _roots(prefix, prefixes)
    left = [n for n, tensor in rest.items() if n not in head and not _is_left_behind(n, tensor, prefix, others)]
    no_tensors = {key: v for key, v in named.entries.items() if not (isinstance(key, str) and isinstance(v, Tensor))}
    return NetworkCopy(
        containers=named.path,
        prefix=prefix,
        tensors=own,
        ignored=(*named.ignored, *map(str, no_tensors)),
        renamed=tuple(renamed),
        rest=rest,
        left=tuple(left),
        head=head,
        no_tensors={str(key).removeprefix(prefix): v for key, v in no_tensors.items() if str(key).startswith(prefix)},
    )


def _roots(prefix: str, prefixes: list[str]) -> tuple[str, ...]:
    """Where the other copies part from the one with that prefix: "teacher." of "teacher.backbone."."""
    roots, own = [], prefix.split(".")
    for other in prefixes:
        parts = other.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(own, parts, strict=False)) if a != b), len(own))
        root = "".join(f"{part}." for part in parts[: shared + 1] if part)
        if not prefix.startswith(root):
            roots.append(root)
    return tuple(roots)


def _is_of(name: str, prefix: str, prefixes: list[str]) -> bool:
    """Whether a name belongs to another copy, whose prefix is longer."""
    return any(len(other) > len(prefix) and name.startswith(other) for other in prefixes)


def _head(
    tensors: dict[str, Tensor], prefix: str, naming: _Naming, prefixes: list[str], taken: set[str]
) -> dict[str, Tensor]:
    """What may be the classifier: behind the prefix, else one part of it further out, and so on."""
    parts = prefix.split(".")[:-1]
    for depth in range(len(parts), -1, -1):
        scope = "".join(f"{part}." for part in parts[:depth])
        numbered = naming.head if depth == len(parts) else None
        if depth < len(parts) and parts[depth].isdigit():  # nn.Sequential(network, classifier)
            after = range(int(parts[depth]) + 1, int(parts[depth]) + 6)
            numbered = re.compile(rf"({'|'.join(map(str, after))})\.") if after[0] < 100 else None
        group = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in taken
            and name.startswith(scope)
            and not _is_of(name, scope, [other for other in prefixes if len(other) > len(scope)])
            and (_HEAD.match(name[len(scope) :]) or (numbered and numbered.match(name[len(scope) :])))
            and not _OF_TRAINING.search(name[len(scope) :])
        }
        if group:
            return group
    return {}


def _is_left_behind(name: str, tensor: Tensor, prefix: str, others: tuple[str, ...]) -> bool:
    """Whether a tensor that is no part of the network is known to be none of what its forward pass reads."""
    if name.startswith(prefix) and _BODY.match(name[len(prefix) :]):
        return name.endswith(_COUNTERS)
    if name.startswith(others):
        return True
    parts, own = name.split("."), prefix.split(".")
    shared = next((n for n, (a, b) in enumerate(zip(own, parts, strict=False)) if a != b), len(own))
    counter = not tensor.is_floating_point() and tensor.numel() <= 1
    tail = ".".join(parts[shared:])
    return counter or _OF_TRAINING.search(tail) is not None or _BESIDE.match(tail) is not None
