"""Which layers 8 bits cost most."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from export.quantisation.scheme import TENSORRT
from export.quantisation.sensitivity import layer_costs
from tests.export import quantised as q8
from tests.export.networks import Called


def three(change: Callable[[nn.Conv2d, nn.Conv2d], None]) -> nn.Module:
    """Three convolutions, of which the first and the middle one are changed."""
    torch.manual_seed(0)
    first, middle, last = (nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(3))
    with torch.no_grad():
        change(first, middle)
    network = OrderedDict(first=first, relu=nn.ReLU(), middle=middle, relu2=nn.ReLU(), last=last)
    return nn.Sequential(network).eval()


@pytest.fixture(scope="module")
def wide(pictures: dict[str, Tensor]) -> q8.Subject:
    """The middle one reads a few values that are 300 times as large as all others."""

    def scale(first: nn.Conv2d, middle: nn.Conv2d) -> None:
        first.weight[0] *= 300.0
        middle.weight[:, 0] /= 300.0

    return q8.quantised(three(scale), pictures["resnet8"])


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
            expected = q8.relative_error(alone(x), wide.program(x))
        assert cost.error == expected


def test_weight_outliers_within_a_channel_cost_most(pictures: dict[str, Tensor]) -> None:
    """Every filter has one tap, on what is always 0, so large that 8 bits leave nothing of the others."""

    def outlier(first: nn.Conv2d, middle: nn.Conv2d) -> None:
        first.weight[0], first.get_parameter("bias")[0] = 0.0, 0.0
        middle.weight[:, 0, 0, 0] = 200 * middle.weight.abs().amax()

    subject = q8.quantised(three(outlier), pictures["resnet8"])
    costs = layer_costs(subject.program.master, subject.calibration.ranges, subject.images[:2])
    assert costs[0].name == "middle" and costs[0].error > 5 * costs[1].error


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
