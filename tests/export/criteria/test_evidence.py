"""Evidence: no right network is refused whatever it returns, and nothing passes where no defect would show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import ExportError, fuse
from export.base.precision import PRECISIONS
from export.criteria.evidence import check_evidence
from export.criteria.outputs import output_kinds
from export.criteria.references import run_references
from export.fusion.program import output_names
from export.runtime.parity.rungs import Evidence
from resnet.models import create_model
from tests.export.networks import BATCH, Called, make

pytestmark = pytest.mark.usefixtures("captured_once")


def trunk() -> nn.Module:
    """Two layers and a residual, [N, 3, H, W] -> [N, 16, H / 2, W / 2]."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = F.relu(m.bn1(m.conv1(x)))
        return F.relu(m.bn3(m.conv3(F.relu(m.bn2(m.conv2(x)) + x))))

    convs = {
        f"conv{i}": nn.Conv2d(c, o, 3, s, 1, bias=False) for i, c, o, s in ((1, 3, 8, 1), (2, 8, 8, 1), (3, 8, 16, 2))
    }
    return Called(call, **convs, bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8), bn3=nn.BatchNorm2d(16))


def head(
    outputs: int, finish: Callable[[Tensor], object] = lambda y: y, spread: float = 1.0, mean: float = 0.0
) -> nn.Module:
    """Linear outputs about `mean`, from image to image `spread` apart."""

    def call(x: Tensor, m: Any) -> object:
        pooled = m.trunk(x).mean((2, 3))
        return finish(spread * m.fc((pooled - 0.5) * 4) + mean)

    return Called(call, trunk=trunk(), fc=nn.Linear(16, outputs))


def maps(channels: int, finish: Callable[[Tensor], object] = lambda y: y) -> nn.Module:
    return Called(lambda x, m: finish(m.out(m.trunk(x))), trunk=trunk(), out=nn.Conv2d(16, channels, 1))


def gated(gate: Callable[[Tensor, Any], Tensor]) -> nn.Module:
    """A block whose branch is weighted by a gate with a ReLU of two channels, which may be on or off throughout."""

    def call(x: Tensor, m: Any) -> Tensor:
        x = m.trunk(x)
        return m.fc(F.relu(x + m.conv(x) * gate(x, m)).mean((2, 3)))

    parts = {"squeeze": nn.Conv2d(16, 2, 1), "excite": nn.Conv2d(2, 16, 1), "space": nn.Conv2d(2, 1, 7, padding=3)}
    return Called(call, trunk=trunk(), conv=nn.Conv2d(16, 16, 3, padding=1), fc=nn.Linear(16, 5), **parts)


def squeezed(x: Tensor, m: Any, hidden: float) -> Tensor:
    return torch.sigmoid(m.excite(F.relu(m.squeeze(x.mean((2, 3), keepdim=True)) + hidden)))


def squeezed_twice(x: Tensor, m: Any) -> Tensor:
    """Two paths, of which one is off throughout."""
    pooled = (x.mean((2, 3), True), -9.0), (x.amax((2, 3), True), 3.0)
    off, on = (F.conv2d(F.relu(m.squeeze(y) + hidden), m.excite.weight) for y, hidden in pooled)
    return torch.sigmoid(off + on)


def attended(x: Tensor, m: Any) -> Tensor:
    return torch.sigmoid(m.space(torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)))


def frozen() -> nn.Module:
    """BatchNorm as a multiplication and an addition of buffers."""
    scale, shift = torch.rand(8, 1, 1) + 0.5, torch.randn(8, 1, 1)
    return Called(lambda x, m: m.fc(F.relu(m.conv(x) * m.scale + m.shift).mean((2, 3))), conv=nn.Conv2d(3, 8, 3),
                  scale=scale, shift=shift, fc=nn.Linear(8, 5))  # fmt: skip


def converted() -> nn.Module:
    """BatchNorm into whose gamma and beta a converter has put the statistics."""
    bn = nn.BatchNorm2d(8, momentum=0.0)
    return Called(lambda x, m: m.fc(F.relu(m.bn(m.conv(x))).mean((2, 3))), conv=nn.Conv2d(3, 8, 3), bn=bn,
                  fc=nn.Linear(8, 5))  # fmt: skip


def with_anchors(y: Tensor) -> tuple[Tensor, Tensor]:
    return y, torch.linspace(0, 1, 8).reshape(1, 8) + torch.zeros_like(y[:, :1])


# name -> network and the kind of its first output
RIGHT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "landmarks": (lambda: head(136, spread=0.1, mean=0.5), "scores or values"),
    "37 classes of random weights": (lambda: head(37, spread=0.1, mean=0.3), "scores or values"),
    "one logit": (lambda: head(1), "values"),
    "one probability, squeezed": (lambda: head(1, lambda y: y.sigmoid().squeeze(1)), "values"),
    "two classes": (lambda: head(2), "scores or values"),
    "softmax": (lambda: head(5, lambda y: y.softmax(1)), "scores"),
    "two probabilities": (lambda: head(2, lambda y: F.log_softmax(y, 1)), "scores"),
    "labels": (lambda: head(6, torch.sigmoid), "values"),
    "embedding": (lambda: head(32, lambda y: F.normalize(y, dim=1)), "values"),
    "depth map": (lambda: maps(1, lambda y: F.relu(y + 4)), "values"),
    "segmentation": (lambda: maps(4), "values"),
    "class of every pixel": (lambda: maps(4, lambda y: y.argmax(1)), "values"),
    "anchors beside it": (lambda: head(4, with_anchors), "scores or values"),
    "gate that is on": (lambda: gated(lambda x, m: squeezed(x, m, 3.0)), "scores or values"),
    "gate that is off": (lambda: gated(lambda x, m: squeezed(x, m, -9.0)), "scores or values"),
    "gate of two paths": (lambda: gated(squeezed_twice), "scores or values"),
    "attention": (lambda: gated(attended), "scores or values"),
    "frozen BatchNorm": (frozen, "scores or values"),
    "converted BatchNorm": (converted, "scores or values"),
    "ReLU behind a ReLU": (lambda: maps(4, lambda y: F.relu(F.max_pool2d(F.relu(y), 2))), "values"),
}  # fmt: skip


