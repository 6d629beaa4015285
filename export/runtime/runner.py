"""What every runner is: one form of the network behind the same call, infer(dict) -> dict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Arrays, Batch
from export.base.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

INPUT = "input"  # what every runner calls its one input, whatever the file calls it


@dataclass(frozen=True)
class Interface:
    """What goes into a network and what comes out of it, as far as a runner is told.

    Attributes:
        outputs: name -> shape, the batch first, in the order of the model; None where the shape is not known.
        image_shape: (C, H, W) of an input; None where it is not known.
        batch: the batch sizes it accepts; None where they are not known.
    """

    outputs: Mapping[str, tuple[int | str, ...] | None]
    image_shape: tuple[int, ...] | None = None
    batch: Batch | None = None

    @classmethod
    def of(
        cls, names: Iterable[str], image_shape: tuple[int, ...] | None = None, batch: Batch | None = None
    ) -> Interface:
        """Outputs of these names and of any shape."""
        return cls(dict.fromkeys(names), image_shape, batch)


class Runner(ABC):
    """One runtime holding one form of the network.

    A runner is a context manager: what it loads or allocates lives between enter and exit. A subclass runs one batch in
    `_run`; what goes in and comes out is checked here, for all of them alike.

    Attributes:
        name: of the form: `eager`, `folded`, `fused`, `triton`, `onnx`, or an engine's flavour.
        runtime: what executes it, with version where that matters.
        file: the artefact in the bundle, empty where there is none.
        path: of the artefact, for errors; empty where it has none.
        in_host_memory: whether its values are in the memory of this process, which large images may exceed.
        interface: what it takes and gives.
    """

    name: str
    runtime: str
    file = ""
    path = ""
    in_host_memory = True

    def __init__(self, interface: Interface) -> None:
        self.interface = interface

    def infer(self, inputs: Mapping[str, NDArray]) -> Arrays:
        """Run one batch.

        Args:
            inputs: {"input": [N, C, H, W] float32}.

        Returns:
            Output name -> array [N, ...], in the order of the model; floating-point ones are float32 or wider.

        Raises:
            ExportError: the input is not what the network takes, the runtime refuses it or fails, or an output is
                missing or not what the network gives.
        """
        if list(inputs) != [INPUT]:
            raise ExportError(f"{self}: expected one input {INPUT!r}, got {', '.join(inputs) or 'none'}")
        x = inputs[INPUT]
        self.check_images(x)
        batch = self.interface.batch
        if batch is not None and not batch.minimum <= len(x) <= batch.maximum:
            raise ExportError(f"{self}: expected a batch of {batch} images, got {len(x)}")
        return self._checked(self._run(x), len(x))

    @abstractmethod
    def _run(self, x: NDArray) -> Arrays:
        """The outputs of one batch [N, C, H, W], float32, by name and in order."""

    def check_images(self, images: NDArray) -> None:
        """Raises ExportError where images are none, not float32 or not [N, C, H, W] of the network's C, H and W."""
        shape = self.interface.image_shape
        if images.ndim != 4 or not len(images) or (shape is not None and images.shape[1:] != shape):
            expected = "[N, C, H, W]" if shape is None else f"[N, *{list(shape)}]"
            raise ExportError(f"{self}: expected inputs of shape {expected}, got {list(images.shape)}")
        if images.dtype != np.float32:
            raise ExportError(f"{self}: expected inputs of type float32, got {images.dtype}")

    def _named(self, values: Sequence[NDArray]) -> Arrays:
        """What a runtime gives without names, in the order of the outputs; raises ExportError where one is missing."""
        names = self.interface.outputs
        if len(values) != len(names):
            raise ExportError(f"{self} gives {len(values)} outputs: expected {', '.join(names)}")
        return dict(zip(names, values, strict=True))

    def _checked(self, outputs: Arrays, count: int) -> Arrays:
        """All outputs of `count` images, no floating-point type narrower than float32."""
        expected = self.interface.outputs
        if list(outputs) != list(expected):
            raise ExportError(f"{self} gives {', '.join(outputs) or 'no output'}: expected {', '.join(expected)}")
        for name, shape in expected.items():
            found = outputs[name].shape
            if not found or found[0] != count:
                raise ExportError(f"{name} has shape {list(found)}: expected [{count}, ...], the batch first")
            if shape is not None and found[1:] != shape[1:]:
                raise ExportError(f"{self}: {name} has shape {list(found)}: expected {list(shape)}")
        return {name: y.astype(np.float32) if y.dtype == np.float16 else y for name, y in outputs.items()}

    def trace(self, inputs: Mapping[str, NDArray]) -> dict[str, Tensor]:
        """Every intermediate tensor of one batch that this runner can show, by fused-graph node name."""
        return {}

    def __str__(self) -> str:
        """What errors call it."""
        return self.path or self.file or self.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class TimedRunner(Runner):
    """A runner whose input can be put in place before a forward pass, so that the pass is timed alone."""

    @abstractmethod
    def load(self, x: Any) -> None:
        """Put a batch [N, C, H, W], an array or a tensor, where `step` reads it."""

    @abstractmethod
    def step(self) -> Any:
        """One forward pass on what was loaded; on a GPU it may return before the device is done."""
