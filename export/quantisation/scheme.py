"""From ranges to scales, the two ways the runtimes want them.

Activations have one scale per tensor, weights one per output channel and the zero point 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from export.base.precision import PRECISIONS, Precision
from export.runtime.onnx_session import CPU_ONNX_FILE, ONNX_FILE

Range = tuple[float, float]
_WEIGHT_LIMIT = 127


@dataclass(frozen=True)
class Scheme:
    """What one runtime fuses into 8-bit kernels.

    Attributes:
        name: of the runtime it is for.
        file: in the bundle.
        purpose: what the file's metadata say of it.
        dtype: of quantised activations.
        arithmetic: of what is left in floating point, and of the scales.
        symmetric: whether the zero point of activations is always 0.
        quantised_sums: whether both summands of a residual addition are quantised, and biases are int32.
            TensorRT fuses an addition into the convolution whose result goes to it unquantised; ONNX Runtime has a
            quantised addition of its own.
    """

    name: str
    file: str
    purpose: str
    dtype: torch.dtype
    arithmetic: Precision
    symmetric: bool
    quantised_sums: bool

    def activation(self, values: Range) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both scalars, float64 and `dtype`, for values in a range, which always holds 0."""
        low, high = min(values[0], 0.0), max(values[1], 0.0)
        limits = torch.iinfo(self.dtype)
        if self.symmetric:
            scale = self._scale(torch.tensor(max(-low, high) / limits.max, dtype=torch.float64))
            return scale, torch.zeros((), dtype=self.dtype)
        scale = self._scale(torch.tensor((high - low) / (limits.max - limits.min), dtype=torch.float64))
        zero = round(limits.min - low / scale.item())
        return scale, torch.tensor(min(max(zero, limits.min), limits.max), dtype=self.dtype)

    def weight(self, weight: Tensor, smallest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Quantised weights, int8 like `weight` [C, ...] float64, and their scales, [C] float64.

        `smallest`, [C], is what the scales may not fall below.
        """
        scale = weight.abs().flatten(1).amax(1) / _WEIGHT_LIMIT
        scale = self._scale(scale if smallest is None else torch.maximum(scale, smallest))
        shape = (-1, *[1] * (weight.dim() - 1))
        quantised = (weight / scale.reshape(shape)).round().clamp(-_WEIGHT_LIMIT, _WEIGHT_LIMIT)
        return quantised.to(torch.int8), scale

    def _scale(self, scale: Tensor) -> Tensor:
        """The nearest scale that the file can hold and that is not smaller; 1 where everything is 0."""
        rounded = scale.to(self.arithmetic.dtype)
        above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
        rounded = torch.where(rounded.double() < scale, above, rounded).double()
        return torch.where(scale == 0, torch.ones_like(rounded), rounded)


TENSORRT = Scheme(
    "tensorrt", ONNX_FILE, "TensorRT and TensorRT-RTX: int8 activations, float16 elsewhere",
    torch.int8, PRECISIONS["fp16"], symmetric=True, quantised_sums=False,
)  # fmt: skip
CPU = Scheme(
    "cpu", CPU_ONNX_FILE, "ONNX Runtime on x86 CPUs with VNNI: uint8 activations, float32 elsewhere",
    torch.uint8, PRECISIONS["fp32"], symmetric=False, quantised_sums=True,
)  # fmt: skip
