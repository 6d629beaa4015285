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
# Of a classifier all inputs are kept; sixteen of feature maps would be several times the network's own file.
_MOST_BYTES = 2**25
_FEWEST = 4


def save_golden(references: References) -> bytes:
    """The bytes of a safetensors file: the inputs, and the outputs of the oracle and of each unfused network.

    The only input is called `input`, several `input.<name>`; an output `<network>.<output>`. Of large outputs those of
    the first inputs are kept.
    """
    several = len(references.inputs) > 1
    tensors = {f"{INPUT}.{name}" if several else INPUT: values for name, values in references.inputs.items()}
    for network, outputs in {**references.rounded, _ORACLE: references.oracle}.items():
        tensors |= {f"{network}.{name}": values for name, values in outputs.items()}
    each = sum(values[:1].nbytes for values in tensors.values())
    kept = max(_MOST_BYTES // each, _FEWEST)
    return save({name: np.ascontiguousarray(values[:kept]) for name, values in tensors.items()})


def load_golden(content: bytes) -> References:
    """Read what `save_golden` wrote.

    Raises:
        ExportError: these are not the bytes of a golden file.
    """
    try:
        tensors = load(content)
        only, networks = tensors.pop(INPUT, None), dict[str, Arrays]()
        named = [name.removeprefix(f"{_ORACLE}.") for name in tensors if name.startswith(f"{_ORACLE}.")]
        for name in sorted(tensors, key=lambda name: (name.startswith("fp16."), name)):
            # fp16, of layers that are not in 8 bits, comes last: the others are not held to what it alone rounds
            last = name.rpartition(".")[2]  # names of networks may have dots, and those of outputs that are modules'
            output = max((o for o in named if name.endswith(f".{o}")), key=len, default=last)
            networks.setdefault(name.removesuffix(f".{output}"), {})[output] = tensors[name]
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
