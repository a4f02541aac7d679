"""A worker's history stays small, keeps both ends of its life, and is evenly spread over it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.jobs.history import MOMENTS, Moment, extended


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=40), st.integers(1, 40))
def test_a_history_is_bounded_and_keeps_its_ends(pauses: list[int], times: int) -> None:
    history: tuple[Moment, ...] = ()
    everything, spent = [], 0
    for count, pause in enumerate(pauses * times):
        spent += pause
        everything.append(Moment(spent, count, 2 * count, count, 3 * count))
        history = extended(history, everything[-1])
        assert len(history) <= MOMENTS
        assert (history[0], history[-1]) == (everything[0], everything[-1])
    # Some of the moments that there were, each once and in order.
    wanted = set(history)
    assert [moment for moment in everything if moment in wanted] == list(history)


def test_a_long_life_is_spread_evenly() -> None:
    history: tuple[Moment, ...] = ()
    for beat in range(100_000):
        history = extended(history, Moment(beat * 15, beat, 0, 0, 0))
    gaps = [after.spent_ns - before.spent_ns for before, after in pairwise(history)]
    assert max(gaps) <= 8 * 15 * 100_000 / MOMENTS
