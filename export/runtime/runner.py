"""What every runner is: one form of the network behind the same call, infer(dict) -> dict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from export.base.batch import Arrays

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self


class Runner(ABC):
    """One runtime holding one form of the network.

    Inputs and outputs are numpy arrays, float32 or wider, batch first. A runner is a context manager: what it loads or
    allocates lives between enter and exit.

    Attributes:
        name: of the form: `eager`, `folded`, `fused`, `triton`, `onnx`, or an engine's flavour.
        runtime: what executes it, with version where that matters.
        file: the artefact in the bundle, empty where there is none.
    """

    name: str
    runtime: str
    file = ""

    @abstractmethod
    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        """Run one batch: {"input": [N, C, H, W] float32} -> {output name: array}."""

    def trace(self, inputs: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """Every intermediate tensor of one batch that this runner can show, by fused-graph node name."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
