"""Which layers 8 bits cost most."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from export.quantisation.scheme import TENSORRT
from export.quantisation.sensitivity import layer_costs
from tests.export import quantised as q8


class Three(nn.Module):
    """Of three convolutions the middle one reads a few values that are much larger than all others."""

    def __init__(self, outlier: float) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(3))
        with torch.no_grad():
            self.first.weight[0] *= outlier
            self.middle.weight[:, 0] /= outlier

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def wide(pictures: dict[str, Tensor]) -> q8.Subject:
    torch.manual_seed(0)
    return q8.quantised(Three(300.0).eval(), pictures["resnet20"])


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
        assert cost.error == pytest.approx(expected, rel=1e-3)


def test_weight_outliers_within_a_channel_cost_most(
    calibrated: dict[str, nn.Module], pictures: dict[str, Tensor]
) -> None:
    """Every filter has one tap so large that 8 bits leave nothing of the others."""
    model = copy.deepcopy(calibrated["resnet20"])
    layer = model.get_submodule("layer2.1.conv1")
    with torch.no_grad():
        layer.weight[:, 0, 0, 0] = 200 * layer.weight.abs().amax()
    subject = q8.quantised(model, pictures["resnet20"])
    costs = layer_costs(subject.program.master, subject.calibration.ranges, subject.images[:2])
    assert len(costs) == 22
    names = [cost.name for cost in costs]
    assert "layer2.1.conv1" in names[:2], costs[:4]


def test_of_several_outputs_the_first_counts(pictures: dict[str, Tensor]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shown, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.shown(x), self.other(x)

    torch.manual_seed(0)
    subject = q8.quantised(Two().eval(), pictures["resnet20"])
    first, second = layer_costs(subject.program.master, subject.calibration.ranges, subject.images)
    assert (first.name, second.name, second.error) == ("shown", "other", 0.0) and first.error > 0


def test_progress_is_told(wide: q8.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.base.progress._SECONDS", 0.0)
    said: list[str] = []
    layer_costs(wide.program.master, wide.calibration.ranges, wide.images, said.append)
    assert said == [f"quantise one layer at a time: {done} of 3 done" for done in range(3)]
