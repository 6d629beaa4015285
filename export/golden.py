"""The golden file: inputs and reference outputs, so that a device can check itself without PyTorch."""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from export.errors import ExportError
from export.parity.ladder import References

GOLDEN_FILE = "golden.safetensors"
_GROUPS = ("eager", "folded", "oracle")


def save_golden(references: References) -> bytes:
    """The bytes of a safetensors file with `input` and `<group>.<output>` for each group of outputs."""
    tensors = {"input": references.images}
    for group in _GROUPS:
        tensors |= {f"{group}.{name}": values for name, values in getattr(references, group).items()}
    return save({name: np.ascontiguousarray(values) for name, values in tensors.items()})


def load_golden(content: bytes) -> References:
    """Read what `save_golden` wrote.

    Raises:
        ExportError: these are not the bytes of a golden file.
    """
    try:
        tensors = load(content)
        groups = {
            group: {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{group}.")}
            for group in _GROUPS
        }
        return References(tensors["input"], groups["eager"], groups["folded"], groups["oracle"])
    except (SafetensorError, KeyError) as error:
        raise ExportError(f"{GOLDEN_FILE}: expected inputs and reference outputs ({error})") from error
