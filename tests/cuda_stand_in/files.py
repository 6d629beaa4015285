"""Files of kernel engines, sound or not; nothing of Triton is needed.

The network that they hold, in all that follows, has two kernels:

    hidden = relu(x w0 + b0)   x [N, 1, 8, 8] float32, hidden [N, 32] float16
    output = hidden w1 + b1    split between two programs, the last of which adds up; [N, 10] float32
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCHES = (1, 3, 20)
PIXELS, HIDDEN, CLASSES, ROWS = 64, 32, 10, 16  # ROWS: of one program
Tensors = dict[str, NDArray[Any]]


def weights() -> Tensors:
    """w0 [64, 32] and w2 [32, 10] float16, the biases w1 and w3 float32."""
    rng = np.random.default_rng(7)
    return {
        "w0": rng.normal(0, 0.2, (PIXELS, HIDDEN)).astype(np.float16),
        "w1": rng.normal(0, 0.2, HIDDEN).astype(np.float32),
        "w2": rng.normal(0, 0.2, (HIDDEN, CLASSES)).astype(np.float16),
        "w3": rng.normal(0, 0.2, CLASSES).astype(np.float32),
    }


def reference(x: NDArray[Any]) -> NDArray[Any]:
    """[N, 10] in float64, but for the rounding of the input and of what is hidden."""
    w0, b0, w1, b1 = (value.astype(np.float64) for value in weights().values())
    hidden = np.maximum(x.reshape(len(x), -1).astype(np.float16) @ w0 + b0, 0).astype(np.float16)
    found: NDArray[Any] = hidden @ w1 + b1
    return found


def images(count: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(0, 1, (count, 1, 8, 8)).astype(np.float32)


def a_plan(
    target: str, kernels: Sequence[Mapping[str, Any]], boxes: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The plan of the network.

    Args:
        kernels: "cubin", "symbol", "warps" and "shared" of each.
        boxes: "block_size" and "swizzle" of the first one's tensor descriptors; none where it takes pointers.
    """
    placed, offset = [], 0
    for name, values in weights().items():
        sha256 = hashlib.sha256(values.tobytes()).hexdigest()
        placed.append({"tensor": name, "offset": offset, "bytes": values.nbytes, "sha256": sha256})
        offset += _aligned(values.nbytes)
    kinds = [*["descriptor:2" if boxes else "pointer"] * 2, "pointer", "pointer", "i32"], [*["pointer"] * 6, "i32"]
    facts = {"ctas": 1, "pdl": int(target.removeprefix("sm_")) >= 90}
    return {
        "target": target,
        "precision": "fp16",
        "driver": 12000,
        "compilers": {"triton": "3.9.0", "ptxas": "12.9.86"},
        "inputs": [{"name": "input", "dtype": "float32", "shape": [1, 8, 8], "layout": "NCHW"}],
        "outputs": [{"name": "output", "dtype": "float32", "shape": [CLASSES], "layout": ""}],
        "weights": placed,
        "kernels": [{**kernel, **facts, "parameters": of} for kernel, of in zip(kernels, kinds, strict=True)],
        "batches": {str(n): _table(n, placed, boxes) for n in BATCHES},
    }


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _table(n: int, placed: Sequence[Mapping[str, Any]], boxes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sizes = {"counters": 4 * n, "input": 4 * PIXELS * n, "hidden": 2 * HIDDEN * n, "partials": 4 * 2 * 16 * n}
    at: dict[str, dict[str, int]] = {}
    end = 0
    for name, size in {**sizes, "output": 4 * CLASSES * n}.items():
        at[name], end = {"arena": end}, end + _aligned(size)
    w0, b0, w1, b1 = ({"weight": weight["offset"]} for weight in placed)
    x: dict[str, Any] = at["input"]
    w: dict[str, Any] = w0
    if boxes:
        x, w = _descriptor(x, "float32", [n, PIXELS], boxes[0]), _descriptor(w, "float16", [PIXELS, HIDDEN], boxes[1])
    second = [at["hidden"], w1, b1, at["output"], at["partials"], at["counters"], {"value": n}]
    return {
        "arena": end,
        "zeroed": [0, 4 * n],
        "inputs": {"input": at["input"]["arena"]},
        "outputs": {"output": at["output"]["arena"]},
        "launches": [
            {"kernel": 0, "grid": [-(-n // ROWS), 1, 1], "arguments": [x, w, b0, at["hidden"], {"value": n}]},
            {"kernel": 1, "grid": [n, 2, 1], "arguments": second},
        ],
    }


def _descriptor(base: Mapping[str, int], dtype: str, shape: list[int], box: Mapping[str, Any]) -> dict[str, Any]:
    sides = {"box": [*box["block_size"]], "swizzle": box["swizzle"]}
    return {"descriptor": {"base": base, "dtype": dtype, "shape": shape, "strides": [shape[1], 1], **sides}}


def packed(plan: Any, tensors: Mapping[str, NDArray[Any]], /, **metadata: str) -> bytes:
    """The file of a plan, whatever that says; `metadata` in place of what belongs there."""
    text = json.dumps(plan)
    facts = {"format": "resnet-deploy.kernels", "version": "1", "plan": text}
    facts["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    header: dict[str, Any] = {"__metadata__": facts | metadata}
    types, data = {"float16": "F16", "float32": "F32", "uint8": "U8"}, b""
    for name, values in tensors.items():
        offsets = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": types[values.dtype.name], "shape": [*values.shape], "data_offsets": offsets}
        data += values.tobytes()
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data


def unpacked(content: bytes) -> tuple[dict[str, Any], Tensors]:
    """The plan of a sound file, and its tensors as `packed` takes them."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    plan = json.loads(header.pop("__metadata__")["plan"])
    types = {"F16": np.float16, "F32": np.float32, "U8": np.uint8}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[start:stop], types[entry["dtype"]]).reshape(entry["shape"])
    return plan, tensors


def by_hand(boxes: bool = False) -> bytes:
    """A sound file whose machine code is none that a GPU runs: what is checked before it is loaded."""
    tensors, kernels = {}, []
    for index in range(2):
        cubin = np.frombuffer(b"\x7fELF" + bytes(14) + (190).to_bytes(2, "little") + bytes([index]) * 100, np.uint8)
        sha256 = hashlib.sha256(cubin.tobytes()).hexdigest()
        tensors[f"cubin.{sha256}"] = cubin
        kernels.append({"cubin": sha256, "symbol": f"_kernel_{index}", "warps": 4, "shared": 49152})
    sides = [{"block_size": [16, 32], "swizzle": 3}, {"block_size": [64, 32], "swizzle": 2}] if boxes else []
    return packed(a_plan("sm_90" if boxes else "sm_87", kernels, sides), {**tensors, **weights()})


# What makes a sound file one that is refused: an edit of its plan, and what the refusal says of it.
Edit = Callable[[dict[str, Any]], object]


def _launch(plan: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = plan["batches"]["3"]["launches"][number]
    return found


def _argument(index: int, value: Any, number: int = 0) -> Edit:
    return lambda plan: _launch(plan, number)["arguments"].__setitem__(index, value)


def _box(**changes: Any) -> Edit:
    """Of the first descriptor of by_hand(boxes=True)."""
    return lambda plan: _launch(plan)["arguments"][0]["descriptor"].update(changes)


def _at_3(**changes: Any) -> Edit:
    return lambda plan: plan["batches"]["3"].update(changes)


BROKEN_PLANS: dict[str, tuple[Edit, str]] = {
    "unknown key": (lambda p: p.update(note="x"), "the plan: the key 'note' is not known"),
    "missing key": (lambda p: p.pop("driver"), "the plan: the key 'driver' is missing"),
    "unknown key inside": (lambda p: p["kernels"][0].update(note=1), "kernels[0]: the key 'note' is not known"),
    "no architecture": (lambda p: p.update(target="gfx90a"), "target: expected an architecture such as 'sm_87'"),
    "arch-specific name": (lambda p: p.update(target="sm_90a"), "target: expected an architecture such as 'sm_87'"),
    "unknown precision": (lambda p: p.update(precision="fp8"), "precision: expected one of"),
    "driver as text": (lambda p: p.update(driver="12000"), "driver: expected a whole number from 12000"),
    "driver before tensor maps": (lambda p: p.update(driver=11080), "driver: expected a whole number from 12000"),
    "compilers unknown": (lambda p: p["compilers"].update(nvcc="1"), "compilers: the key 'nvcc' is not known"),
    "unknown dtype": (lambda p: p["inputs"][0].update(dtype="int8"), "inputs[0].dtype: expected one of 'float32'"),
    "bytes come out": (lambda p: p["outputs"][0].update(dtype="uint8"), "outputs[0].dtype: expected one of 'float32'"),
    "unknown layout": (lambda p: p["inputs"][0].update(layout="CHWN"), "inputs[0].layout: expected one of"),
    "name that steers": (lambda p: p["inputs"][0].update(name="a\x1b[31m"), "inputs[0].name: expected a text"),
    "no outputs": (lambda p: p.update(outputs=[]), "outputs: expected a list of 1"),
    "two of a name": (lambda p: p["inputs"].append(p["inputs"][0]), "inputs: expected different names"),
    "huge input": (lambda p: p["inputs"][0].update(shape=[2**20, 2**20, 2]), "inputs[0].shape: expected at most"),
    "number that is none": (lambda p: p["inputs"][0].update(shape=[1, 8, True]), "inputs[0].shape: expected a whole"),
    "fraction": (lambda p: p["inputs"][0].update(shape=[1, 8, 8.0]), "whole number"),
    "weight between": (lambda p: p["weights"][1].update(offset=4000), "weights[1].offset: expected a whole number"),
    "weights overlap": (lambda p: p["weights"][1].update(offset=256), "weights: w0 and w1 overlap"),
    "weight twice": (lambda p: p["weights"][1].update(tensor="w0"), "weights: a tensor stands twice"),
    "weight of other size": (lambda p: p["weights"][0].update(bytes=4000), "w0 has 4096 bytes, its plan says 4000"),
    "weight unnamed": (lambda p: p["weights"].pop(), "[1].arguments[2]: expected a whole number from 0 to 4991"),
    "cubin unnamed": (lambda p: p["kernels"][1].update(cubin=p["kernels"][0]["cubin"]), "tensors are not those"),
    "kernel of no cubin": (lambda p: p["kernels"][0].update(cubin="0" * 64), "its tensors are not those of its plan"),
    "symbol empty": (lambda p: p["kernels"][0].update(symbol=""), "kernels[0].symbol: expected a text"),
    "no warps": (lambda p: p["kernels"][0].update(warps=0), "kernels[0].warps: expected a whole number from 1 to 32"),
    "cluster": (lambda p: p["kernels"][0].update(ctas=2), "kernels[0].ctas: expected a whole number from 1 to 1"),
    "shared memory": (lambda p: p["kernels"][0].update(shared=2**21), "kernels[0].shared: expected a whole number"),
    "pdl as number": (lambda p: p["kernels"][0].update(pdl=1), "kernels[0].pdl: expected true or false"),
    "unknown parameter": (lambda p: p["kernels"][0]["parameters"].append("f32"), "kernels[0].parameters[5]: expected"),
    "parameter too many": (lambda p: p["kernels"][0]["parameters"].append("i32"), "arguments: expected a list of 6"),
    "parameters too long": (lambda p: p["kernels"][0].update(parameters=["descriptor:5"] * 25), "at most 4096 bytes"),
    "no batches": (lambda p: p.update(batches={}), "batches: expected an object with a batch size"),
    "batch 03": (lambda p: p["batches"].update({"03": p["batches"]["3"]}), "batches: expected a batch size"),
    "arena too small": (_at_3(arena=1024), "batches.3"),
    "zeroed outside": (_at_3(zeroed=[0, 10**6]), "batches.3.zeroed: expected a whole number from 0 to"),
    "input outside": (_at_3(inputs={"input": 2048}), "batches.3.inputs.input: expected a whole number from 0 to"),
    "input not aligned": (_at_3(inputs={"input": 4}), "a multiple of 256"),
    "output of another name": (_at_3(outputs={"y": 0}), "batches.3.outputs: the key 'y' is not known"),
    "no launches": (_at_3(launches=[]), "batches.3.launches: expected a list of 1"),
    "kernel outside": (lambda p: _launch(p).update(kernel=2), "[0].kernel: expected a whole number from 0 to 1"),
    "kernel negative": (lambda p: _launch(p).update(kernel=-1), "launches[0].kernel: expected a whole number"),
    "grid of nothing": (lambda p: _launch(p).update(grid=[0, 1, 1]), "[0].grid: expected a whole number from 1 to"),
    "grid too deep": (lambda p: _launch(p).update(grid=[1, 1, 65536]), "launches[0].grid: expected a whole number"),
    "grid of two": (lambda p: _launch(p).update(grid=[1, 1]), "launches[0].grid: expected a list of 3 to 3"),
    "argument too few": (lambda p: _launch(p)["arguments"].pop(), "launches[0].arguments: expected a list of 5 to 5"),
    "pointer outside": (_argument(3, {"arena": 2**20}), "launches[0].arguments[3]: expected a whole number from 0 to"),
    "pointer not aligned": (_argument(3, {"arena": 8}), "launches[0].arguments[3]: expected a whole number"),
    "pointer into a weight": (_argument(2, {"weight": 256}), "arguments[2]: expected the offset of a weight"),
    "pointer to nowhere": (_argument(2, {"stack": 0}), "arguments[2]: expected the argument of a parameter of kind"),
    "null that is false": (_argument(2, {"null": False}), "arguments[2]: expected true"),
    "number for a pointer": (_argument(2, {"value": 0}), "expected the argument of a parameter of kind pointer"),
    "pointer for a number": (_argument(4, {"arena": 0}), "expected the argument of a parameter of kind i32"),
    "number too large": (_argument(4, {"value": 2**31}), "arguments[4]: expected a whole number from -2147483648"),
    "two arguments in one": (_argument(4, {"value": 1, "arena": 0}), "arguments[4]: expected an object with one key"),
    "descriptor for a pointer": (_argument(0, {"descriptor": {}}), "the argument of a parameter of kind pointer"),
}  # fmt: skip

BROKEN_BOXES: dict[str, tuple[Edit, str]] = {
    "pointer for a descriptor": (_argument(0, {"arena": 0}), "the argument of a parameter of kind descriptor:2"),
    "another rank": (_box(shape=[3, 8, 8]), "arguments[0].shape: expected a list of 2 to 2"),
    "beyond the arena": (_box(shape=[300, 64]), "expected a tensor within the"),
    "stride of 8 bytes": (_box(strides=[66, 1]), "arguments[0].strides: expected a whole number from 1 to"),
    "innermost stride": (_box(strides=[64, 2]), "arguments[0].strides: expected a whole number from 1 to 1"),
    "box too long": (_box(box=[257, 32]), "arguments[0].box: expected a whole number from 1 to 256"),
    "box wider than its swizzle": (_box(swizzle=1), "rows of a multiple of 16 bytes that swizzle 1 holds"),
    "box of 12 bytes": (_box(box=[16, 3], swizzle=0), "rows of a multiple of 16 bytes that swizzle 0 holds"),
    "unknown swizzle": (_box(swizzle=4), "arguments[0].swizzle: expected a whole number from 0 to 3"),
    "unknown dtype": (_box(dtype="int8"), "arguments[0].dtype: expected one of"),
    "base outside": (_box(base={"arena": -256}), "arguments[0].base: expected a whole number from 0 to"),
    "base of no space": (_box(base={"null": True}), "arguments[0].base: expected a weight or a place in the arena"),
}


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Name -> a file, and what its refusal says."""
    found = {}
    for boxes, table in ((False, BROKEN_PLANS), (True, BROKEN_BOXES)):
        sound = by_hand(boxes)
        for name, (edit, words) in table.items():
            plan, tensors = unpacked(sound)
            edit(plan)
            found[f"plan: {name}"] = (packed(plan, tensors), words)
    sound = by_hand()
    plan, tensors = unpacked(sound)
    cubin = next(iter(tensors))
    text = json.dumps(plan)
    flipped = bytearray(sound)
    flipped[-1] ^= 1  # of the last weight
    in_code = bytearray(sound)
    in_code[-sum(values.nbytes for values in tensors.values()) + 60] ^= 1
    plain = {name: values for name, values in tensors.items() if name != cubin}
    twice = text.replace('"driver"', '"target": "sm_87", "driver"', 1)
    no_code = {**tensors, cubin: np.zeros(120, np.uint8)}
    hashed = {"sha256": hashlib.sha256(twice.encode()).hexdigest()}
    fake = hashlib.sha256(bytes(120)).hexdigest()
    renamed = {f"cubin.{fake}" if name == cubin else name: values for name, values in no_code.items()}
    for kernel in (changed := json.loads(text))["kernels"]:
        kernel["cubin"] = fake if f"cubin.{kernel['cubin']}" == cubin else kernel["cubin"]
    length = int.from_bytes(sound[:8], "little")
    found |= {
        "empty": (b"", "0 bytes that are no safetensors file"),
        "another format": (b"\x00\x01ftrt" * 100, "bytes that are no safetensors file"),
        "cut in the header": (sound[: length // 2], "or one that was cut off"),
        "cut in the data": (sound[:-1], "it was cut off or continued"),
        "continued": (sound + b"\0", "it was cut off or continued"),
        "header of another encoding": (sound[:8] + b"\xff" + sound[9:], "its header is no"),
        "header that is a list": (sound[:8] + b"[" + sound[9:], "its header is no object of JSON"),
        "header with a NUL": (sound[:9] + b"\0" + sound[10:], "JSON"),
        "weight altered": (bytes(flipped), "w3 was altered: it has another sha256"),
        "machine code altered": (bytes(in_code), "was altered: it has another sha256"),
        "plan altered": (packed(plan, tensors, plan=text.replace("sm_87", "sm_86")), "its plan was altered"),
        "plan that is no JSON": (packed("{", tensors, plan="{", sha256=hashlib.sha256(b"{").hexdigest()), "not JSON"),
        "key twice": (packed(plan, tensors, plan=twice, **hashed), "a key stands twice"),
        "foreign": (packed(plan, tensors, format="pt"), "its format is 'pt', expected 'resnet-deploy.kernels'"),
        "newer": (packed(plan, tensors, version="2"), "its version is '2', expected '1': export it again"),
        "metadata unknown": (packed(plan, tensors, note="x"), "its metadata is "),
        "tensor missing": (packed(plan, plain), "its tensors are not those of its plan"),
        "tensor unnamed": (packed(plan, {**tensors, "w9": np.zeros(4, np.uint8)}), "tensors are not those of its plan"),
        "no machine code": (packed(changed, renamed), "is no machine code of a GPU"),
    }
    return found
