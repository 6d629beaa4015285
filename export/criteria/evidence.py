"""P0: whether these inputs on these weights could show a defect at all.

Asked in the units of the criteria that would have to show it. An output that no longer depends on the image errs by as
much as it varies from image to image, give or take its own rounding error e: P2, whose widest k is 3, refuses that for
certain where it varies by more than (k + 1) e. A summand that is left out errs by its size: P1 refuses that where it is
more than its largest rms z and one rounding error of the sum. A ReLU that is left out shows where it clips a value, and
a layer before it where it passes one, by more than the largest z of P1. No share or ratio is asked for: what is right
for one network is not for another.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from export.base.batch import count_of
from export.base.precision import Precision
from export.criteria.outputs import depends_on_input
from export.fusion.capture import plain_torch
from export.fusion.casting import converted
from export.fusion.nodes import (
    args_of,
    aten,
    constant,
    is_call,
    module_path,
    moves_data,
    named_args,
    schema_name,
    spoken_name,
)
from export.fusion.program import output_nodes, returned_tensors
from export.lowering.convolutions import WideConvolutions
from export.runtime.parity.ladder import ENGINE_FACTOR, References
from export.runtime.parity.network import SCORES, OutputKind
from export.runtime.parity.rungs import Evidence, OutputEvidence
from kernels.rounding import MAX_RMS_Z, MAX_Z

OUTPUT_SIGNAL = ENGINE_FACTOR + 1
SUMMAND_SIGNAL = MAX_RMS_Z + 1
_ROUNDED = 0.41  # the standard deviation of a rounding error in roundoffs
_SUMMED = 64 * 2.0**-24  # of a sum of 8192 products in float32, in any order: sqrt(K / 2) roundoffs
# So few channels of a vector may well be all positive or all negative on every picture: of 16 with even odds, one
# network in 30,000 has that. What is then not seen is said, and no reason to distrust the rest.
_FEW_CHANNELS = 16
_OTHERS = "give other pictures with export_bundle(images=...)"
_CALIBRATE = "load trained weights, or calibrate BatchNorm: run batches of pictures through the model in training mode"
_NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "_softmax", "abs", "exp", "square")
_KEEP_SIGN = ("max_pool2d", "adaptive_max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "add", "mul", "cat",
              "upsample_nearest2d", "upsample_bilinear2d", "sum", "amax", "amin", "_to_copy", "sqrt")  # fmt: skip


def check_evidence(
    source: fx.GraphModule, shown: Mapping[str, Tensor], references: References, precision: Precision
) -> Evidence:
    """Look for reasons why a comparison on these inputs would prove little.

    Args:
        source: the captured graph, float64.
        shown: name -> [N, ...], what the graph is run on: a batch that it accepts.
        references: all inputs, what float64 makes of them and what rounding does to that.
        precision: of the forms that are compared.
    """
    several = len(references.inputs) > 1
    dtype = (
        torch.float64 if several else torch.float32
    )  # a share or a size takes no more; what leaving one out changes does
    source = converted(source, dtype)
    dependent = depends_on_input(source)
    observer = _Observer(source, dependent, precision)
    with plain_torch(), WideConvolutions():
        returned = observer.run(*(x.to(dtype) for x in shown.values()))
    untrained = _default_statistics(source)
    weaknesses = [*untrained, *observer.weaknesses]
    for name, values in references.inputs.items():
        if not _spread(values) > OUTPUT_SIGNAL * _noise(precision) * _norm(values):
            weaknesses.append(f"{f'inputs of {name}' if several else 'inputs'} hardly differ between images")
    if several:
        weaknesses += _without_effect(source, shown, returned, references, precision)
    varying = [name for name, node in zip(references.oracle, output_nodes(source), strict=True) if node in dependent]
    outputs = _outputs(references, precision, varying)
    for name, found in outputs.items():
        if found.signal is not None and not found.signal >= OUTPUT_SIGNAL:
            weaknesses.append(
                f"{name} varies from image to image by {round(found.signal, 2):.3g} times its rounding error in "
                f"{precision.name}, expected at least {OUTPUT_SIGNAL:g}"
            )
        elif name in varying and found.signal is None and _alike(references.oracle[name]):
            observer.unexercised.append(f"{name} is the same for every image")
    active = (min(observer.active), max(observer.active)) if observer.active else None
    return Evidence(
        weaknesses=tuple(weaknesses),
        active_share=active,
        summand_signal=min(observer.summands, default=None),
        outputs=outputs,
        unexercised=tuple(observer.unexercised),
        remedy=_CALIBRATE if untrained else _OTHERS,
    )


def _outputs(references: References, precision: Precision, varying: list[str]) -> dict[str, OutputEvidence]:
    """Of each output what it is, and where it is of floats that follow from the input, its signal."""
    found = {}
    for name, oracle in references.oracle.items():
        kind, signal, classes = references.kinds.get(name, OutputKind()), None, None
        if name in varying and np.issubdtype(oracle.dtype, np.floating):
            errors = [_norm(outputs[name] - oracle) for outputs in references.rounded.values()]
            error = max(*errors, precision.network_floor * _norm(oracle))
            signal = _spread(oracle) / error if error else 0.0
        if kind.kind == SCORES and oracle.ndim == 2:
            classes = len(np.unique(oracle.argmax(1)))
        found[name] = OutputEvidence(kind, signal, classes)
    return found


def _without_effect(
    source: fx.GraphModule, shown: Mapping[str, Tensor], returned: object, references: References, precision: Precision
) -> list[str]:
    """Inputs that could be exchanged for those of another image, or left out, and no output would show it."""
    names, weaknesses = list(references.oracle), []
    rows = np.arange(len(next(iter(shown.values())))) % count_of(references.inputs)
    before = dict(zip(names, returned_tensors(source, returned), strict=True))
    for name, values in references.inputs.items():
        exchanged = {**shown, name: torch.from_numpy(np.roll(values, 1, axis=0)[rows])}
        with plain_torch(), WideConvolutions():
            outputs = source(*(x.double() for x in exchanged.values()))
        signals = []
        for output, y in zip(names, returned_tensors(source, outputs), strict=True):
            if y.is_floating_point():
                exact = references.oracle[output][rows]
                errors = [_norm(found[output][rows] - exact) for found in references.rounded.values()]
                error = max(*errors, precision.network_floor * _norm(exact))
                signals.append(_norm((y - before[output]).numpy()) / error if error else 0.0)
        if signals and not max(signals) >= OUTPUT_SIGNAL:
            weaknesses.append(
                f"{name} of another image moves the outputs by {round(max(signals), 2):.3g} times their rounding error "
                f"in {precision.name}, expected at least {OUTPUT_SIGNAL:g}"
            )
    return weaknesses


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values.astype(np.float64).ravel()))


def _spread(values: np.ndarray) -> float:
    """||y - mean over images||."""
    return _norm(values - values.mean(0, dtype=np.float64))


def _alike(values: np.ndarray) -> bool:
    return bool((values == values[:1]).all())


def _noise(precision: Precision) -> float:
    """The relative error of a result that was rounded, and of the sum in float32 behind it."""
    return max(_ROUNDED * precision.roundoff, _SUMMED)


def _default_statistics(source: fx.GraphModule) -> list[str]:
    """BatchNorm layers as they are constructed: mean 0 and variance 1, one gamma and beta 0 throughout.

    Mean 0 and variance 1 beside a gamma and beta of each channel are those of a trained layer into which a converter
    has put its statistics.
    """
    weaknesses, biases, layers = [], 0, 0
    for node in source.graph.nodes:
        if not is_call(node, aten._native_batch_norm_legit_no_training.default):
            continue
        _, gamma, beta, mean, var = (constant(source, n) for n in args_of(node)[:5])
        if mean is None or var is None:
            continue
        layers += 1
        constructed = (gamma is None or bool((gamma == gamma[0]).all())) and (beta is None or bool((beta == 0).all()))
        if constructed and bool((mean == 0).all()) and bool((var == 1).all()):
            weaknesses.append(f"{module_path(node)} has the default BatchNorm statistics")
        shift = -mean / (var + args_of(node)[6]).sqrt() * (1.0 if gamma is None else gamma) + (
            0.0 if beta is None else beta
        )
        biases += bool((shift != 0).any())
    if layers and not biases:
        weaknesses.append("every folded bias is zero")
    return weaknesses


class _Observer(fx.Interpreter):
    """Runs the captured graph and looks at each ReLU and addition as it passes."""

    def __init__(self, source: fx.GraphModule, dependent: set[fx.Node], precision: Precision) -> None:
        super().__init__(source)
        self._dependent, self._noise = dependent, _noise(precision)
        self._clear = MAX_Z[precision.dtype] * self._noise
        self.weaknesses: list[str] = []
        self.unexercised: list[str] = []
        self.active: list[float] = []
        self.summands: list[float] = []

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self._dependent and is_call(n, aten.relu.default):
            self._look_at_relu(n, self.env[args_of(n)[0]])
        elif n in self._dependent and is_call(n, aten.add.Tensor):
            self._look_at_sum(n, value)
        return value

    def _look_at_relu(self, n: fx.Node, pre: Tensor) -> None:
        self.active.append(torch.count_nonzero(pre > 0).item() / pre.numel())
        clear, vector = self._clear * _rms(pre), pre.numel() < _FEW_CHANNELS * len(pre)
        if not bool((pre > clear).any()):
            self._say(n, "no value behind the ReLU is positive", vector)
        elif not bool((pre < -clear).any()) and not _not_negative(args_of(n)[0]):
            self._say(n, "the ReLU clips no value", vector or _only_returned(n))

    def _look_at_sum(self, n: fx.Node, total: object) -> None:
        left, right = args_of(n)[:2]
        if not (left in self._dependent and right in self._dependent and isinstance(total, Tensor)):
            return  # what does not follow from the input is a parameter: leaving it out shows as in a bias
        if not total.is_floating_point() or total.dim() < 2:
            return
        smaller = min(_rms(self.env[left]), abs(named_args(n)["alpha"]) * _rms(self.env[right]))
        signal = smaller / max(self._noise * _rms(total), torch.finfo(torch.float64).tiny)
        self.summands.append(signal)
        if not signal >= SUMMAND_SIGNAL:
            vector = total.numel() == total.shape[0] * total.shape[1]
            self._say(
                n,
                f"the smaller summand is {signal:.2g} times the rounding error of the sum, "
                f"expected at least {SUMMAND_SIGNAL:g}",
                expected=vector and smaller == 0,  # behind a ReLU of few channels, as in a gate
            )

    def _say(self, n: fx.Node, what: str, expected: bool = False) -> None:
        """Keep what is not seen: a weakness, unless it is to be expected of a right network."""
        (self.unexercised if expected else self.weaknesses).append(f"{spoken_name(n)}: {what}")


def _rms(values: Tensor) -> float:
    """Per element: a gate [N, C, 1, 1] is as large as the values it is spread over."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() / values.numel() ** 0.5


def _not_negative(node: object, depth: int = 20) -> bool:
    """Whether a value is 0 or more for every input, by what computes it: a ReLU behind it clips nothing."""
    if not isinstance(node, fx.Node) or depth == 0:
        return False
    if schema_name(node) in _NOT_NEGATIVE:
        return True
    read = [n for n in node.all_input_nodes if schema_name(n) != "sym_size"]
    if schema_name(node) in ("add", "mul") and any(isinstance(a, int | float) and a < 0 for a in node.args):
        return False
    keeps = node.op == "call_function" and (schema_name(node) in _KEEP_SIGN or moves_data(node))
    return keeps and bool(read) and all(_not_negative(n, depth - 1) for n in read)


def _only_returned(node: fx.Node) -> bool:
    """Whether nothing in the network reads a value but what moves data: its clipping is part of no other operator."""
    return all(user.op == "output" or (moves_data(user) and _only_returned(user)) for user in node.users)
