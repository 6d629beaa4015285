"""What ONNX files say of themselves, told from their bytes: a device need not have ONNX installed.

Whether a file holds all that it is made of is asked before a runtime opens it. Runtimes differ in what they do with
a tensor whose values lie in another file: ONNX Runtime 1.20 to 1.23 read it wherever an absolute path says, whatever
folder they were given to look in. The numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator

from export.base.errors import ExportError

_VARINT, _LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}  # wire type -> bytes
# Message -> number of a field -> the message it holds, as far as tensors lie below.
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_GRAPH, _VALUES = 7, (11, 12, 13)  # of the model; inputs, outputs and values between, of the graph
_NAME, _TYPE, _TENSOR_TYPE, _SHAPE, _DIMENSION, _SIZE = 1, 2, 1, 2, 1, 1
_UINT8, _FLOAT = b"\x08\x02", b"\x08\x01"  # the element type of a tensor type, as a field


def refuse_external_data(content: bytes) -> None:
    """Let a file through that holds the values of all its tensors.

    Raises:
        ExportError: a tensor lies in another file, or the bytes are no protocol buffer.
    """
    waiting = [("model", 0, len(content))]
    while waiting:
        kind, start, end = waiting.pop()
        for number, value, length in _fields(content, start, end):
            if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)):
                raise ExportError("the ONNX file keeps tensors in other files, expected all of them in it")
            if length is not None and number in _FIELDS[kind]:
                waiting.append((_FIELDS[kind][number], value, value + length))


def value_shapes(content: bytes) -> dict[str, tuple[int | None, ...]]:
    """Name of a value -> its shape as the file has it, None for a size that has a name or none, such as the batch.

    Raises:
        ExportError: the bytes are no protocol buffer.
    """
    shapes = {}
    for graph in _messages(content, (0, len(content)), _GRAPH):
        for value in _messages(content, graph, *_VALUES):
            names = [content[start:end].decode() for start, end in _messages(content, value, _NAME)]
            for kind in _messages(content, value, _TYPE):
                for tensor in _messages(content, kind, _TENSOR_TYPE):
                    for shape in _messages(content, tensor, _SHAPE):
                        sizes = [_size(content, part) for part in _messages(content, shape, _DIMENSION)]
                        shapes[names[0]] = tuple(sizes)
    return shapes


def with_float_inputs(content: bytes) -> bytes:
    """A file of inputs that are bytes with inputs of float32, holding 0 to 255: its first step casts either to float32.

    Raises:
        ExportError: the bytes are no protocol buffer, or an input is of another type.
    """
    changed = bytearray(content)
    for graph in _messages(content, (0, len(content)), _GRAPH):
        for value in _messages(content, graph, _VALUES[0]):
            for kind in _messages(content, value, _TYPE):
                for start, _ in _messages(content, kind, _TENSOR_TYPE):
                    if content[start : start + len(_UINT8)] != _UINT8:
                        raise ExportError("expected an ONNX file whose inputs are bytes")
                    changed[start : start + len(_FLOAT)] = _FLOAT
    return bytes(changed)


def _messages(content: bytes, message: tuple[int, int], *numbers: int) -> list[tuple[int, int]]:
    """Where the messages and texts of these fields begin and end."""
    found = _fields(content, *message)
    return [(value, value + length) for number, value, length in found if number in numbers and length is not None]


def _size(content: bytes, dimension: tuple[int, int]) -> int | None:
    sizes = [value for number, value, length in _fields(content, *dimension) if number == _SIZE and length is None]
    return sizes[0] if sizes else None


def _fields(content: bytes, at: int, end: int) -> Iterator[tuple[int, int, int | None]]:
    """The number of each field; of a message where it begins and its length, of anything else its value and None."""
    while at < end:
        tag, at = _varint(content, at, end)
        value, length = at, None
        if tag & 7 == _VARINT:
            value, at = _varint(content, at, end)
        elif tag & 7 == _LENGTH:
            length, value = _varint(content, at, end)
            at = value + length
        elif tag & 7 in _FIXED:
            at += _FIXED[tag & 7]
        else:
            raise ExportError(f"expected an ONNX file: a field has wire type {tag & 7}")
        if at > end:
            raise ExportError("expected an ONNX file: a field ends beyond its message")
        yield tag >> 3, value, length


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """A number, and where the next field begins."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte, at = content[at], at + 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ExportError("expected an ONNX file: a number has no end")
