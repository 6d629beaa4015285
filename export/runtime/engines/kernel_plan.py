"""The plan of a kernel engine: which kernels are launched on what, for each batch size. Checked before anything runs.

The C++ runtime reads the same plan and refuses the same ones (kernels/runtime/kernel_engine.cpp).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

ITEM_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_DESCRIBED = ("float16", "bfloat16", "float32")  # types of what is loaded in boxes
_GIVEN = {"inputs": ("float32", "uint8"), "outputs": ("float32",)}
LAYOUTS = ("NCHW", "NHWC", "")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
PARAMETERS = ("pointer", "i32", "i64", *(f"descriptor:{rank}" for rank in range(1, 6)))
ALIGNMENT = 256  # of what the runtimes place or copy in device memory
_POINTER_ALIGNMENT = 16  # that kernels are compiled for
DESCRIPTOR_BYTES = 128
PARAMETER_BYTES = 4096  # that a launch may pass
_SWIZZLE_BYTES = (0, 32, 64, 128)
_MOST = 2**40  # bytes of an allocation, and elements along an axis
_SHA256, _DECIMAL, _TARGET = (re.compile(p) for p in ("[0-9a-f]{64}", "[1-9][0-9]{0,5}", "sm_[1-9][0-9]{1,2}"))


class PlanError(ValueError):
    """A plan is not what this version reads; one line that says where and what was expected."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its shape without the batch; its layout is NCHW, NHWC, or empty where it is no image."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def row_bytes(self) -> int:
        """Of one image."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Weight:
    """A tensor of the file and its place in the weights' allocation."""

    tensor: str
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Kernel:
    """A function of a cubin.

    Attributes:
        cubin: its sha256, by which the file names it.
        symbol: of the function.
        warps: per block.
        shared: bytes of dynamic shared memory.
        pdl: whether it may start before the launch in front of it has ended, for which it waits itself.
        parameters: of PARAMETERS, in order; two null pointers follow that are not listed.
    """

    cubin: str
    symbol: str
    warps: int
    shared: int
    pdl: bool
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Pointer:
    """A place in one of the two allocations: `weight`, or `arena` for what a run computes."""

    space: str
    offset: int


@dataclass(frozen=True)
class Descriptor:
    """A tensor as TMA sees it, outermost axis first: strides in elements, sides of a box, swizzle 0 to 3."""

    base: Pointer
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


Argument = Pointer | Descriptor | int | None  # None is a null pointer


@dataclass(frozen=True)
class Launch:
    """One launch: the number of a kernel, the blocks along each axis, and an argument for each of its parameters."""

    kernel: int
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Table:
    """What a batch size launches.

    Attributes:
        arena: bytes of its activations.
        zeroed: (offset, bytes) in the arena that is 0 before the first run, and left so by every run.
        inputs, outputs: name -> offset in the arena.
        launches: in order.
    """

    arena: int
    zeroed: tuple[int, int]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Plan:
    """What a file of kernels computes, and how.

    Attributes:
        target: the architecture, such as sm_87.
        precision: of weights and activations.
        driver: the least that cuDriverGetVersion may say.
        compilers: name -> version of what made the machine code.
        inputs, outputs: in the order of the network.
        weights, kernels: by their numbers.
        batches: batch size -> its table, in ascending order.
    """

    target: str
    precision: str
    driver: int
    compilers: Mapping[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[Weight, ...]
    kernels: tuple[Kernel, ...]
    batches: Mapping[int, Table]

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability of its target: (8, 7)."""
        number = int(self.target.removeprefix("sm_"))
        return number // 10, number % 10

    @property
    def weights_bytes(self) -> int:
        return _extent(self.weights)

    @property
    def arena_bytes(self) -> int:
        """Of the one arena that all batch sizes share."""
        return max(table.arena for table in self.batches.values())

    @property
    def uses_descriptors(self) -> bool:
        return any(kind.startswith("descriptor:") for kernel in self.kernels for kind in kernel.parameters)

    def batch_for(self, count: int) -> int | None:
        """The batch size that runs `count` images: the smallest that holds them; None where none does."""
        return next((size for size in self.batches if size >= count), None)

    def obstacle(self, capability: tuple[int, int], driver: int, shared: int) -> str:
        """Why a device of this compute capability, driver and shared memory per block cannot run it; or empty."""
        if capability != self.capability:
            return f"it is for {self.target}, this GPU is sm_{capability[0]}{capability[1]}: export it for that one"
        if driver < self.driver:
            needed, found = version(self.driver), version(driver)
            return f"it needs a driver for CUDA {needed} or newer, the one here is for {found}: update it"
        most = max(kernel.shared for kernel in self.kernels)
        if most > shared:
            return f"it needs {most} bytes of shared memory per block, this GPU has {shared}"
        return ""


def version(driver: int) -> str:
    """13.1 for 13010, as cuDriverGetVersion counts."""
    return f"{driver // 1000}.{driver % 1000 // 10}"


def parse_plan(text: str) -> Plan:
    """A plan from its JSON text, every number of it checked.

    Raises:
        PlanError: it is not a plan that this version reads.
    """
    return _Reader(read_json(text)).plan()


def read_json(text: str) -> Any:
    """JSON without what its readers disagree on: repeated keys, and numbers that are not whole.

    Raises:
        PlanError: it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_not_whole, parse_constant=_not_whole)
    except PlanError:
        raise
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not JSON ({type(error).__name__})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise PlanError("a key stands twice in one object of its JSON")
    return found


