"""Damage: to JSON, to bytes and to ONNX graphs, drawn from a generator and so the same every time."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), 2**31, 2**63, 10**30,
    10**400, "", "a", "0", "-1", "1e9", "NaN", "input", "batch", "\n", "a\nb", "\x00", "a\x00b", "\x1b[31m", ".", "..",
    "../x", "../../etc/passwd", "/etc/passwd", "manifest.json", "model.onnx", "model.rtx.engine", "tensorrt-rtx",
    "tensorrt", "CON", "é", "\u202e", "\ud800", "²", "a" * 300, "x" * 5000, "%s%n", "{0}", "$(id)", "`id`", [], {},
    [[]], [None], [0], [1, 2, 3], ["batch", 3, 16, 16], [1e400] * 4, [0] * 300, {"a": 1}, {"": {}}, [{}] * 3,
    {"flavour": "tensorrt-rtx"}, {"flavour": []}, "fp16", "int8", 4, 16, 10**9, 10**12,
)  # fmt: skip


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Room for making what is nested more deeply than the code under test can read."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


@deep_recursion()
def damaged_json(generator: random.Random, value: Any) -> Any:
    """A copy with one to three things replaced, removed, renamed, doubled or nested."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return generator.choice(NASTY)
        container, key = generator.choice(found)
        kind = generator.random()
        if kind < 0.6:
            container[key] = copy.deepcopy(generator.choice(NASTY))
        elif kind < 0.75:
            del container[key]
        elif kind < 0.85:
            container[key] = nested(900 if generator.random() < 0.03 else generator.choice((1, 2, 50, 200)))
            break  # what is added deep inside is long once it is indented
        elif kind < 0.92 and isinstance(container, dict):
            container[str(generator.choice(NASTY))[:6000]] = container.pop(key)
        elif isinstance(container, list) and len(container) <= 300:
            container.extend(copy.deepcopy(container) * generator.choice((1, 30)))
        else:
            container[key] = copy.deepcopy(generator.choice(found)[0])
    return value


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def damaged_bytes(generator: random.Random, content: bytes) -> bytes:
    """Flipped, overwritten, inserted, removed, doubled or cut bytes; now and then something else altogether."""
    if not content or generator.random() < 0.03:
        return generator.choice((b"", b"\x00" * 64, b"<html>", generator.randbytes(generator.choice((1, 8, 9, 5000)))))
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8))):
        # Headers are short and matter most.
        end = len(changed) if generator.random() < 0.5 else min(len(changed), 600)
        at, size = generator.randrange(max(end, 1)), generator.choice((1, 2, 4, 8, 100))
        kind = generator.randrange(7)
        if kind <= 1 and at < len(changed):
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 2:
            changed[at : at + size] = generator.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * size
        elif kind == 3:
            changed[at:at] = generator.randbytes(size)
        elif kind == 4:
            del changed[at : at + size]
        elif kind == 5:
            changed[at:at] = changed[at : at + size]
        else:
            del changed[at:]
        if not changed:
            break
    return bytes(changed)


