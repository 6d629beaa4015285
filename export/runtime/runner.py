"""What every runner is: one form of the network behind the same call, infer(dict) -> dict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.base.batch import FLOAT32, INPUT, UINT8, Arrays, Batch, Inputs, count_of
from export.base.errors import ExportError
from export.base.normalisation import Normalisation

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

Shapes = Mapping[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class Interface:
    """What goes into a network and what comes out of it, as far as a runner is told.

    Attributes:
        outputs: name -> shape, the batch first, in the order of the model; None where the shape is not known.
        inputs: name -> shape without the batch, in the order of the model; None for a picture of any (C, H, W).
        batch: the batch sizes it accepts; None where they are not known.
        dtype: of all inputs: FLOAT32 for what the network computes with, UINT8 for pictures as bytes [N, H, W, C].
    """

    outputs: Mapping[str, tuple[int | str, ...] | None]
    inputs: Shapes = field(default_factory=lambda: {INPUT: None})
    batch: Batch | None = None
    dtype: str = FLOAT32

    @classmethod
    def of(
        cls, names: Iterable[str], inputs: Shapes | None = None, batch: Batch | None = None, dtype: str = FLOAT32
    ) -> Interface:
        """Outputs of these names and of any shape; without `inputs` one picture."""
        return cls(dict.fromkeys(names), inputs or {INPUT: None}, batch, dtype)

    def fed(self, given: Inputs, normalisation: Normalisation | None) -> Inputs:
        """What a bundle takes, as this form of its network does: bytes as they are, or normalised.

        `normalisation` is that in the bundle's files; None where the bundle takes what the network computes with.
        """
        return given if normalisation is None or self.dtype == UINT8 else normalisation.of(given)


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

    def infer(self, inputs: Inputs) -> Arrays:
        """Run one batch.

        Args:
            inputs: name -> [N, ...] of the interface's type: {"input": [N, C, H, W]} float32 of a network with one,
                {"input": [N, H, W, C]} of bytes.

        Returns:
            Output name -> array [N, ...], in the order of the model; floating-point ones are float32 or wider.

        Raises:
            ExportError: the inputs are not what the network takes, the runtime refuses them or fails, or an output is
                missing or not what the network gives.
        """
        self.check_inputs(inputs)
        batch, count = self.interface.batch, count_of(inputs)
        if batch is not None and not batch.minimum <= count <= batch.maximum:
            raise ExportError(f"{self}: expected a batch of {batch} images, got {count}")
        return self._checked(self._run({name: inputs[name] for name in self.interface.inputs}), count)

    @abstractmethod
    def _run(self, inputs: Inputs) -> Arrays:
        """The outputs of one batch, float32 and in the order of the interface, by name and in order."""

    def check_inputs(self, inputs: Inputs) -> None:
        """Raises ExportError where inputs are not the network's by name, shape and type, or not as many of each."""
        expected = self.interface.inputs
        several, dtype = len(expected) > 1, self.interface.dtype
        before = ": bytes [N, H, W, C] before any normalisation" if dtype == UINT8 else ""
        if inputs.keys() != expected.keys():
            wanted = f"inputs {', '.join(expected)}" if several else f"one input {next(iter(expected))!r}"
            raise ExportError(f"{self}: expected {wanted}, got {', '.join(inputs) or 'none'}")
        for name, shape in expected.items():
            x, what = inputs[name], name if several else "inputs"
            if not len(x) or (x.ndim != 4 if shape is None else x.shape[1:] != shape):
                wanted = "[N, C, H, W]" if shape is None else f"[N, *{list(shape)}]"
                raise ExportError(f"{self}: expected {what} of shape {wanted}, got {list(x.shape)}{before}")
            if x.dtype != dtype:
                raise ExportError(f"{self}: expected {what} of type {dtype}, got {x.dtype}{before}")
        if len({len(x) for x in inputs.values()}) > 1:
            counts = ", ".join(f"{len(x)} of {name}" for name, x in inputs.items())
            raise ExportError(f"{self}: expected as many rows of each input, got {counts}")

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

    def trace(self, inputs: Inputs) -> dict[str, Tensor]:
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
    """A runner whose one input can be put in place before a forward pass, so that the pass is timed alone."""

    @abstractmethod
    def load(self, x: Any) -> None:
        """Put a batch [N, C, H, W], an array or a tensor, where `step` reads it."""

    @abstractmethod
    def step(self) -> Any:
        """One forward pass on what was loaded; on a GPU it may return before the device is done."""
