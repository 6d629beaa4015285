"""Which layers 8 bits cost most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from export.quantisation.scheme import TENSORRT
from export.quantisation.sensitivity import layer_costs
from tests.export import quantised as q8
from tests.export.networks import Called


@pytest.fixture(scope="module")
def wide(pictures: dict[str, Tensor]) -> q8.Subject:
    """The middle one of three convolutions reads a few values that are 300 times as large as all others."""
    torch.manual_seed(0)
    first, middle, last = (nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8))
    with torch.no_grad():
        first.weight[0] *= 300.0
        middle.weight[:, 0] /= 300.0
    model = Called(lambda x, m: m.last(m.middle(m.first(x).relu()).relu()), first=first, middle=middle, last=last)
    return q8.quantised(model.eval(), pictures["resnet8"])


def test_the_layer_that_reads_a_wide_range_costs_most(wide: q8.Subject) -> None:
    costs = layer_costs(wide.program.master, wide.calibration.ranges, wide.images)
    assert costs[0].name == "middle" and {c.name for c in costs} == {"first", "middle", "last"}
    assert costs[0].error > 5 * costs[1].error > 0
    assert [cost.error for cost in costs] == sorted((cost.error for cost in costs), reverse=True)


def test_a_cost_is_the_error_with_that_layer_alone(wide: q8.Subject) -> None:
    """Relative to the float network, on the pictures that were given."""
    x = wide.images[:4]
    for cost in layer_costs(wide.program.master, wide.calibration.ranges, x):
        alone = wide.keeping(*({"first", "middle", "last"} - {cost.name})).quantised[TENSORRT]
        with torch.no_grad():
            assert cost.error == q8.relative_error(alone(x), wide.program(x))


def test_of_several_outputs_the_first_counts(pictures: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model = Called(lambda x, m: (m.shown(x), m.other(x)), shown=nn.Conv2d(3, 4, 1), other=nn.Conv2d(3, 4, 1))
    subject = q8.quantised(model.eval(), pictures["resnet8"])
    first, second = layer_costs(subject.program.master, subject.calibration.ranges, subject.images)
    assert (first.name, second.name, second.error) == ("shown", "other", 0.0) and first.error > 0


def test_progress_is_told(wide: q8.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.base.progress._SECONDS", 0.0)
    said: list[str] = []
    layer_costs(wide.program.master, wide.calibration.ranges, wide.images, said.append)
    assert said == [f"quantise one layer at a time: {done} of 3 done" for done in range(3)]
