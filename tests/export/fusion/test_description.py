"""The fused graph as facts: nothing missing, and every edge where the value flows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from export.fusion.description import describe_graph
from tests.export import networks
from tests.export.networks import Fused

SHORTCUTS = [
    ("stem.0", "blocks.0.expand", "projection"),
    ("blocks.0.expand", "blocks.1.expand", "residual"),
    ("blocks.1.expand", "blocks.2.expand", "projection"),
]


def test_graph_of_two_heads_has_two_outputs(fused: Mapping[Any, Fused]) -> None:
    graph = describe_graph(fused[networks.two_heads].program.master)
    assert [(n["role"], n["name"], n["kind"]) for n in graph["nodes"]] == [
        ("input", "x", ""), ("fused", "conv", "conv2d_bias_act"), ("fused", "head", "mean_linear"),
        ("fused", "mask", "conv2d_bias_act"), ("output", "scores", ""), ("output", "mask", ""),
    ]  # fmt: skip
    pairs = [(e["from"], e["to"]) for e in graph["edges"]]
    assert sorted(pairs) == [(0, 1), (1, 2), (1, 3), (2, 4), (3, 5)]
    assert graph["nodes"][1]["parts"] == ["conv", "bn", "relu"] and graph["nodes"][5]["shape"] == ["N", 2, 32, 32]


def test_graph_names_residuals_projections_and_what_was_left(fused: Mapping[Any, Fused]) -> None:
    backbone = describe_graph(fused[networks.backbone].program.master)
    names = [n["name"] for n in backbone["nodes"]]
    assert [(names[e["from"]], names[e["to"]], e["role"]) for e in backbone["edges"] if e["role"]] == SHORTCUTS
    for edge in backbone["edges"]:
        assert edge["from"] < edge["to"]
        if edge["role"]:
            assert backbone["nodes"][edge["to"]]["role"] == "fused"
    left = [n for n in describe_graph(fused[networks.shared_conv].program.master)["nodes"] if n["role"] == "left"]
    assert any("2 readers" in n["reason"] for n in left)


@pytest.mark.parametrize("network", networks.ALL, ids=lambda network: network.__name__)
def test_graph_agrees_with_the_coverage(network: networks.Network, fused: Mapping[Any, Fused]) -> None:
    program = fused[network].program
    graph = describe_graph(program.master)
    for role, operators in (("fused", program.coverage.fused), ("left", program.coverage.left)):
        found = [(n["name"], n["kind"], n["reason"], tuple(n["parts"])) for n in graph["nodes"] if n["role"] == role]
        assert found == [(o.name, o.kind, o.reason, o.parts) for o in operators]
    assert len({tuple(e.values()) for e in graph["edges"]}) == len(graph["edges"])
    read = {e["to"] for e in graph["edges"]}
    assert read == {i for i, n in enumerate(graph["nodes"]) if n["role"] != "input"}
    assert json.loads(json.dumps(graph)) == graph
