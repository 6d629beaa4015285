"""Places of buffers: apart where they live together, and hardly more than the most that lives at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from export.lowering.arena import Buffer, plan_arena
from export.runtime.engines.kernel_plan import ALIGNMENT

BUFFERS = st.builds(
    lambda size, first, length: Buffer(size, first, first + length),
    st.integers(0, 5000),
    st.integers(-1, 20),
    st.integers(0, 6),
)


@given(st.lists(BUFFERS, max_size=25), st.sampled_from((0, ALIGNMENT, 8 * ALIGNMENT)))
def test_buffers_that_live_together_lie_apart(buffers: list[Buffer], start: int) -> None:
    arena = plan_arena(buffers, start)
    for i, (one, at) in enumerate(zip(buffers, arena.offsets, strict=True)):
        assert at % ALIGNMENT == 0 and start <= at and at + one.size <= arena.size
        for other, there in zip(buffers[:i], arena.offsets, strict=False):
            assert not one.meets(other) or at + one.room <= there or there + other.room <= at
    assert start + arena.live <= max(arena.size, start) and arena.live <= arena.all


def test_a_chain_takes_the_room_of_two() -> None:
    """Of layers that each read the one before, and a shortcut over all of them."""
    chain = [Buffer(1000, step, step + 1) for step in range(20)]
    arena = plan_arena([*chain, Buffer(600, 0, 20)])
    assert arena.size == arena.live == 2 * 1024 + 768
    assert arena.all == 20 * 1024 + 768
