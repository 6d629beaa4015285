"""Which ONNX files hold all that they are made of, told from their bytes before a runtime opens them.

Runtimes differ in what they do with a tensor whose values lie in another file: ONNX Runtime 1.20 to 1.23 read it
wherever an absolute path says, whatever folder they were given to look in. The numbers are those of onnx.proto3.
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
