"""The precisions a network can be exported in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """A storage type of weights and activations; accumulation is always float32 or wider.

    Attributes:
        name: the word used on the command line.
        dtype: the torch type of weights and activations.
        roundoff: u, half the distance between 1 and the next representable number.
        network_factor: k of the network criterion, error <= k * error of the eager model.
    """

    name: str
    dtype: torch.dtype
    roundoff: float
    network_factor: float


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, 2.0**-24, 2.0),
    "fp16": Precision("fp16", torch.float16, 2.0**-11, 1.5),
    "bf16": Precision("bf16", torch.bfloat16, 2.0**-8, 1.5),
}
