"""Which layers 8 bits cost most, and the search for the fewest to keep."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor, nn

from export import ExportError
from export.quantisation.facts import LayerCost
from export.quantisation.scheme import TENSORRT
from export.quantisation.sensitivity import choose, fewest_kept, layer_costs
from tests.export import quantised as q8

NAMES = ("a", "b", "c", "d", "e", "f", "g")
COSTS = [LayerCost(name, 1.0 - i / 10) for i, name in enumerate(NAMES)]


def needing(*sets: str) -> Callable[[frozenset[str]], bool]:
    """Passes where all layers of one of the sets are kept."""
    return lambda kept: any(set(names) <= kept for names in sets)


# what the network needs -> what is kept
NEEDS = {
    "nothing": (("",), ""),
    "the costliest": (("a",), "a"),
    "the cheapest": (("g",), "g"),
    "second and fifth": (("be",), "be"),
    "the first three": (("abc",), "abc"),
    "all": (("abcdefg",), "abcdefg"),
    "either of two": (("a", "g"), "a"),
    "one or a pair": (("f", "bd"), "bd"),
}


@pytest.mark.parametrize("case", NEEDS)
def test_only_what_is_needed_is_kept(case: str) -> None:
    sets, expected = NEEDS[case]
    assert fewest_kept(COSTS, needing(*sets)) == frozenset(expected)


@pytest.mark.parametrize("size", range(1, 6))
def test_it_passes_and_each_member_is_needed(size: int) -> None:
    """For every single demand, and for every pair of demands of which one is enough."""
    costs = COSTS[:size]
    demands = ["".join(d) for k in range(1, size + 1) for d in itertools.combinations(NAMES[:size], k)]
    for sets in [*((d,) for d in demands), *itertools.combinations(demands, 2)]:
        passes = needing(*sets)
        kept = fewest_kept(costs, passes)
        assert passes(kept)
        assert not any(passes(kept - {name}) for name in kept)


def test_a_network_is_tried_few_times() -> None:
    """Each is a run over all labelled pictures: bisection, not every number of layers."""
    costs = [LayerCost(str(i), 1.0 / (i + 1)) for i in range(64)]
    tried: list[frozenset[str]] = []

    def passes(kept: frozenset[str]) -> bool:
        tried.append(kept)
        return {"0", "1"} <= kept

    assert fewest_kept(costs, passes) == {"0", "1"}
    assert len(tried) <= 1 + 6 + 1 and tried[0] == frozenset()


LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer10.0.conv1", "fc")
CHOICES: dict[str, tuple[Collection[str], Collection[str]]] = {
    "none": ((), ()),
    "one": (("fc",), ("fc",)),
    "a block": (("layer1.0",), ("layer1.0.conv1", "layer1.0.conv2")),
    "a stage": (("layer1",), ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1")),
    "several": (("conv1", "layer1.1", "conv1"), ("conv1", "layer1.1.conv1")),
}


@pytest.mark.parametrize("case", CHOICES)
def test_layers_are_chosen_by_name_or_by_what_they_are_part_of(case: str) -> None:
    patterns, expected = CHOICES[case]
    assert choose(LAYERS, patterns) == frozenset(expected)


@pytest.mark.parametrize("name", ["layer", "layer1.", "layer1.0.conv", "conv", "", "layer2", "0", "FC"])
def test_a_name_of_no_layer_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ExportError) as caught:
        choose(LAYERS, ["fc", name])
    message = str(caught.value)
    assert message.startswith(f"--keep-fp16: no convolution or linear layer is called {name!r}; expected a layer")
    assert any(layer in message for layer in LAYERS) and "\n" not in message


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
    monkeypatch.setattr("export.progress._SECONDS", 0.0)
    said: list[str] = []
    layer_costs(wide.program.master, wide.calibration.ranges, wide.images, said.append)
    assert said == [f"quantise one layer at a time: {done} of 3 done" for done in range(3)]
