"""Where the report draws errors and edges, whatever they are."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.report.lanes import LANES, boxes
from export.report.plot import Z, plots
from tests.export.report.report_facts import check, node


def test_plots_share_one_logarithmic_scale() -> None:
    first, second = plots(Z, [[check("a", 0.01, 0.1)], [check("b", 1.0, 10.0)]])
    a, b = ([point.x for point in plot.rows[0].points] for plot in (first, second))
    decade = a[1] - a[0]
    assert decade > 10 and b[1] - b[0] == pytest.approx(decade, abs=0.05)
    assert b[0] - a[0] == pytest.approx(2 * decade, abs=0.05)
    assert first.rows[0].limits == second.rows[0].limits and first.grid == second.grid


def test_zero_and_infinity_have_a_place_and_a_shape() -> None:
    (plot,) = plots(Z, [[check("exact", 0.0, 0.0), check("wrong", None, math.inf), check("some")]])
    exact, wrong, some = ([(point.x, point.shape) for point in row.points] for row in plot.rows)
    assert exact == [(0.0, "zero")] * 2 and wrong == [(100.0, "beyond")] * 2
    assert [shape for _, shape in some] == ["dot", "diamond"] and 0 < some[0][0] < some[1][0] < 100
    (empty,) = plots(Z, [[{**check("a", 0.0, None), "rms_limit": None, "max_limit": None}]])
    assert empty.rows[0].limits == ()
    (narrow,) = plots(Z, [[check("a", 2.4, 2.5) | {"rms_limit": 2.4, "max_limit": 2.5}]])
    assert narrow.grid == ()


def test_the_axis_names_the_limit_of_most() -> None:
    limits = [{"max_limit": 9.0}, {"max_limit": 16.0}, {"max_limit": 9.0}]
    (plot,) = plots(Z, [[check(str(i)) | limit for i, limit in enumerate(limits)]])
    named = {line.shape: line.label for line in plot.axis if line.shape != "decade"}
    assert named == {"dot": "1.6", "diamond": "9"}
    assert [row.limits[1].label for row in plot.rows] == ["9", "16", "9"]


@given(st.lists(st.none() | st.floats(0), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_every_number_is_drawn_inside(values: list[float | None]) -> None:
    (plot,) = plots(Z, [[check("a", value, values[0]) for value in values]])
    marks = [x for row in plot.rows for x in (*(p.x for p in row.points), *(line.x for line in row.limits))]
    drawn = [*plot.grid, *marks]
    assert all(0 <= x <= 100 for x in drawn) and len(plot.grid) <= 9
    labels = sorted(line.x for line in plot.axis if line.shape == "decade")
    assert all(after - before >= 14 for before, after in itertools.pairwise(labels))


EDGES = st.lists(st.tuples(st.integers(0, 29), st.integers(1, 10), st.sampled_from(["", "residual"])), max_size=120)


@given(EDGES)
@settings(max_examples=60, deadline=None)
def test_lanes_of_any_graph(found: list[tuple[int, int, str]]) -> None:
    """A lane holds one value at a time, and whatever has no lane is told in words."""
    arrows = [(start, start + length, role) for start, length, role in dict.fromkeys(found)]
    edges = [{"from": start, "to": end, "role": role} for start, end, role in arrows]
    drawn = boxes({"nodes": [node("fused", str(i)) for i in range(40)], "edges": edges})
    for start, end, role in arrows:
        told = str(start) in drawn[end].reads.get(role, ())
        assert told or (not role and drawn[end].follows and drawn[start].followed and start == end - 1)
    held: dict[int, str] = {}
    for box in drawn:
        assert all(0 <= lane.index < LANES for lane in box.lanes)
        arriving = {lane.index: lane.role for lane in box.lanes if lane.turn != "starts"}
        assert arriving == held, "a line without a beginning, or one that is lost"
        goes_on = {lane.index for lane in box.lanes if lane.turn == "through"}
        held = {index: role for index, role in held.items() if index in goes_on}
        for lane in (lane for lane in box.lanes if lane.turn == "starts"):
            assert lane.index not in held, "two values in one lane"
            held[lane.index] = lane.role
    assert not held, "a line without an end"


def test_more_values_than_there_are_lanes() -> None:
    edges = [{"from": i, "to": 20, "role": ""} for i in range(LANES + 4)]
    drawn = boxes({"nodes": [node("fused", str(i)) for i in range(21)], "edges": edges})
    assert [lane.turn for lane in drawn[20].lanes] == ["ends"] * LANES
    assert drawn[20].reads == {"": tuple(str(i) for i in range(LANES + 4))}
