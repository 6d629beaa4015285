"""Files of kernel engines, damaged with hashes that fit again or not: both readers take the same ones."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import pytest

from export.runtime.engines.kernel_file import read_kernel_file
from tests.cuda_stand_in.building import build_runtime
from tests.cuda_stand_in.files import by_hand, packed, unpacked
from tests.faults.bundle_inputs import TryOne, refused_or
from tests.faults.mutations import damaged_bytes, damaged_json, damaged_safetensors, deep_recursion

_FILE = 1  # KE_FILE: what the C++ runtime says of a file that is not sound


class _Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("text", ctypes.c_char * 252)]


def kernel_files(source: Path, folder: Path) -> TryOne:
    """Read in Python, and where there is a compiler in C++ too: they agree, or it is a fault."""
    sound = [by_hand(boxes) for boxes in (False, True)]
    taken_apart = [unpacked(content) for content in sound]
    try:
        library: Any = ctypes.CDLL(str(build_runtime(folder)))
        library.ke_open_bytes.restype = _Status
    except pytest.skip.Exception:
        library = None

    def try_one(index: int) -> str:
        generator = random.Random(f"kernels {index}")
        which, kind = generator.randrange(2), generator.random()
        plan, tensors = taken_apart[which]
        if kind < 0.1:
            content = damaged_bytes(generator, sound[which])
        elif kind < 0.3:
            content = damaged_safetensors(generator, sound[which])
        else:
            key = generator.choice([*plan, "batches", "batches", "kernels"])
            with deep_recursion():
                content = packed({**plan, key: damaged_json(generator, plan[key])}, tensors)
        word = refused_or(lambda: read_kernel_file(content) is not None)
        if library is not None:
            engine = ctypes.c_void_p()
            status = library.ke_open_bytes(content, ctypes.c_size_t(len(content)), 0, ctypes.byref(engine))
            agrees = (status.code == _FILE) == (word == "refused")
            assert agrees and status.code, f"{word} in Python, {status.code} {status.text.decode()} in C++"
            assert status.text.decode("ascii").isprintable()
            library.ke_close(engine)
        return word

    return try_one