def _not_whole(text: str) -> NoReturn:
    raise PlanError(f"{text:.20} is no whole number")


def _extent(weights: Sequence[Weight]) -> int:
    return max((weight.offset + weight.bytes for weight in weights), default=0)


def _fail(where: str, expected: str, value: object) -> NoReturn:
    # A list or object of a file may be long, and nested too deeply to be written.
    got = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(str(value)[:60])
    raise PlanError(f"{where}: expected {expected}, got {got}")


def _object(value: Any, where: str, keys: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(where, "an object", value)
    if value.keys() != set(keys):
        unknown, missing = sorted(value.keys() - set(keys)), sorted(set(keys) - value.keys())
        wrong = f"the key {unknown[0]!r:.60} is not known" if unknown else f"the key {missing[0]!r} is missing"
        raise PlanError(f"{where}: {wrong}")
    return value


def _list(value: Any, where: str, least: int = 0, most: int = 10**6) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        _fail(where, f"a list of {least} to {most}", value)
    return value


def _number(value: Any, where: str, low: int, high: int, multiple: int = 1) -> int:
    if type(value) is not int or not low <= value <= high or value % multiple:
        of = f", a multiple of {multiple}" if multiple > 1 else ""
        _fail(where, f"a whole number from {low} to {high}{of}", value)
    return int(value)


def _text(value: Any, where: str) -> str:
    """At most 200 bytes, none of which steers a terminal."""
    if not isinstance(value, str) or not 1 <= len(value.encode(errors="replace")) <= 200:
        _fail(where, "a text of 1 to 200 bytes", value)
    if any(ord(letter) < 32 or ord(letter) == 127 or "\ud800" <= letter <= "\udfff" for letter in value):
        _fail(where, "a text", value)
    return value


def _one_of(value: Any, where: str, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        _fail(where, f"one of {', '.join(repr(word) for word in known)}", value)
    return value


def _matching(value: Any, where: str, pattern: re.Pattern[str], expected: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        _fail(where, expected, value)
    return value


class _Reader:
    """Reads one plan."""

    def __init__(self, value: Any) -> None:
        keys = ("target", "precision", "driver", "compilers", "inputs", "outputs", "weights", "kernels", "batches")
        self._value = _object(value, "the plan", keys)

    def plan(self) -> Plan:
        value = self._value
        compilers = _object(value["compilers"], "compilers", ("triton", "ptxas"))
        self._inputs, self._outputs = self._tensors("inputs"), self._tensors("outputs")
        self._weights = self._placed_weights()
        self._kernels = self._each("kernels", self._kernel)
        sizes = value["batches"]
        if not isinstance(sizes, dict) or not sizes:
            _fail("batches", "an object with a batch size", sizes)
        for size in sizes:
            _matching(size, "batches", _DECIMAL, "a batch size of 1 to 999999")
        return Plan(
            target=_matching(value["target"], "target", _TARGET, "an architecture such as 'sm_87'"),
            precision=_one_of(value["precision"], "precision", PRECISIONS),
            driver=_number(value["driver"], "driver", 12000, 10**6),
            compilers={name: _text(compilers[name], f"compilers.{name}") for name in compilers},
            inputs=self._inputs,
            outputs=self._outputs,
            weights=self._weights,
            kernels=self._kernels,
            batches={size: self._table(size, sizes[str(size)]) for size in sorted(map(int, sizes))},
        )

    def _each(self, key: str, read: Callable[[Any, str], Any]) -> tuple[Any, ...]:
        least = 0 if key == "weights" else 1
        return tuple(read(entry, f"{key}[{index}]") for index, entry in enumerate(_list(self._value[key], key, least)))

    def _tensors(self, key: str) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self._each(key, lambda entry, where: self._tensor(entry, where, _GIVEN[key]))
        if len({tensor.name for tensor in found}) != len(found):
            _fail(key, "different names", [tensor.name for tensor in found])
        return found

    def _tensor(self, value: Any, where: str, dtypes: Sequence[str]) -> Tensor:
        value = _object(value, where, ("name", "dtype", "shape", "layout"))
        shape = tuple(_number(n, f"{where}.shape", 1, 2**31 - 1) for n in _list(value["shape"], f"{where}.shape", 0, 8))
        if math.prod(shape) > _MOST:
            _fail(f"{where}.shape", f"at most {_MOST} elements", list(shape))
        return Tensor(
            name=_text(value["name"], f"{where}.name"),
            dtype=_one_of(value["dtype"], f"{where}.dtype", dtypes),
            shape=shape,
            layout=_one_of(value["layout"], f"{where}.layout", LAYOUTS),
        )

    def _placed_weights(self) -> tuple[Weight, ...]:
        found: tuple[Weight, ...] = self._each("weights", self._weight)
        if len({weight.tensor for weight in found}) != len(found):
            raise PlanError("weights: a tensor stands twice")
        placed = sorted(found, key=lambda weight: weight.offset)
        for before, after in itertools.pairwise(placed):
            if before.offset + before.bytes > after.offset:
                raise PlanError(f"weights: {before.tensor} and {after.tensor} overlap")
        return found

    def _weight(self, value: Any, where: str) -> Weight:
        value = _object(value, where, ("tensor", "offset", "bytes", "sha256"))
        return Weight(
            tensor=_text(value["tensor"], f"{where}.tensor"),
            offset=_number(value["offset"], f"{where}.offset", 0, _MOST, ALIGNMENT),
            bytes=_number(value["bytes"], f"{where}.bytes", 1, _MOST),
            sha256=_matching(value["sha256"], f"{where}.sha256", _SHA256, "a sha256"),
        )

    def _kernel(self, value: Any, where: str) -> Kernel:
        value = _object(value, where, ("cubin", "symbol", "warps", "ctas", "shared", "pdl", "parameters"))
        if type(value["pdl"]) is not bool:
            _fail(f"{where}.pdl", "true or false", value["pdl"])
        _number(value["ctas"], f"{where}.ctas", 1, 1)
        parameters = _list(value["parameters"], f"{where}.parameters", 0, PARAMETER_BYTES // 4)
        kinds = tuple(_one_of(kind, f"{where}.parameters[{i}]", PARAMETERS) for i, kind in enumerate(parameters))
        if parameter_bytes(kinds) > PARAMETER_BYTES:
            _fail(f"{where}.parameters", f"at most {PARAMETER_BYTES} bytes", parameter_bytes(kinds))
        return Kernel(
            cubin=_matching(value["cubin"], f"{where}.cubin", _SHA256, "a sha256"),
            symbol=_text(value["symbol"], f"{where}.symbol"),
            warps=_number(value["warps"], f"{where}.warps", 1, 32),
            shared=_number(value["shared"], f"{where}.shared", 0, 2**20),
            pdl=value["pdl"],
            parameters=kinds,
        )

    def _table(self, size: int, value: Any) -> Table:
        where = f"batches.{size}"
        value = _object(value, where, ("arena", "zeroed", "inputs", "outputs", "launches"))
        arena = _number(value["arena"], f"{where}.arena", 1, _MOST)
        pair = _list(value["zeroed"], f"{where}.zeroed", 2, 2)
        offset = _number(pair[0], f"{where}.zeroed", 0, arena, ALIGNMENT)
        zeroed = (offset, _number(pair[1], f"{where}.zeroed", 0, arena - offset))
        spaces = {"arena": arena, "weight": _extent(self._weights)}
        launches = _list(value["launches"], f"{where}.launches", 1)
        return Table(
            arena=arena,
            zeroed=zeroed,
            inputs=self._places(value["inputs"], f"{where}.inputs", self._inputs, size, arena),
            outputs=self._places(value["outputs"], f"{where}.outputs", self._outputs, size, arena),
            launches=tuple(self._launch(v, f"{where}.launches[{i}]", spaces) for i, v in enumerate(launches)),
        )

    def _places(self, value: Any, where: str, tensors: Sequence[Tensor], size: int, arena: int) -> dict[str, int]:
        value, found = _object(value, where, [tensor.name for tensor in tensors]), {}
        for tensor in tensors:
            most = arena - size * tensor.row_bytes
            found[tensor.name] = _number(value[tensor.name], f"{where}.{tensor.name}", 0, most, ALIGNMENT)
        return found

    def _launch(self, value: Any, where: str, spaces: Mapping[str, int]) -> Launch:
        value = _object(value, where, ("kernel", "grid", "arguments"))
        number = _number(value["kernel"], f"{where}.kernel", 0, len(self._kernels) - 1)
        limits = zip(_list(value["grid"], f"{where}.grid", 3, 3), (2**31 - 1, 65535, 65535), strict=True)
        grid = tuple(_number(blocks, f"{where}.grid", 1, most) for blocks, most in limits)
        kinds = self._kernels[number].parameters
        arguments = _list(value["arguments"], f"{where}.arguments", len(kinds), len(kinds))
        pairs = enumerate(zip(arguments, kinds, strict=True))
        return Launch(
            number, grid, tuple(self._argument(v, f"{where}.arguments[{i}]", kind, spaces) for i, (v, kind) in pairs)
        )

    def _argument(self, value: Any, where: str, kind: str, spaces: Mapping[str, int]) -> Argument:
        if not isinstance(value, dict) or len(value) != 1:
            _fail(where, "an object with one key", value)
        ((key, inner),) = value.items()
        if kind == "pointer" and key == "null":
            if inner is not True:
                _fail(where, "true", inner)
            return None
        if kind == "pointer" and key in spaces:
            return self._pointer(value, where, spaces)
        if kind in ("i32", "i64") and key == "value":
            most = 2 ** (int(kind[1:]) - 1)
            return _number(inner, where, -most, most - 1)
        if kind.startswith("descriptor:") and key == "descriptor":
            return self._descriptor(inner, where, int(kind[-1]), spaces)
        _fail(where, f"the argument of a parameter of kind {kind}", key)

    def _pointer(self, value: Any, where: str, spaces: Mapping[str, int]) -> Pointer:
        if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= spaces.keys():
            _fail(where, "a weight or a place in the arena", value)
        ((space, offset),) = value.items()
        offset = _number(offset, where, 0, spaces[space] - 1, _POINTER_ALIGNMENT)
        if space == "weight" and all(weight.offset != offset for weight in self._weights):
            _fail(where, "the offset of a weight", offset)
        return Pointer(space, offset)

    def _descriptor(self, value: Any, where: str, rank: int, spaces: Mapping[str, int]) -> Descriptor:
        value = _object(value, where, ("base", "dtype", "shape", "strides", "box", "swizzle"))
        base = self._pointer(value["base"], f"{where}.base", spaces)
        dtype = _one_of(value["dtype"], f"{where}.dtype", _DESCRIBED)
        item, swizzle = ITEM_BYTES[dtype], _number(value["swizzle"], f"{where}.swizzle", 0, 3)
        shape, strides, box = (_list(value[key], f"{where}.{key}", rank, rank) for key in ("shape", "strides", "box"))
        for axis in range(rank):
            _number(shape[axis], f"{where}.shape", 1, 2**31 - 1)
            _number(box[axis], f"{where}.box", 1, 256)
            inner = axis == rank - 1
            _number(strides[axis], f"{where}.strides", 1, 1 if inner else _MOST // item, 1 if inner else 16 // item)
        line = box[-1] * item
        if line % 16 or (swizzle and line > _SWIZZLE_BYTES[swizzle]):
            _fail(f"{where}.box", f"rows of a multiple of 16 bytes that swizzle {swizzle} holds", box)
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if base.offset + (last + 1) * item > spaces[base.space]:
            _fail(where, f"a tensor within the {spaces[base.space]} bytes of its allocation", shape)
        return Descriptor(base, dtype, tuple(shape), tuple(strides), tuple(box), swizzle)


def parameter_bytes(kinds: Sequence[str]) -> int:
    """Of the parameters of a kernel, the two null pointers that end them included."""
    end = 0
    for kind in (*kinds, "pointer", "pointer"):
        for size in parameter_sizes(kind):
            end = -(-end // min(size, 64)) * min(size, 64) + size
    return end


def parameter_sizes(kind: str) -> list[int]:
    """Bytes of the machine's parameters that one of the plan's becomes; each is aligned to that, or to 64."""
    if kind.startswith("descriptor:"):
        rank = int(kind[-1])
        return [DESCRIPTOR_BYTES, *[4] * rank, *[8] * rank]
    return [4 if kind == "i32" else 8]
