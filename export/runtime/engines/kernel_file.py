"""The file of a kernel engine: a safetensors container of machine code and packed weights, and the plan in its header.

Nothing in it is used before all of it was checked: that it is whole, that plan, machine code and weights have the
hashes that are written beside them, and that the plan stays within its own memory.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from export.base.errors import ExportError
from export.runtime.engines.kernel_plan import Plan, PlanError, parse_plan, read_json

FORMAT, VERSION = "resnet-deploy.kernels", "1"
NAME = re.compile(r"model\.(sm_[1-9][0-9]{1,2})\.kernels")  # of such a file in a bundle
_MOST_HEADER = 100 << 20  # as safetensors itself
_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8},
}
_METADATA = {"format", "version", "plan", "sha256"}
_ELF, _CUDA = b"\x7fELF", 190  # of a cubin: what it begins with, and its machine


def file_name(target: str) -> str:
    """What the engine of an architecture is called in a bundle."""
    return f"model.{target}.kernels"


@dataclass(frozen=True)
class KernelFile:
    """A file that was checked: its plan, its cubins by sha256, and the bytes of its weights by tensor."""

    plan: Plan
    cubins: Mapping[str, memoryview] = field(repr=False)
    weights: Mapping[str, memoryview] = field(repr=False)


def read_kernel_file(content: bytes) -> KernelFile:
    """Check a file and take it apart, without copying it.

    Raises:
        ExportError: it is truncated, altered, of another version or no such file at all.
    """
    try:
        return _read(memoryview(content))
    except PlanError as error:
        raise ExportError(f"not a kernel engine that this version reads: {error}") from error


def _read(content: memoryview) -> KernelFile:
    metadata, tensors = _container(content)
    if metadata.get("format") != FORMAT:
        raise PlanError(f"its format is {metadata.get('format')!r:.40}, expected {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise PlanError(f"its version is {metadata.get('version')!r:.40}, expected {VERSION!r}: export it again")
    if metadata.keys() != _METADATA:
        raise PlanError(f"its metadata is {', '.join(sorted(metadata))}, expected {', '.join(sorted(_METADATA))}"[:200])
    text = metadata["plan"]
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:
        raise PlanError("its plan is no text") from None
    if digest != metadata["sha256"]:
        raise PlanError("its plan was altered: it has another sha256")
    plan = parse_plan(text)
    cubins = {kernel.cubin: f"cubin.{kernel.cubin}" for kernel in plan.kernels}
    expected = {*cubins.values(), *(weight.tensor for weight in plan.weights)}
    if tensors.keys() != expected or len(expected) != len(cubins) + len(plan.weights):
        raise PlanError(f"its tensors are not those of its plan: {min(tensors.keys() ^ expected, default='')!r:.80}")
    for sha256, name in cubins.items():
        _check_hash(tensors[name], sha256, name)
        if tensors[name][:4] != _ELF or int.from_bytes(tensors[name][18:20], "little") != _CUDA:
            raise PlanError(f"{name:.20} is no machine code of a GPU")
    for weight in plan.weights:
        if len(tensors[weight.tensor]) != weight.bytes:
            raise PlanError(f"{weight.tensor} has {len(tensors[weight.tensor])} bytes, its plan says {weight.bytes}")
        _check_hash(tensors[weight.tensor], weight.sha256, weight.tensor)
    return KernelFile(
        plan,
        {sha256: tensors[name] for sha256, name in cubins.items()},
        {weight.tensor: tensors[weight.tensor] for weight in plan.weights},
    )


def _check_hash(data: memoryview, sha256: str, name: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise PlanError(f"{name:.20} was altered: it has another sha256")


def _container(content: memoryview) -> tuple[dict[str, str], dict[str, memoryview]]:
    """Metadata and tensors by name of a safetensors container, whose data they cover without a gap."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or not 2 <= length <= min(_MOST_HEADER, len(content) - 8):
        raise PlanError(f"{len(content)} bytes that are no safetensors file, or one that was cut off")
    try:
        text = bytes(content[8 : 8 + length]).decode()
    except UnicodeDecodeError:
        raise PlanError("its header is no text") from None
    header = read_json(text) if text.startswith("{") else None
    if not isinstance(header, dict):
        raise PlanError("its header is no object of JSON")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PlanError("its metadata is no object of texts")
    data, end, tensors = content[8 + length :], 0, {}
    ranges = [(*_range(entry), name) for name, entry in header.items()]
    for start, stop, name in sorted(ranges):
        if start != end:
            raise PlanError(f"its tensors overlap or leave a gap at {name!r:.80}")
        tensors[name], end = data[start:stop], stop
    if end != len(data):
        raise PlanError(f"its tensors have {end} bytes, the file has {len(data)}: it was cut off or continued")
    return metadata, tensors


def _range(entry: Any) -> tuple[int, int]:
    """Where a tensor of the header lies, whose type and shape have as many bytes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PlanError("an entry of its header is no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(isinstance(value, list) and all(type(n) is int for n in value) for value in (shape, offsets)):
        raise PlanError("an entry of its header is no tensor")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES or len(offsets) != 2 or len(shape) > 16:
        raise PlanError("an entry of its header is no tensor")
    if not all(0 <= n < 2**63 for n in (*shape, *offsets)) or not offsets[0] <= offsets[1]:
        raise PlanError("an entry of its header is no tensor")
    if math.prod(shape) * _ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise PlanError("a tensor of its header has another size than its type and shape")
    return offsets[0], offsets[1]
