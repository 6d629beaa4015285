"""P0: whether these inputs on these weights could show a defect at all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from export.fusion.capture import plain_torch
from export.fusion.nodes import args_of, aten, constant, is_call, module_path
from export.runtime.parity.rungs import Evidence

ACTIVE_SHARE = (0.10, 0.90)
BRANCH_RATIO = (0.05, 20.0)
LOGIT_VARIATION = 0.3
CLASSES = 3
SOME_VARIATION = 0.01


def check_evidence(source: fx.GraphModule, x: Tensor, inputs: Tensor, outputs: Sequence[Tensor]) -> Evidence:
    """Look for reasons why a comparison on `x` would prove little.

    Args:
        source: the captured graph, float64.
        x: [N, C, H, W], what the graph is run on: a batch that it accepts.
        inputs: all parity inputs.
        outputs: the oracle's outputs for all parity inputs; the first of shape [N, classes] are the logits.
    """
    observer = _Observer(source)
    with plain_torch():
        observer.run(x.double())
    weaknesses = [*_default_statistics(source), *observer.weaknesses]
    for what, values in (("inputs", inputs), *((f"output {i}", y) for i, y in enumerate(outputs))):
        if values.is_floating_point() and not _variation(values) >= SOME_VARIATION:
            weaknesses.append(f"{what} hardly differ between images")
    variation = classes = None
    logits = next((y for y in outputs if y.is_floating_point() and y.dim() == 2 and y.shape[1] > 1), None)
    if logits is not None:
        variation, classes = _variation(logits), len(logits.argmax(1).unique())
        if not variation >= LOGIT_VARIATION:
            weaknesses.append(f"logits vary by {variation:.2f} between images, expected at least {LOGIT_VARIATION}")
        if classes < min(CLASSES, logits.shape[1]):
            weaknesses.append(f"{classes} top-1 classes among {len(logits)} inputs, expected at least {CLASSES}")
    return Evidence(tuple(weaknesses), _range(observer.active), _range(observer.ratios), variation, classes)


def _variation(values: Tensor) -> float:
    """||y - mean over images|| / ||y||; nan for zeros, which no comparison accepts."""
    return ((values - values.mean(0)).norm() / values.norm()).item()


def _default_statistics(source: fx.GraphModule) -> list[str]:
    """BatchNorm layers that were never calibrated or trained: mean 0 and variance 1 throughout."""
    weaknesses, biases, layers = [], 0, 0
    for node in source.graph.nodes:
        if not is_call(node, aten._native_batch_norm_legit_no_training.default):
            continue
        _, gamma, beta, mean, var = (constant(source, n) for n in args_of(node)[:5])
        if mean is None or var is None:
            continue
        layers += 1
        if bool((mean == 0).all()) and bool((var == 1).all()):
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

    def __init__(self, source: fx.GraphModule) -> None:
        super().__init__(source)
        self.weaknesses: list[str] = []
        self.active: list[float] = []
        self.ratios: list[float] = []

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if is_call(n, aten.relu.default):
            share = (value > 0).double().mean().item()
            self.active.append(share)
            self._expect(n, share, ACTIVE_SHARE, "share of positive values after the ReLU")
        elif is_call(n, aten.add.Tensor) and self._adds_activations(n):
            left, right = (self.env[argument] for argument in args_of(n))
            ratio = (left.norm() / right.norm()).item()
            self.ratios.append(ratio)
            self._expect(n, ratio, BRANCH_RATIO, "rms ratio of the two summands")
        return value

    def _adds_activations(self, n: fx.Node) -> bool:
        return all(isinstance(a, fx.Node) and a.op != "get_attr" and self.env[a].dim() == 4 for a in n.args)

    def _expect(self, n: fx.Node, value: float, allowed: tuple[float, float], what: str) -> None:
        low, high = allowed
        if not low <= value <= high:
            self.weaknesses.append(f"{module_path(n)}: {what} is {value:.3g}, expected {low:g} to {high:g}")


def _range(values: list[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None