def damaged_safetensors(generator: random.Random, content: bytes) -> bytes:
    """The header damaged as JSON, under a length that fits it or not; or just bytes."""
    if generator.random() < 0.4:
        return damaged_bytes(generator, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if generator.random() < 0.5:
        name = generator.choice(list(header))
        header[name] = damaged_json(generator, header[name])
    else:
        header = damaged_json(generator, header)
    with deep_recursion():
        text = json.dumps(header).encode()
    stated = len(text) if generator.random() < 0.9 else generator.choice((0, 1, len(text) - 1, 2**31, 2**63, 2**64 - 1))
    return stated.to_bytes(8, "little") + text + data


_SIZES = (0, -1, 1, 2, 3, 7, 17, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)
_FILES = ("../../etc/passwd", "/etc/passwd", "weights.bin", "", ".", "golden.safetensors", "\x00", "a" * 5000)


def damaged_onnx(generator: random.Random, content: bytes) -> bytes:
    """One to three damages to the graph, or to the bytes."""
    if generator.random() < 0.3:
        return damaged_bytes(generator, content)
    model = onnx.load_model_from_string(content)
    for _ in range(generator.choice((1, 1, 2, 3))):
        generator.choice(_DAMAGES)(generator, model)
    return bytes(model.SerializeToString())


def _node(generator: random.Random, model: onnx.ModelProto) -> onnx.NodeProto:
    if not model.graph.node:
        model.graph.node.append(onnx.helper.make_node("Relu", ["input"], ["output"]))
    return generator.choice(model.graph.node)


def _tensor(generator: random.Random, model: onnx.ModelProto) -> onnx.TensorProto:
    if not model.graph.initializer:
        model.graph.initializer.append(onnx.helper.make_tensor("w", 1, [1], [1.0]))
    return generator.choice(model.graph.initializer)


def _value(generator: random.Random, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    if not model.graph.input:
        model.graph.input.append(onnx.helper.make_tensor_value_info("input", 1, [1]))
    return generator.choice([*model.graph.input, *model.graph.output])


def _external(generator: random.Random, model: onnx.ModelProto) -> None:
    tensor = _tensor(generator, model)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, values in (("location", _FILES), ("offset", _SIZES), ("length", _SIZES)):
        tensor.external_data.add(key=key, value=str(generator.choice(values)))


def _dimensions(generator: random.Random, model: onnx.ModelProto) -> None:
    tensor = _tensor(generator, model)
    if generator.random() < 0.3 or not tensor.dims:
        tensor.dims.append(generator.choice(_SIZES))
    else:
        tensor.dims[generator.randrange(len(tensor.dims))] = generator.choice(_SIZES)


def _attribute(generator: random.Random, model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    attribute = generator.choice(generator.choice(nodes).attribute)
    kind = generator.randrange(4)
    if kind == 0:
        attribute.i = generator.choice(_SIZES)
    elif kind == 1 and attribute.ints:
        attribute.ints[generator.randrange(len(attribute.ints))] = generator.choice(_SIZES)
    elif kind == 2:
        attribute.ints.extend([generator.choice(_SIZES)] * generator.choice((1, 5)))
    else:
        attribute.type = generator.randrange(15)


def _input_shape(generator: random.Random, model: onnx.ModelProto) -> None:
    dims = _value(generator, model).type.tensor_type.shape.dim
    if dims:
        generator.choice(dims).dim_value = generator.choice(_SIZES)


_DAMAGES: tuple[Callable[[random.Random, onnx.ModelProto], object], ...] = (
    *[_external, _dimensions, _attribute] * 2,
    lambda g, m: setattr(t := _tensor(g, m), "raw_data", damaged_bytes(g, t.raw_data)),
    _input_shape,
    lambda g, m: setattr(_node(g, m), "op_type", g.choice(("", "Evil", "Loop", "If", "Softmax", "Gemm", "Cast"))),
    lambda g, m: setattr(_node(g, m), "domain", g.choice(("com.microsoft", "evil", "ai.onnx.ml", "ai.onnx.training"))),
    lambda g, m: _node(g, m).input.append(g.choice(("nowhere", "", "input", _node(g, m).output[0]))),
    lambda g, m: _node(g, m).input.__setitem__(slice(0, 1), [_node(g, m).output[0]]),  # a cycle, or a wrong order
    lambda g, m: _node(g, m).output.__setitem__(slice(0, 1), [g.choice(("", "input", "output", "other"))]),
    lambda g, m: m.graph.node.append(_node(g, m)),
    lambda g, m: m.graph.node.remove(_node(g, m)),
    lambda g, m: m.graph.initializer.remove(_tensor(g, m)),
    lambda g, m: setattr(_tensor(g, m), "data_type", g.randrange(-1, 30)),
    lambda g, m: setattr(_tensor(g, m), "name", g.choice(("", "input", "a\nb", "\x00"))),
    lambda g, m: m.graph.ClearField(g.choice(("input", "output", "initializer", "node", "name", "value_info"))),
    lambda g, m: m.ClearField(g.choice(("opset_import", "ir_version", "graph"))),
    lambda g, m: setattr(m, "ir_version", g.choice(_SIZES)),
    lambda g, m: m.opset_import.add(domain=g.choice(("", "ai.onnx.ml", "evil")), version=g.choice(_SIZES)),
    lambda g, m: m.graph.input.append(onnx.helper.make_tensor_value_info("x", g.randrange(1, 17), [g.choice(_SIZES)])),
    lambda g, m: setattr(_value(g, m), "name", g.choice(("", "x", "a\nb"))),
)  # fmt: skip
