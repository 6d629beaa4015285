"""What names stand for, and the search for the fewest layers to keep in a wider type."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import pytest

from export import ExportError
from export.mixed_precision import chosen, fewest

NAMES = ("a", "b", "c", "d", "e", "f", "g")


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
    assert fewest(NAMES, needing(*sets)) == frozenset(expected)


def test_it_passes_and_each_member_is_needed() -> None:
    """For every single demand, and for every pair of demands of which one is enough."""
    for names in (NAMES[:size] for size in range(1, 6)):
        demands = ["".join(d) for k in range(1, len(names) + 1) for d in itertools.combinations(names, k)]
        for sets in [*((d,) for d in demands), *itertools.combinations(demands, 2)]:
            passes = needing(*sets)
            kept = fewest(names, passes)
            assert passes(kept) and not any(passes(kept - {name}) for name in kept)


def test_a_network_is_tried_few_times() -> None:
    """Each is a run over all labelled pictures: bisection, not every number of layers."""
    names = [str(i) for i in range(64)]
    tried: list[frozenset[str]] = []

    def passes(kept: frozenset[str]) -> bool:
        tried.append(kept)
        return {"0", "1"} <= kept

    assert fewest(names, passes) == {"0", "1"}
    assert len(tried) <= 1 + 6 + 1 and tried[0] == frozenset()


# operator -> the modules it computes
LAYERS = {
    "conv1": ("conv1", "bn1", "relu", "maxpool"),
    "layer1.0.conv1": ("layer1.0.conv1", "layer1.0.bn1"),
    "layer1.0.conv3": ("layer1.0.conv2", "layer1.0.conv3", "layer1.0.downsample.0"),
    "layer1.1.conv1": (),
    "layer10.0.conv1": (),
    "fc": ("avgpool", "fc"),
}
CHOICES: dict[str, tuple[Collection[str], Collection[str]]] = {
    "none": ((), ()),
    "one": (("fc",), ("fc",)),
    "a module that it is fused with": (("layer1.0.conv2",), ("layer1.0.conv3",)),
    "a block": (("layer1.0",), ("layer1.0.conv1", "layer1.0.conv3")),
    "a stage": (("layer1",), ("layer1.0.conv1", "layer1.0.conv3", "layer1.1.conv1")),
    "several": (("conv1", "layer1.1", "conv1"), ("conv1", "layer1.1.conv1")),
}


@pytest.mark.parametrize("case", CHOICES)
def test_layers_are_chosen_by_name_or_by_what_they_are_part_of(case: str) -> None:
    patterns, expected = CHOICES[case]
    assert chosen("ExportConfig.keep_fp32", LAYERS, patterns) == frozenset(expected)


@pytest.mark.parametrize("name", ["layer", "layer1.", "layer1.0.conv", "conv", "", "layer2", "0", "FC"])
def test_a_name_of_no_layer_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ExportError) as caught:
        chosen("ExportConfig.keep_fp32", LAYERS, ["fc", name])
    message = str(caught.value)
    assert message.startswith(f"ExportConfig.keep_fp32: no layer is called {name!r}; expected a layer")
    assert any(layer in message for layer in LAYERS) and "\n" not in message
