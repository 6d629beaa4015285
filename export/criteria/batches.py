"""Whether a network treats each image on its own, in a batch of any size: what everything after this relies on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.base.batch import Inputs
from export.base.errors import ExportError
from export.base.precision import DOUBLE
from export.fusion.program import FusedProgram, output_names, output_nodes
from export.lowering.runners import UnfusedRunner
from export.runtime.parity.network import relative_error

_EXACT = 1e-9  # relative error of float64 arithmetic in another order


def check_batches(program: FusedProgram, inputs: Inputs) -> None:
    """Refuse a model whose outputs have no batch, or depend on the other images of the batch.

    Args:
        program: whose captured graph is looked at, and with BatchNorm folded run on few images in float64.
        inputs: at least one image.

    Raises:
        ExportError: names the output, what it has and what to do.
    """
    names = output_names(program.source)
    batch = next(str(n.meta["val"].shape[0]) for n in program.source.graph.nodes if n.op == "placeholder")
    for name, node in zip(names, output_nodes(program.source), strict=True):
        shape = node.meta["val"].shape
        if not len(shape) or str(shape[0]) != batch:
            sizes = ", ".join(str(n) if isinstance(n, int) else str(n).replace(batch, "batch") for n in shape)
            raise ExportError(
                f"{name} has shape [{sizes}]: expected [batch, ...]; forward drops the batch dimension or mixes it "
                "with another one: let each output have a row per image, as flatten(x, 1) and view(x.shape[0], ...) do"
            )
    smallest, largest = program.batch.minimum, program.batch.maximum
    size = min(smallest + 1, largest)
    shown = {name: _beside(images, smallest, size) for name, images in inputs.items()}
    with UnfusedRunner("folded", program, program.folded, DOUBLE, names) as runner:
        alone, beside = (runner.infer({name: batches[k] for name, batches in shown.items()}) for k in (0, 1))
    for name in names:
        first, same = (np.asarray(y[name][:1], np.float64) for y in (alone, beside))
        if np.isfinite(first).all() and not relative_error(same, first) <= _EXACT:
            raise ExportError(
                f"{name} of an image depends on the other images of its batch: expected each on its own; forward "
                "computes over the batch dimension, as mean(0), softmax(0) or a BatchNorm without running statistics do"
            )


def _beside(images: NDArray, smallest: int, size: int) -> tuple[NDArray, NDArray]:
    """The first image in a batch of each of two sizes, beside others each time."""
    others = np.concatenate([images[1:], -images[:1]])
    first, second = (
        np.concatenate([images[:1], np.resize(others, (n - 1, *images.shape[1:]))]) for n in (smallest, size)
    )
    if smallest == size:
        second = np.concatenate([images[:1], np.resize(others[::-1] * 0.5, first[1:].shape)])
    return first, second
