"""The fused graph as rows of boxes, with lanes beside them for what does not go to the next box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LANES = 8  # what there is room for on a phone; an edge beyond them is told in words, as every one is


@dataclass(frozen=True)
class Lane:
    """What a lane does beside one box: it `starts` there, passes `through` or `ends`."""

    index: int
    turn: str
    role: str


@dataclass(frozen=True)
class Box:
    """One operator, input or output.

    Attributes:
        node: its facts.
        within: the module that all its parts belong to, empty where there is none.
        parts: full name and name in that module of each; `forward()` for what that module computes itself.
        reads: role -> names of the values it reads, but for that of the box above where it has no role.
        follows, followed: whether it reads the box above, and the box below reads it.
        lanes: beside it.
    """

    node: Mapping[str, Any]
    within: str
    parts: tuple[tuple[str, str], ...]
    reads: Mapping[str, tuple[str, ...]]
    follows: bool
    followed: bool
    lanes: tuple[Lane, ...]


def boxes(graph: Mapping[str, Any]) -> list[Box]:
    """The nodes of `export.fusion.description.describe_graph`, from top to bottom."""
    nodes, edges = graph["nodes"], graph["edges"]
    lanes, found = _lanes(len(nodes), edges), []
    adjacent = {edge["to"] for edge in edges if edge["to"] == edge["from"] + 1}
    for index, node in enumerate(nodes):
        within = _within(node["parts"])
        parts = tuple((part, _relative(part, within)) for part in node["parts"])
        reads: dict[str, tuple[str, ...]] = {}
        for edge in edges:
            if edge["to"] == index and (edge["role"] or edge["from"] != index - 1):
                reads[edge["role"]] = (*reads.get(edge["role"], ()), nodes[edge["from"]]["name"])
        follows, followed = index in adjacent, index + 1 in adjacent
        found.append(Box(node, within, parts, reads, follows, followed, tuple(lanes[index])))
    return found


def _lanes(count: int, edges: Sequence[Mapping[str, Any]]) -> list[list[Lane]]:
    """What runs beside each box: one lane for each value and role, from where it is computed to its last reader."""
    readers: dict[tuple[int, str], list[int]] = {}
    for edge in edges:
        if edge["to"] != edge["from"] + 1:
            readers.setdefault((edge["from"], edge["role"]), []).append(edge["to"])
    beside: list[list[Lane]] = [[] for _ in range(count)]
    free = [0] * LANES  # by lane: the first box where another value may start
    for (start, role), ends in sorted(readers.items(), key=lambda item: (item[0][0], max(item[1]), item[0][1])):
        index = next((lane for lane in range(LANES) if free[lane] <= start), None)
        if index is None:
            continue
        last = free[index] = max(ends)
        beside[start].append(Lane(index, "starts", role))
        for box in range(start + 1, last):
            beside[box].append(Lane(index, "through", role))
        for box in ends:
            beside[box].append(Lane(index, "ends", role))
    return beside


def _within(parts: Sequence[str]) -> str:
    """The innermost module that holds all of `parts`, or is one of several of them."""
    paths = [part.split(".") for part in dict.fromkeys(parts)]
    if not paths:
        return ""
    if len(paths) == 1:
        return ".".join(paths[0][:-1])
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


def _relative(part: str, within: str) -> str:
    if part == within:
        return "forward()"
    return part.removeprefix(f"{within}.") if within else part
