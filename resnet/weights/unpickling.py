"""torch.load's weights-only reader, and what stands in for the objects that trainers leave beside the weights.

Nothing of a file's choice is imported or called. A class that a file names (a NumPy scalar, an enum, a node of
OmegaConf, the arguments of a script) gets an empty class of its name in its place, which takes whatever it is given
and keeps nothing; so the tensors beside it can be read. Functions are code, and refused by name.
"""

import functools
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

_NUMPY = ("numpy.core", "numpy._core")  # before and since NumPy 2
_RANDOM = "numpy.random"
# Of Python, NumPy and PyTorch these have a stand-in; of other packages, whatever is named like a class.
_KNOWN = frozenset((
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "bytes", "list", "dict", "tuple", "frozenset")),
    *(f"builtins.{name}" for name in ("object", "type", "slice", "range", "NoneType", "Ellipsis", "NotImplemented")),
    "builtins.getattr",  # how some versions of Python store an enum
    "argparse.Namespace", "types.SimpleNamespace", "functools.partial", "copyreg._reconstructor",
    "collections.defaultdict", "collections.deque", "collections.ChainMap", "collections.UserDict",
    "enum.Enum", "typing.Any", "typing.Union", "typing.Optional",
    "typing.Dict", "typing.List", "decimal.Decimal", "fractions.Fraction", "uuid.UUID", "random.Random",
    "array.array", "re._compile",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"{core}.multiarray.{name}" for core in _NUMPY for name in ("scalar", "_reconstruct")),
    *(f"{core}.numeric._frombuffer" for core in _NUMPY),
    "numpy.ndarray", "numpy.dtype",
    *(f"numpy.{name}{bits}" for name in ("int", "uint", "float") for bits in (8, 16, 32, 64)),
    *(f"numpy.{name}" for name in ("bool", "bool_", "str_", "longlong", "ulonglong", "complex64", "complex128")),
    *(f"{_RANDOM}._pickle.{name}" for name in ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor")),
    *(f"{_RANDOM}.bit_generator.{name}" for name in ("SeedSequence", "__pyx_unpickle_SeedSequence")),
    *(f"{_RANDOM}.{name}" for name in ("mtrand.RandomState", "_generator.Generator", "_mt19937.MT19937")),
    *(f"{_RANDOM}.{name}" for name in ("_pcg64.PCG64", "_philox.Philox", "_sfc64.SFC64")),
))  # fmt: skip
_LIKE_DICT = ("collections.defaultdict", "builtins.dict")
_LIKE_LIST = ("collections.deque", "builtins.list")
_MOST_CLASSES = 200  # that a file may name
_UNKNOWN = re.compile(r"Unsupported global: GLOBAL (\S+) was not an allowed global")
_NO_CONTAINER = re.compile(r"Can only (SETITEMS?|append|extend).* got <class '([^']+)'>")


class StandIn:
    """In place of an object of a class that a file names. It keeps nothing of what it is given."""

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class NeedsCode(Exception):
    """A pickle that asks for a function, or for a class that is code rather than data; nothing of it has run.

    Attributes:
        name: what it asks for, as "module.name".
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def read_pickle(file: Path) -> object:
    """What torch.save wrote, tensors on the CPU, with an instance of StandIn in place of every other object.

    Raises:
        NeedsCode: it asks for code.
        Exception: whatever a malformed file makes PyTorch raise.
    """
    places = {**_known()}
    for _ in range(_MOST_CLASSES):
        try:
            with torch.serialization.safe_globals([(place, name) for name, place in places.items()]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            text = str(error)
            if unknown := _UNKNOWN.search(text):
                name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
                if name in places or not _is_class(name):
                    raise NeedsCode(name) from error
                places[name] = _stand_in(name, object)
            elif container := _NO_CONTAINER.search(text):  # a class derived from dict or list
                kind = OrderedDict if container[1].startswith("SETITEM") else list
                if container[2] not in places or places[container[2]].kind is not object:
                    raise
                places[container[2]] = _stand_in(container[2], kind)
            elif "Only persistent_load of storage is allowed" in text:  # as the old format stores a module's source
                raise NeedsCode("torch.nn.Module") from error
            elif code := re.search(r"GLOBAL (\S+)", text):
                raise NeedsCode(code[1]) from error
            else:
                raise
    raise NeedsCode(name)


@functools.cache
def _known() -> dict[str, Any]:
    """What stands in for the names that every file may use."""
    kinds = dict.fromkeys(_LIKE_DICT, OrderedDict) | dict.fromkeys(_LIKE_LIST, list)
    return {name: _stand_in(name, kinds.get(name, object)) for name in sorted(_KNOWN)}


def _stand_in(name: str, kind: type) -> Any:
    """A class of that name whose instances are StandIns, or empty containers, the only ones that may be filled."""
    body: dict[str, Any] = {
        "kind": kind,
        "__module__": name.rpartition(".")[0],
        "__qualname__": name.rpartition(".")[2],
    }
    if kind is not object:
        body["__new__"] = lambda _, *__: kind()
    return type(name, (StandIn,), body)


def _is_class(name: str) -> bool:
    """Whether a name is that of a class, and none of Python's own, of which some run commands."""
    module, _, last = name.rpartition(".")
    if module == "torch.nn.functional":  # an activation among the settings; it has a stand-in, and is not called
        return True
    return module.partition(".")[0] not in sys.stdlib_module_names | {"numpy"} and last.lstrip("_")[:1].isupper()
