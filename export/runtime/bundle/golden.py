"""The golden file: inputs and reference outputs, so that a device can check itself."""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from export.base.batch import INPUT, Arrays, count_of
from export.base.errors import ExportError, first_line
from export.runtime.parity.ladder import References

GOLDEN_FILE = "golden.safetensors"
PICTURE_FILE, PICTURE_INPUT_FILE = "golden-picture.png", "golden-picture.npy"  # and the input that it becomes
_ORACLE = "oracle"


def save_golden(references: References) -> bytes:
    """The bytes of a safetensors file: the inputs, and the outputs of the oracle and of each unfused network.

    The only input is called `input`, several `input.<name>`; an output `<network>.<output>`.
    """
    several = len(references.inputs) > 1
    tensors = {f"{INPUT}.{name}" if several else INPUT: values for name, values in references.inputs.items()}
    for network, outputs in {**references.rounded, _ORACLE: references.oracle}.items():
        tensors |= {f"{network}.{name}": values for name, values in outputs.items()}
    return save({name: np.ascontiguousarray(values) for name, values in tensors.items()})


def load_golden(content: bytes) -> References:
    """Read what `save_golden` wrote.

    Raises:
        ExportError: these are not the bytes of a golden file.
    """
    try:
        tensors = load(content)
        only, networks = tensors.pop(INPUT, None), dict[str, Arrays]()
        for name in sorted(tensors, key=lambda name: (name.startswith("fp16."), name)):
            # fp16, of layers that are not in 8 bits, comes last: the others are not held to what it alone rounds
            network, _, output = name.rpartition(".")  # names of outputs have no dots
            networks.setdefault(network, {})[output] = tensors[name]
        oracle, several = networks.pop(_ORACLE), networks.pop(INPUT, {})
        inputs = several if only is None else {INPUT: only}
        count = count_of(inputs) if inputs else 0
        if not count or any(values.shape[:1] != (count,) for values in inputs.values()):
            raise KeyError("inputs, as many of each")
        if not networks or any(outputs.keys() != oracle.keys() for outputs in networks.values()):
            raise KeyError("outputs of unfused networks")
        for outputs in networks.values():
            for output, values in outputs.items():
                if values.shape != oracle[output].shape or values.shape[:1] != (count,):
                    raise KeyError(f"outputs of one shape for all inputs, got {output} {list(values.shape)}")
        return References(inputs, networks, oracle)
    except (SafetensorError, KeyError) as error:
        raise ExportError(f"{GOLDEN_FILE}: expected inputs and reference outputs ({first_line(error)})") from error
