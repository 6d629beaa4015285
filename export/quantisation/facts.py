"""What was quantised and what it cost, as values that become a table and parity.json. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerCost:
    """What quantising one layer alone costs.

    Attributes:
        name: of the layer.
        error: relative L2 of the first output against that of the network in float32.
    """

    name: str
    error: float


@dataclass(frozen=True)
class Quantisation:
    """How a network came to compute in 8 bits.

    Attributes:
        method: of the calibration.
        images: how many it saw.
        sha256: of them, as the network took them.
        layers: how many convolutions and linear layers are quantised.
        kept: the layers that stayed in floating point.
        costs: of each layer on its own, the highest first.
        purposes: file in the bundle -> what it is for.
        float_convolutions: how many convolutions ONNX Runtime runs in floating point, of the file made for it.
    """

    method: str
    images: int
    sha256: str
    layers: int
    kept: tuple[str, ...]
    costs: tuple[LayerCost, ...]
    purposes: Mapping[str, str]
    float_convolutions: int

    def to_json(self) -> dict[str, Any]:
        return {
            "calibration": {"method": self.method, "images": self.images, "sha256": self.sha256},
            "layers": self.layers,
            "kept": list(self.kept),
            "costs": {cost.name: cost.error for cost in self.costs},
            "purposes": dict(self.purposes),
            "float_convolutions": self.float_convolutions,
        }