def looked_at(model: nn.Module, images: Tensor, precision: str) -> Evidence:
    program, p = fuse(model, images, BATCH), PRECISIONS[precision]
    references = run_references(model, program, output_names(program.graph_module), {"input": images.numpy()}, p)
    return check_evidence(program.source, {"input": images}, references, p)


@pytest.mark.parametrize("name", RIGHT)
def test_right_networks_are_good_evidence(name: str, pictures: dict[str, Tensor]) -> None:
    network, kind = RIGHT[name]
    images = pictures["resnet8"]
    model = make(network, images)
    for precision in ("fp32", "bf16"):
        found = looked_at(model, images, precision)
        assert found, (precision, found.weaknesses)
    assert bool(found.unexercised) is (name in NOT_SEEN), found.unexercised
    kinds = output_kinds(fuse(model, images, BATCH).source, list(found.outputs), "auto", False, None)
    assert next(iter(kinds.values())).kind == kind
    assert "rounding error" in " ".join(found.lines) or name == "class of every pixel"


NOT_SEEN = ("gate that is on", "gate that is off", "gate of two paths", "depth map", "class of every pixel")


def dead_branch() -> nn.Module:
    return maps(4, lambda y: y + F.relu(y - 100))


# a network, what the images are multiplied with, the precision, and what makes them weak evidence
WEAK: dict[str, tuple[Callable[[], nn.Module], float, str, str]] = {
    "zeros": (lambda: head(5), 0.0, "fp32", "output varies from image to image by 0 times its rounding error"),
    "zeros, whole numbers": (lambda: maps(4, lambda y: y.argmax(1)), 0.0, "fp32", "inputs hardly differ"),
    "images alike": (lambda: head(5), 0.0, "fp16", "inputs hardly differ between images"),
    "untouched": (lambda: create_model("resnet8"), 1.0, "fp32", "bn1 has the default BatchNorm statistics"),
    "no biases": (lambda: create_model("resnet8"), 1.0, "fp16", "every folded bias is zero"),
    "dead": (dead_branch, 1.0, "fp32", "no value behind the ReLU is positive"),
    "always on": (lambda: maps(4, lambda y: F.max_pool2d(F.relu(y + 100), 2).exp()), 1.0, "fp32", "clips no value"),
    "vanishing": (lambda: maps(4, lambda y: y + 1e-4 * y.tanh()), 1.0, "fp16", "the smaller summand is"),
    "vanishing in bf16": (lambda: maps(4, lambda y: y + 2e-3 * y.tanh()), 1.0, "bf16", "the smaller summand is"),
    "one of two": (lambda: head(4, lambda y: (y, y * 0)), 1.0, "fp32", "output_1 varies from image to image by 0 "),
    "far from zero": (lambda: head(4, mean=300.0, spread=0.1), 1.0, "bf16", "rounding error in bf16, expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEAK)
def test_weak_evidence_is_named_with_what_helps(case: str, pictures: dict[str, Tensor]) -> None:
    network, factor, precision, expected = WEAK[case]
    images = pictures["resnet8"]
    model = network().eval() if case in ("untouched", "no biases") else make(network, images)
    found = looked_at(model, factor * images, precision)
    assert any(expected in weakness for weakness in found.weaknesses)
    assert found.remedy.startswith(
        "load trained weights" if case in ("untouched", "no biases") else "give other pictures"
    )
    if case.startswith("vanishing"):
        assert looked_at(model, images, "fp32")


def test_what_is_told_decides_over_what_is_found_out(pictures: dict[str, Tensor]) -> None:
    def kinds(network: nn.Module, *told: Any) -> list[str]:
        program = fuse(network.eval(), pictures["resnet8"], BATCH)
        found = output_kinds(program.source, output_names(program.graph_module), *told)
        return [f"{kind.kind}: {kind.why}" for kind in found.values()]

    two = lambda: head(6, lambda y: (y.sigmoid(), y[:, :4] * 2))  # noqa: E731
    assert kinds(two(), "auto", False, None)[0].startswith("values: it is a sigmoid")
    assert kinds(two(), "auto", True, None)[0] == "scores: labelled pictures are given"
    assert kinds(two(), "auto", False, [*"abcd"])[1] == "scores: 4 classes have names"
    assert kinds(two(), "scores", False, None)[0] == "scores: as told"
    assert kinds(two(), "values", False, None) == ["values: as told"] * 2
    with pytest.raises(ExportError, match=r"outputs='scores': expected an output of shape \[N, classes\]"):
        kinds(maps(3), "scores", False, None)
