"""What a weights file holds, read as data; and for what is no weights file, what it looks like and what to do."""

import os
import pickle
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from resnet.weights.refusals import WeightsError, short
from resnet.weights.unpickling import NeedsCode, StandIn, read_pickle

FORMATS = {
    ".safetensors": "safetensors",
    **dict.fromkeys((".pt", ".pth", ".tar", ".ckpt", ".bin", ".th", ".pkl", ".model"), "torch"),  # .tar: .pth.tar
}
_SAFE_TORCH = "2.10"  # before it, weights_only could be made to run code: CVE-2025-32434, CVE-2026-24747
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's before it wrote zip archives
SAVE_STATE_DICT = "save its tensors instead: torch.save(model.state_dict(), path)"
# First bytes, from which place on, and what has them.
_SIGNATURES = (
    (0, b"version https://git-lfs.github.com/spec/", "a git-lfs pointer (fetch the file itself: git lfs pull)"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and MATLAB write (its weights are not PyTorch's)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ET12", "an ExecuTorch program"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"ptrt", "a TensorRT engine"),
    (0, b"ftrt", "a TensorRT engine"),
    (257, b"ustar", "a tar archive (unpack it first)"),
    (0, b"\x1f\x8b", "a gzip file (unpack it first)"),
    (0, b"BZh", "a bzip2 file (unpack it first)"),
    (0, b"\xfd7zXZ\0", "an xz file (unpack it first)"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file (unpack it first)"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive (unpack it first)"),
    (0, b"Rar!", "a rar archive (unpack it first)"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"%PDF", "a PDF"),
)
# Entries of zip archives whose name ends so, and what has them.
_ENTRIES = (
    (
        ("/constants.pkl",),
        "a TorchScript archive, which is a program; save the tensors of the model it was made from: "
        "torch.save(model.state_dict(), path), or torch.save(torch.jit.load(path).state_dict(), other_path)",
    ),
    (
        ("/archive_format", "serialized_exported_program.json", "serialized_state_dict.json"),
        "a torch.export archive (.pt2), which is a program; save the tensors of the model it was made from, or "
        "torch.save(torch.export.load(path).state_dict, other_path)",
    ),
    ((".npy",), "a NumPy archive (.npz)"),
    (("model.weights.h5",), "a Keras archive (.keras; its weights are not PyTorch's)"),
    (("data.pkl",), "a torch.save archive"),
    ((".pt", ".pth", ".ckpt", ".bin", ".safetensors"), "a zip archive with a weights file in it (unpack it first)"),
)


def check_file(file: Path) -> tuple[str, int]:
    """Format by suffix and size in bytes of a readable regular file; opens nothing that could block."""
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(file, f"{error.strerror or error}; expected a weights file") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _folder(file) if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device; expected a regular file"
        raise WeightsError(file, kind)
    if file.suffix.lower() not in FORMATS:
        suffix = f"suffix {short(file.suffix)!r}" if file.suffix else "no suffix"
        try:
            look = f", looks like {_looks_like(file, status.st_size, '')}"
        except OSError:
            look = ""
        raise WeightsError(file, f"{suffix}{look}; expected one of {', '.join(FORMATS)}")
    return FORMATS[file.suffix.lower()], status.st_size


def read_content(file: Path, form: str, size: int) -> object:
    """All of a file: tensors by name, or whatever else torch.save was given."""
    return _read_safetensors(file, size) if form == "safetensors" else _read_torch(file, size)


def _folder(folder: Path) -> str:
    """What is said of a folder: which file in it could be meant."""
    fault = "a directory; expected a regular file"
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return fault
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        join = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth"
        return f"a directory with a distributed checkpoint; expected a regular file, join it: {join}"
    inside = next((name for name in names if Path(name).suffix.lower() in FORMATS), None)
    return fault if inside is None else f"{fault}, such as {short(inside)} in it"


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
        content = read_pickle(file)
    except NeedsCode as code:
        raise WeightsError(file, _needs_code(file, size, code.name)) from code
    except Exception as error:  # a malformed pickle can raise anything; all of it is a refusal
        raise WeightsError(file, _unreadable(file, size, "a state dict written by torch.save", error)) from error
    if isinstance(content, StandIn):
        raise WeightsError(file, _needs_code(file, size, class_name(content)))
    return content


def class_name(value: object) -> str:
    """Of a value in a file: `dict`, or `package.module.Class` of what has a stand-in."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(value, StandIn) else kind.__name__


def _needs_code(file: Path, size: int, name: str) -> str:
    with file.open("rb") as stream:
        learner = b"fastai.learner" in stream.read(1 << 16)
    what = "a fast.ai learner, " if learner or name.startswith("fastai.") else ""
    save = SAVE_STATE_DICT.replace("model.", "learn.model.") if what else SAVE_STATE_DICT
    return f"{size} bytes, {what}a pickle that needs code ({short(name)}), not run; {save}"


def _unreadable(file: Path, size: int, expected: str, error: Exception) -> str:
    reason = re.split(r"\n|\. ", str(error))[0]
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason or "torch.jit.load" in reason:
        reason = "no such pickle"  # PyTorch's own text is about how to load the file unsafely
    try:
        look = _looks_like(file, size, reason)
    except OSError as failure:
        return f"{size} bytes, cannot be read ({failure.strerror}); expected {expected}"
    return f"{size} bytes, looks like {look}; expected {expected} ({short(reason)})"


def _looks_like(file: Path, size: int, reason: str) -> str:
    """What a file that is not what it should be seems to be, in a few words."""
    with file.open("rb") as stream:
        head = stream.read(1024)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file"
    for start, signature, look in _SIGNATURES:
        if head[start:].startswith(signature):
            return look
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "an XML page (a failed download?)" if text.startswith(b"<?xml") else "an HTML page (a failed download?)"
    if head.startswith(b"PK\x03\x04"):
        return _looks_like_zip(file)
    if head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        truncated = 8 + header > size or any(words in reason for words in ("not fully covered", "IncompleteBuffer"))
        return "a truncated safetensors file" if truncated else "a safetensors file"
    if head[0] == 0x80 and head[1:2] <= b"\x05":
        return _looks_like_pickle(head)
    # The protobuf of an ONNX file begins with its version, then mostly the producer's name; a SavedModel with schema 1.
    if head[:1] == b"\x08" and head[1:2] <= b"\x20" and head[2:3] in (b"\x12", b"\x1a", b":", b"B"):
        return "a TensorFlow model" if file.name == "saved_model.pb" else "an ONNX file, which is a program"
    if text.startswith((b"{", b"[")) and all(byte in b"\t\n\r" or byte >= 32 for byte in head):
        return "text, JSON (an index or an error message, not the weights themselves)"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "text"
    return "binary data"


def _looks_like_pickle(head: bytes) -> str:
    if head.startswith(_OLD_MAGIC):
        return "a torch.save file as before PyTorch 1.6"
    if len(head) > 1 and (head[1] > 2 or b"numpy" in head):
        remedy = "not by torch.save with its default protocol; read it where it was made and torch.save its tensors"
        return f"a pickle, of protocol {head[1]}, {remedy}"
    return "a pickle"


def _looks_like_zip(file: Path) -> str:
    if not zipfile.is_zipfile(file):
        return "a truncated zip archive (an unfinished download or copy?)"
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            looks = (look for ends, look in _ENTRIES if any(name.endswith(ends) for name in names))
            look = next(looks, "a zip archive")
            if look == "a torch.save archive":
                with archive.open(next(name for name in names if name.endswith("data.pkl"))) as pickled:
                    protocol = pickled.read(2)
                if protocol[:1] == b"\x80" and b"\x02" < protocol[1:] <= b"\x05":
                    return f"{look} with pickle protocol {protocol[1]}, expected the default, 2: save it again without"
            return look
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError, RuntimeError):
        return "a damaged zip archive"
