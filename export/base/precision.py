"""The precisions a network can be exported in: PRECISIONS are floating-point types, FORMATS all there are.

No PyTorch until one asks for its type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """A storage type of weights and activations; accumulation is always float32 or wider.

    Attributes:
        name: the word used on the command line.
        type_name: of weights and activations, as PyTorch calls it.
        roundoff: u, half the distance between 1 and the next representable number.
        network_factor: k of the network criterion, error <= k * error of the eager model; of the simulated network
            where the precision is int8.
        network_floor: the relative error of a network that no correct candidate can be blamed for: the
            rounding of the result in 16 bits; in float32, sums in another order than the eager model's,
            which in ResNets were seen to reach 4 roundoffs where the eager model's were below 2.
    """

    name: str
    type_name: str
    roundoff: float
    network_factor: float
    network_floor: float

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of weights and activations."""
        import torch

        dtype: torch.dtype = getattr(torch, self.type_name)
        return dtype


PRECISIONS = {
    "fp32": Precision("fp32", "float32", 2.0**-24, 2.0, 8 * 2.0**-24),
    "fp16": Precision("fp16", "float16", 2.0**-11, 1.5, 0.41 * 2.0**-11),
    "bf16": Precision("bf16", "bfloat16", 2.0**-8, 1.5, 0.41 * 2.0**-8),
}
DOUBLE = Precision("fp64", "float64", 2.0**-53, 2.0, 8 * 2.0**-53)  # of the oracle
# 8 bits within layers, float16 between them. What rounds like it is the same network quantised and run in float32.
INT8 = Precision("int8", "float16", 2.0**-11, 1.5, 0.41 * 2.0**-11)
FORMATS = {**PRECISIONS, INT8.name: INT8}
